"""Runs trainings in forked processes that can be killed for good; a fresh interpreter each would cost seconds.

Reads one JSON job a line: ``{"do": "train" | "resume", "folder", "recipe", "kill": null | [where, count]}``, and writes
the exit status of the process that did it (negative: the signal that ended it). ``where`` is

- ``step``: after that many optimizer steps;
- ``cut``: inside the draw, before that tensor is sliced, with some of the model cut and some not;
- ``refit``: inside the draw, after the cut;
- ``tensors``: after the tensor file of that checkpoint, before its JSON;
- ``begin``: before the first step.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import lightning_fabric  # noqa: F401 - loaded once here, not in every child
import torch
import torch._dynamo  # likewise

from earlybird.errors import EarlybirdError
from earlybird.tickets import search
from earlybird.train import checkpoint, run
from earlybird.train.recipe import Recipe


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _counting(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return ``function``, which dies before its call number ``count``."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            _die()
        return function(*args, **kwargs)

    return wrapped


def _shrink_that_dies(shrink: Callable[..., Any], count: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.index_select = _counting(torch.Tensor.index_select, count)
        return shrink(*args, **kwargs)

    return wrapped


def _arm(where: str, count: int) -> Callable[[str, Any], None]:
    if where == "cut":
        search.shrink = _shrink_that_dies(search.shrink, count)
    elif where == "refit":
        search.estimate_batch_norms = _counting(search.estimate_batch_norms, count)
    elif where == "tensors":
        checkpoint.write_json = _counting(checkpoint.write_json, count)

    def on_event(kind: str, fields: Any) -> None:
        if (where == "step" and kind == "step" and fields["step"] == count) or (where == "begin" and kind == "tuned"):
            _die()

    return on_event


def _work(job: dict[str, Any]) -> int:
    on_event = _arm(*job["kill"]) if job.get("kill") else None
    try:
        if job["do"] == "train":
            run.train(Recipe.from_values(job["recipe"]), job["folder"], quiet=True, on_event=on_event)
        else:
            run.resume(job["folder"], quiet=True, on_event=on_event)
    except EarlybirdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = _work(json.loads(line))
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
