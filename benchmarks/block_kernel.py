"""Question: from which sparsity on do dense blocks beat the dense layer in inference on a CPU?

A layer whose weight is a union of blocks (what `earlybird.tickets.structure.regroup` leaves) against the dense layer
with all its weights, which takes the same time however many of them are zero. Blocks of random columns: outputs are
dealt out to at most 8 parts of at least 32, and each part has the same number of columns; the more sparse, the fewer.
3x3 convolutions of VGG-16 and ResNet-18 at 32x32 pixels, one image and 64. PyTorch's own layer is timed contiguous and
in channels_last, and the faster of the two is what the others are compared with; they get channels_last. All must give
the same numbers:

- ``kernel``: the compiled kernel of `earlybird.sparse.block_kernel`;
- ``gather``: unfolded input, the columns of a block gathered, one product a block: what is done without a compiler;
- ``bmm``: the same, as one batched product of all blocks;
- ``CSR``: PyTorch's sparse matrix times the unfolded input (float32 alone).

Then whole networks in which `earlybird.sparse.blocks.to_blocks` has chosen.

    python benchmarks/block_kernel.py                  # some ten minutes
    python benchmarks/block_kernel.py --quick          # a few shapes, one network; nothing is recorded
    python benchmarks/block_kernel.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import DISTURBED, interleaved, machine, read_rounds
from records import record, time_or_show
from tables import session_tables
from torch import Tensor, nn

from earlybird.kernels.convolution import unfolded
from earlybird.kernels.fold import fold_batch_norms
from earlybird.kernels.window import Window
from earlybird.models import build
from earlybird.sparse.block_kernel import Block, available, multiply, multiply_by_pytorch, pack
from earlybird.sparse.blocks import find_blocks, from_matrix, to_blocks, to_matrix
from earlybird.sparse.masks import prunable, ticket_of
from earlybird.tickets.ticket import Ticket

NAME = "block_kernel"
SHAPES = ((32, 64, 64), (16, 128, 128), (8, 256, 256), (4, 512, 512), (2, 512, 512))
"""Side, input and output channels."""
BATCHES = (1, 64)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
OTHERS_AT = (0.5, 0.9)
"""Sparsities at which the other ways are timed, too."""
NETWORKS = ("vgg16", "resnet18")
NETWORK_SPARSITIES = (0.5, 0.8, 0.9)
WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1))
LEAST_S = 0.01
PARTS, LEAST_ROWS = 8, 32
NETWORK_HEAD = (
    "| network | images | weights that are zero | layers of blocks | dense, ms | dense / blocks |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def random_mask(shape: Sequence[int], sparsity: float, generator: torch.Generator) -> Tensor:
    """Return a mask of random blocks: parts of equally many outputs, with equally many columns."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    matrix = to_matrix(mask).clone()
    number = max(min(PARTS, len(matrix) // LEAST_ROWS), 1)
    for part in torch.randperm(len(matrix), generator=generator).chunk(number):
        kept = max(round((1 - sparsity) * matrix.shape[1]), 1)
        matrix[part[:, None], torch.randperm(matrix.shape[1], generator=generator)[:kept]] = True
    return from_matrix(matrix, shape)


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve by PyTorch's own kernel."""
    return torch.conv2d(x, weight, None, WINDOW.stride, WINDOW.padding)


def batched(x: Tensor, stacked: Tensor, columns: Tensor, rows_: Tensor, outputs: int) -> Tensor:
    """Convolve with equal blocks as one batched product.

    Args:
        x: ``(N, I, H, W)``.
        stacked: Weights of all blocks, ``(blocks, C, R)``.
        columns: Theirs, ``(blocks, C)``.
        rows_: Their outputs, ``(blocks * R,)``.
        outputs: Of the layer.
    """
    seen = unfolded(x, WINDOW).index_select(1, columns.flatten())  # (N * P, blocks * C)
    products = torch.bmm(seen.view(len(seen), *columns.shape).transpose(0, 1), stacked)  # (blocks, N * P, R)
    y = seen.new_zeros(len(seen), outputs)
    y.index_copy_(1, rows_, products.transpose(0, 1).flatten(1))
    return y.view(len(x), *x.shape[2:], outputs).permute(0, 3, 1, 2)


def by_csr(x: Tensor, sparse: Tensor) -> Tensor:
    """Convolve with a weight ``(O, kh * kw * I)`` in compressed rows."""
    y = sparse @ unfolded(x, WINDOW).t()  # (O, N * P)
    return y.view(len(y), len(x), *x.shape[2:]).transpose(0, 1)


def ways(x: Tensor, weight: Tensor, mask: Tensor, others: bool) -> dict[str, Callable[[], Tensor]]:
    """Return name to what convolves ``x`` with the masked weight.

    Args:
        x: ``(N, I, H, W)``, channels_last.
        weight: ``(O, I, 3, 3)``, of the same type.
        mask: Of blocks that have equally many rows and columns, shaped as ``weight``.
        others: Whether the slower ways are among them.
    """
    blocks, outputs = find_blocks(mask), len(weight)
    matrix = to_matrix(weight)
    values = [matrix[block.rows][:, block.columns].contiguous() for block in blocks]
    found: dict[str, Callable[[], Tensor]] = {}
    if available(x.dtype):
        packed = pack(values, blocks, outputs, x.shape[1], 9)
        found["kernel"] = partial(multiply, x, packed, WINDOW)
    if others:
        found["gather"] = partial(multiply_by_pytorch, x, values, blocks, outputs, WINDOW)
        found["bmm"] = partial(batched, x, *equal(values, blocks), outputs)
        if x.dtype == torch.float32:
            found["CSR"] = partial(by_csr, x, (matrix * to_matrix(mask)).to_sparse_csr())
    return found


def equal(values: Sequence[Tensor], blocks: Sequence[Block]) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, columns and rows of equal blocks for `batched`."""
    columns = torch.stack([block.columns for block in blocks])
    return torch.stack([value.t() for value in values]), columns, torch.cat([block.rows for block in blocks])


def check(found: dict[str, Callable[[], Tensor]], expected: Tensor) -> None:
    """Raise unless all ways give the same numbers, as far as their type can tell."""
    for name, action in found.items():
        error = float((action().float() - expected.float()).abs().max() / expected.float().abs().max())
        if error > (0.02 if expected.dtype == torch.bfloat16 else 1e-4):
            raise RuntimeError(f"{name} computes another convolution: off by {error:.1%}")


def convolutions(options: argparse.Namespace) -> None:
    """Print and record the ratios of every way, shape by shape."""
    print(head())
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        for side, inputs, outputs in SHAPES[:: 3 if options.quick else 1]:
            for name, dtype in TYPES.items():
                x = torch.randn(batch, inputs, side, side, generator=generator).to(dtype)
                weight = (0.05 * torch.randn(outputs, inputs, 3, 3, generator=generator)).to(dtype)
                last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight)]
                actions: dict[Any, Callable[[], Tensor]] = {
                    "contiguous": partial(dense, x, weight), "channels_last": partial(dense, *last),
                }  # fmt: skip
                for sparsity in SPARSITIES:
                    mask = random_mask(weight.shape, sparsity, generator)
                    found = ways(last[0], weight, mask, sparsity in OTHERS_AT)
                    check(found, dense(x, weight * mask))
                    actions |= {(way, sparsity): action for way, action in found.items()}
                of = machine()
                times, others = interleaved(actions, options.rounds, LEAST_S)
                best = min(("contiguous", "channels_last"), key=lambda layout: statistics.median(times[layout]))
                ratios: dict[str, dict[str, float]] = {}
                for way, sparsity in (key for key in actions if isinstance(key, tuple)):
                    taken = (a / b for a, b in zip(times[best], times[way, sparsity]))
                    ratios.setdefault(way, {})[str(sparsity)] = statistics.median(taken)
                row = {"side": side, "inputs": inputs, "outputs": outputs, "batch": batch, "type": name}
                row |= {"dense_seconds": statistics.median(times[best]), "layout": best, "ratios": ratios}
                row |= {"rounds": options.rounds, "others": others, **of}
                print(line(row), flush=True)
                record(NAME, row, quick=options.quick)


def random_ticket(model: nn.Module, sparsity: float, generator: torch.Generator) -> Ticket:
    """Return a ticket of random blocks in all layers but the first one and the head."""
    weights = prunable(model, leave=("first", "last"))
    return ticket_of({name: random_mask(weight.shape, sparsity, generator) for name, weight in weights.items()})


def networks(options: argparse.Namespace) -> None:
    """Print and record whole networks: dense, and with the layers replaced that were measured to be faster."""
    print(f"\n{NETWORK_HEAD}")
    generator = torch.Generator().manual_seed(0)
    for name in NETWORKS[: 1 if options.quick else None]:
        # both with batch norms folded, as `to_blocks` does
        model = fold_batch_norms(build(name, classes=10, image_size=32), torch.zeros(1, 3, 32, 32))
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        for batch in BATCHES:
            x = torch.randn(batch, 3, 32, 32, generator=generator)
            x_last = x.contiguous(memory_format=torch.channels_last)
            actions: dict[Any, Callable[[], Tensor]] = {
                "contiguous": partial(model, x), "channels_last": partial(last, x_last),
            }  # fmt: skip
            replaced = {}
            for sparsity in NETWORK_SPARSITIES:
                fast, gains = to_blocks(last, random_ticket(last, sparsity, generator), x_last)
                replaced[sparsity] = sum(gain.replaced for gain in gains), len(gains)
                actions[sparsity] = partial(fast, x_last)
            of = machine()
            times, others = interleaved(actions, options.rounds, LEAST_S)
            best = min(("contiguous", "channels_last"), key=lambda layout: statistics.median(times[layout]))
            for sparsity in NETWORK_SPARSITIES:
                row = {"network": name, "batch": batch, "sparsity": sparsity, "replaced": list(replaced[sparsity])}
                row |= {"dense_seconds": statistics.median(times[best]), "layout": best}
                row |= {"ratio": statistics.median(a / b for a, b in zip(times[best], times[sparsity]))}
                row |= {"rounds": options.rounds, "others": others, **of}
                print(line(row), flush=True)
                record(NAME, row, quick=options.quick)


def crossover(ratios: dict[str, float]) -> str:
    """Return the least sparsity from which on the way was faster at every one that was timed; '' if at none."""
    found = ""
    for sparsity in sorted(ratios, key=float, reverse=True):
        if ratios[sparsity] <= 1:
            break
        found = sparsity
    return found


def head() -> str:
    """Return the head of the table of layers: ratios are the dense layer's time over that of the other way."""
    titles = ["side", "channels", "images", "type", "dense, ms", *(f"{s:.0%} zero" for s in SPARSITIES), "faster from"]
    titles += [f"{way} at {s:.0%}" for s in OTHERS_AT for way in ("gather", "bmm", "CSR")]
    return "| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|"


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    if "network" in row:
        replaced, layers = row["replaced"]
        cells = [row["network"], f"{row['batch']}", f"{row['sparsity']:.0%}", f"{replaced} of {layers}"]
        return "| " + " | ".join([*cells, f"{1e3 * row['dense_seconds']:.1f}", f"{row['ratio']:.2f}x"]) + " |"
    cells = [f"{row['side']}", f"{row['inputs']} to {row['outputs']}", f"{row['batch']}", row["type"]]
    cells.append(f"{1e3 * row['dense_seconds']:.3f}")
    own = row["ratios"].get("kernel", {})
    cells += [_ratio(own.get(str(sparsity))) for sparsity in SPARSITIES]
    begins = crossover(own)
    cells.append(f"{float(begins):.0%}" if begins else "nowhere")
    cells += [_ratio(row["ratios"].get(way, {}).get(str(s))) for s in OTHERS_AT for way in ("gather", "bmm", "CSR")]
    return "| " + " | ".join(cells) + " |"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine as Markdown: layers, then networks."""
    return session_tables(found, {"side": head(), "network": NETWORK_HEAD}, line, _disturbed)


def _disturbed(mine: Sequence[dict[str, Any]]) -> str:
    busy = max(row.get("others", 0.0) for row in mine)
    return f" Other processes took up to {busy:.0%} of the processors." if busy > DISTURBED else ""


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return read_rounds(__doc__, words)


def main() -> None:
    time_or_show(read(), NAME, tables, torch.no_grad()(convolutions), torch.no_grad()(networks))


if __name__ == "__main__":
    main()
