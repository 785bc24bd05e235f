"""Train what a user might pick instead of an early ticket, and write what it reached and what it cost.

    python benchmarks/rivals/run.py snip --recipe recipes/vgg16-cifar10.toml --width 0.5 --epochs 10 --seed 0 \\
        --macs-share 0.67 --out rivals/snip-seed0
    python benchmarks/rivals/run.py prune-finetune-magnitude ... --dense runs/dense-seed0 --out ...

Everything lies in ``OUT/row.json``, written at the end: a contestant that was stopped starts again, one that is done is
not run twice. With ``--dense``, rivals that begin with a dense training take over weights, seconds, MACs and modelled
joules of a finished run of ``earlybird train --dense`` with the same recipe, width, epochs and seed.

In a row, seconds are measured (whole process from the loading of the data on, evaluation included), MACs counted,
joules modelled (low and high DRAM price); all are of all phases together. The bill has them one by one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it runs as a script, from anywhere

from benchmarks.common import machine
from benchmarks.rivals import at_init, composer, dense, lottery, pruning, slimming
from benchmarks.rivals.loop import Contest, Options, check_macs_share, start, whole_bill
from earlybird.cost.count import count
from earlybird.errors import EarlybirdError, InputError, nearest
from earlybird.files import read_json, write_json
from earlybird.train.recipe import Recipe

RIVALS: dict[str, Callable[[Contest], tuple[nn.Module, float]]] = {
    "prune-finetune-magnitude": pruning.magnitude,
    "prune-finetune-taylor": pruning.taylor,
    "prune-finetune-bn_scale": pruning.bn_scale,
    "prune-finetune-gradual": pruning.gradual,
    "slimming": slimming.network_slimming,
    "soft-filter": slimming.soft_filter_pruning,
    "snip": at_init.snip,
    "grasp": at_init.grasp,
    "synflow": at_init.synflow,
    "random-ticket": at_init.random_ticket,
    "lottery-one-shot": lottery.one_shot,
    "lottery-iterative": lottery.iterative,
    "progressive-resizing": composer.progressive_resizing,
    "layer-freezing": composer.layer_freezing,
    "selective-backprop": composer.selective_backprop,
    "small-dense": dense.small_dense,
}
OVERRIDES = ("model", "width", "epochs", "seed", "accelerator", "threads", "train_images")
"""Keys of the recipe that are flags here, too."""
BEGIN_DENSE = [name for name in RIVALS if name.startswith(("prune-finetune", "lottery"))]
WHOLE_NETWORK = ("progressive-resizing", "layer-freezing", "selective-backprop")


def run(rival: str, recipe: Recipe, options: Options, out: Path) -> dict[str, Any]:
    """Train ``rival``, unless its row is there already, and return the row.

    Raises:
        InputError: There is no such rival, it cannot do what is asked, or ``out`` holds something else.
    """
    if rival not in RIVALS:
        raise InputError(f"unknown rival '{rival}'", needed=f"one of {', '.join(RIVALS)}", hint=nearest(rival, RIVALS))
    if options.dense is not None and rival not in BEGIN_DENSE:
        raise InputError(f"{rival} does not begin with a dense training", hint="leave --dense out")
    if rival not in WHOLE_NETWORK and options.macs_share is None:
        raise InputError(f"{rival} cuts the network", needed="--macs-share, such as 0.67")
    share = None if rival in WHOLE_NETWORK else options.macs_share
    key = {
        "rival": rival, "model": recipe.model, "data": recipe.data, "width": recipe.width, "epochs": recipe.epochs,
        "seed": recipe.seed, "macs_share": share, "finetune_epochs": options.finetune_epochs, "score": options.score,
        "rewind_epochs": options.rewind_epochs, "resize": options.resize, "sparsity": options.sparsity,
        "recipe": recipe.hash(),
    }  # fmt: skip
    if (out / "row.json").is_file():
        found: dict[str, Any] = read_json(out / "row.json")
        if any(found.get(name) != value for name, value in key.items()):
            raise InputError(f"{out} holds the row of another contestant", hint="choose another --out")
        return found
    head = machine()
    contest = start(recipe, options)
    if share is not None:
        check_macs_share(contest)
    write_json(out / "contestant.json", key)  # where nothing can be written, this says so before hours of training
    model, accuracy = RIVALS[rival](contest)
    contest.ledger.stop()
    bill = whole_bill(contest)
    total = bill.total
    taken = "" if options.dense is None else f", the dense training taken over from {options.dense.name}"
    row = {
        **key,
        "accuracy": accuracy,
        "seconds": total.seconds.value,
        "seconds_kind": f"measured{taken}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_macs": count(model, contest.example).forward_macs,
        "dense_forward_macs": contest.dense_macs,
        "macs": None if total.macs is None else total.macs.value,
        "joules": None if total.modelled_joules is None else [total.modelled_joules.low, total.modelled_joules.high],
        "curve": contest.curve,
        "round_to": contest.round_to,
        **contest.notes,
        "bill": bill.to_json(),
        **head,
    }
    write_json(out / "row.json", row)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run one rival from the command line; return 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rival", help=", ".join(RIVALS))
    parser.add_argument("--recipe", required=True, help="recipe file of the product")
    parser.add_argument("--model", help="zoo name; default: the recipe's")
    parser.add_argument("--width", type=float, help="factor on the channels; default: the recipe's")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), help="default: the recipe's")
    parser.add_argument("--train-images", type=int, help="train on so many images; default: the recipe's")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--macs-share", type=float, help="forward MACs of the small network over the dense one's")
    parser.add_argument("--dense", type=Path, help="finished dense run to take over")
    parser.add_argument("--finetune-epochs", type=int, help="after a cut; default: a third of --epochs")
    parser.add_argument("--score", default="magnitude", choices=("magnitude", "bn_scale"), help="of lottery tickets")
    parser.add_argument("--rewind-epochs", type=int, default=0, help="of lottery-iterative; 0 are the first weights")
    parser.add_argument("--resize", default="crop", choices=("crop", "resize"), help="of progressive-resizing")
    parser.add_argument("--sparsity", type=float, default=1e-4, help="factor of the L1 term of slimming")
    parser.add_argument("--out", type=Path, required=True, help="folder of row.json")
    given = parser.parse_args(arguments)
    try:
        for name, least in (("finetune_epochs", 1), ("rewind_epochs", 0)):
            value = getattr(given, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}", needed=f"at least {least}")
        overrides = {name: getattr(given, name) for name in OVERRIDES}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        recipe = Recipe.from_toml(given.recipe, {**overrides, "dense": True})
        options = Options(
            macs_share=given.macs_share, dense=given.dense, finetune_epochs=given.finetune_epochs, score=given.score,
            rewind_epochs=given.rewind_epochs, resize=given.resize, sparsity=given.sparsity,
        )  # fmt: skip
        row = run(given.rival, recipe, options, given.out)
    except EarlybirdError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    share = row["forward_macs"] / row["dense_forward_macs"]
    print(f"{given.rival}: {row['accuracy']:.2%}, {row['seconds']:.1f} s, {share:.3f} of the forward MACs, {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
