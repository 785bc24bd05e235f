"""What torchrun starts: one whole run, and one that is stopped after the draw and resumed; each rank bears witness."""

import atexit
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from earlybird.errors import Interrupted
from earlybird.train import run
from earlybird.train.recipe import Recipe


class Witness(run.Run):
    """A run in which each rank writes down the weights it ends with."""

    def finish(self) -> run.Result:
        result = super().finish()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        path = self.folder.path
        save_file(tensors, path.with_name(f"{path.name}-rank{self.fabric.global_rank}.safetensors"))
        return result


class Stop(Exception):
    pass


def stop(kind: str, fields: Mapping[str, Any]) -> None:
    if kind == "step" and fields["step"] == 37:
        raise Stop


def list_threads(folder: Path) -> None:
    names = sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    (folder / f"threads-rank{os.environ['RANK']}.txt").write_text("\n".join(names))


def main(folder: Path) -> int:
    atexit.register(list_threads, folder)  # before any other: the last to be called
    run.Run = Witness  # type: ignore[misc]
    recipe = Recipe.from_toml(folder / "recipe.toml")
    try:
        run.train(recipe, folder / "whole", quiet=True)
    except Interrupted as error:
        import torch

        (folder / f"whole-rank{torch.distributed.get_rank()}.txt").write_text(str(error))
        return error.exit_code
    try:
        run.train(recipe, folder / "stopped", quiet=True, on_event=stop)
    except Stop:
        run.resume(folder / "stopped", quiet=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
