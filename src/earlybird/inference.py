"""A trained network as one would run it on a CPU, and what a batch then takes, timed in turns with the dense network.

    network = for_inference(export.load("runs/first"), images)
    print(describe(time_run("runs/first", batch=64)))

Batch norms are folded into convolutions, images lie in channels_last, and layers whose zeros leave dense blocks
(`earlybird.sparse.blocks`) run as such where that is faster here. Dense networks get the same, so that what is saved is
the ticket's doing. Times are measured, of this machine, and say nothing about another one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from earlybird import export
from earlybird.calls import unwrapped
from earlybird.errors import InputError
from earlybird.kernels.fold import fold_batch_norms
from earlybird.settings import check_count, check_number
from earlybird.sparse.blocks import BlockConv2d, BlockLinear, to_blocks
from earlybird.sparse.masks import NOT_MULTIPLIED, non_zeros, prunable, ticket_of

__all__ = ["Inference", "Timed", "describe", "for_inference", "time_in_turns", "time_run"]

TURNS = 15
WARM_UP = 3


def for_inference(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy in eval mode and channels_last that computes the same, faster; on a CPU, without gradients.

    Args:
        model: Trained; left as it is. Weights that a ticket has removed are zeros.
        images: A batch as it will be called with, ``(N, C, H, W)``: its size decides which way is faster.

    Raises:
        InputError: Model or images are not on the CPU.
    """
    model = unwrapped(model)
    elsewhere = {tensor.device for tensor in (*model.parameters(), images)} - {torch.device("cpu")}
    if elsewhere:
        raise InputError(f"a tensor on {elsewhere.pop()}", needed="model and images on the CPU", hint="use .cpu()")
    images = images.contiguous(memory_format=torch.channels_last)
    zeros = {}
    if not any(isinstance(layer, NOT_MULTIPLIED) for layer in model.modules()):  # zeros are not nothing there
        zeros = {name: weight != 0 for name, weight in prunable(model).items() if bool((weight == 0).any())}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast: nn.Module = to_blocks(last, ticket_of(zeros), images)[0] if zeros else fold_batch_norms(last, images)
    return fast


def time_in_turns(networks: Mapping[str, nn.Module], images: Tensor, *, turns: int = TURNS) -> dict[str, list[float]]:
    """Return the seconds that each network takes for a batch, turn by turn, so that a machine's moods meet all alike.

    Args:
        networks: By name.
        images: The batch; it is put into channels_last.
        turns: How many count; a few more come first, to warm up.
    """
    check_count("turns", turns, "15", optional=False)
    images = images.contiguous(memory_format=torch.channels_last)
    taken: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for turn in range(WARM_UP + turns):
            for name in list(networks)[:: 1 if turn % 2 else -1]:  # whoever comes second finds other caches
                begun = time.perf_counter()
                networks[name](images)
                if turn >= WARM_UP:
                    taken[name].append(time.perf_counter() - begun)
    return taken


class Inference(NamedTuple):
    """What a batch takes in one network.

    Attributes:
        seconds: Median over turns.
        least, most: The fastest and the slowest turn, seconds.
        nonzero: Parameters that are not zero.
        in_blocks: Layers that run as dense blocks.
    """

    seconds: float
    least: float
    most: float
    nonzero: int
    in_blocks: int


class Timed(NamedTuple):
    """A trained network beside the dense one that it was made of.

    Attributes:
        batch: Images in a batch.
        threads: That computed it.
        dense: With fresh weights.
        own: The trained one.
        shares: Quartiles, over turns, of what it takes of the dense network's time in the same turn.
    """

    batch: int
    threads: int
    dense: Inference
    own: Inference
    shares: tuple[float, float, float]


def time_run(
    run: str | Path, *, batch: int = 64, turns: int = TURNS, threads: int | None = None, model: str | None = None
) -> Timed:
    """Time a trained network and the dense one that it was made of, both by `for_inference`, in float32.

    Args:
        run: Run folder, or a file of `earlybird.export.export_weights`.
        batch: Images in a batch.
        turns: At least 2, see `time_in_turns`.
        threads: Of PyTorch, meanwhile; None: as it is.
        model: As for `earlybird.export.load`.

    Raises:
        InputError: As for `earlybird.export.load`, or a number is out of its range.
    """
    check_count("batch", batch, "64", optional=False)
    check_count("threads", threads, "1")
    check_number("turns", turns, lambda value: value >= 2 and value == int(value), "a whole number of at least 2")
    trained, blueprint = export.rebuild(run, model=model)
    images = blueprint.example(batch)
    plain = {"dense": blueprint.build(), "own": trained}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        networks = {name: for_inference(network, images) for name, network in plain.items()}
        taken = time_in_turns(networks, images, turns=turns)
    finally:
        torch.set_num_threads(before)

    def found(name: str) -> Inference:
        seconds, layers = taken[name], networks[name].modules()
        blocks = sum(isinstance(layer, (BlockConv2d, BlockLinear)) for layer in layers)
        return Inference(statistics.median(seconds), min(seconds), max(seconds), non_zeros(plain[name])[0], blocks)

    low, middle, high = statistics.quantiles([own / dense for dense, own in zip(taken["dense"], taken["own"])])
    return Timed(batch, threads or before, found("dense"), found("own"), (low, middle, high))


def describe(timed: Timed) -> str:
    """Return what `time_run` has found in words: a loss is called one, and what turns differ by, no difference."""
    low, middle, high = timed.shares
    if low <= 1 <= high:
        verdict = "no difference"
    else:
        verdict = f"{1 - middle:.1%} less time" if middle < 1 else f"{middle - 1:.1%} more time: a loss"
    blocks = f", {timed.own.in_blocks} layers as dense blocks" if timed.own.in_blocks else ""
    return "\n".join(
        [
            f"inference of {timed.batch} images, {timed.threads} thread{'s' * (timed.threads > 1)}, float32, "
            "channels_last, batch norms folded (measured: median, fastest and slowest of turns)",
            f"  dense  {_ms(timed.dense)}  {timed.dense.nonzero:,} parameters that are not zero",
            f"  this   {_ms(timed.own)}  {timed.own.nonzero:,} parameters that are not zero{blocks}",
            f"  {verdict} (of dense in the same turn, quartiles: {low:.1%} to {high:.1%})",
        ]
    )


def _ms(found: Inference) -> str:
    return f"{1e3 * found.seconds:9.3f} ms ({1e3 * found.least:.3f} to {1e3 * found.most:.3f})"
