"""The command line of tickets: ``earlybird ticket show | distance | refill | regroup | stretch``.

Torch is loaded when one of them runs, so that ``earlybird --help`` answers at once.
"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from earlybird.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from earlybird.models.blueprint import Blueprint
    from earlybird.tickets.ticket import Ticket

__all__ = ["application"]

TicketFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Ticket file, or the folder of a run.", show_default=False)
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run of iterative pruning.", show_default=False)
]
Round = Annotated[
    int | None, typer.Option("--round", help="Its ticket after so many prunings; default: the last.", min=1)
]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="Ticket file to write.", show_default=False)]


class Criterion(StrEnum):
    """Names of `earlybird.tickets.structure.CRITERIA`, here so that torch need not be loaded."""

    remain = "remain"
    magnitude = "magnitude"
    l1 = "l1"
    l2 = "l2"
    saliency = "saliency"


class Longer(StrEnum):
    """Orders of `earlybird.tickets.elastic.unit_map` where a stage is longer."""

    interpolate = "interpolate"
    append = "append"


class Shorter(StrEnum):
    """The same where it is shorter."""

    interleaved = "interleaved"
    consecutive = "consecutive"


def application() -> typer.Typer:
    """Return the group of commands."""
    group = typer.Typer(
        name="ticket",
        help="Look at tickets, and make others of them: whole channels, dense blocks, another depth.",
        epilog="'earlybird ticket COMMAND --help' has examples.",
        rich_markup_mode=None,
    )
    for function in (show, distance, refill, regroup, stretch):
        group.command()(function)
    return group


def show(file: TicketFile, number: Round = None) -> None:
    """Print the layers of a ticket, what it keeps of each, and where it came from.

    \b
    Examples:
      earlybird ticket show runs/lottery/ticket.safetensors
      earlybird ticket show runs/lottery --round 3
    """
    ticket = _load(file, number)
    widest = max(len(name) for name in ticket.masks)
    print(f"{'layer':<{widest}}  {'kind':<8}{'kept':>12}{'all':>12}{'removed':>9}")
    for name, (kept, total) in ticket.widths.items():
        print(f"{name:<{widest}}  {ticket.kinds[name]:<8}{kept:>12,}{total:>12,}{1 - kept / total:>9.1%}")
    kept, total = (sum(counts) for counts in zip(*ticket.widths.values()))
    print(f"{'together':<{widest}}  {'':<8}{kept:>12,}{total:>12,}{1 - kept / total:>9.1%}")
    _print_provenance(ticket.provenance)


def _print_provenance(provenance: Any, indent: str = "") -> None:
    for key, value in provenance.items():
        if isinstance(value, dict) and key == "source":
            print(f"{indent}{key}:")
            _print_provenance(value, indent + "  ")
        elif isinstance(value, dict):
            print(f"{indent}{key}: " + ", ".join(f"{name} {one}" for name, one in value.items()))
        else:
            print(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


def distance(
    first: TicketFile,
    second: TicketFile,
    number: Annotated[int | None, typer.Option("--round", help="Of both runs; default: the last.", min=1)] = None,
) -> None:
    """Print how far apart two tickets are, layer by layer and together.

    Differ: the share of the units on which they do. Jaccard: what both keep, over what either keeps.

    \b
    Examples:
      earlybird ticket distance runs/seed0 runs/seed1
      earlybird ticket distance runs/supervised runs/simclr --round 8
      earlybird ticket distance runs/lottery/tickets/round-1.safetensors runs/lottery/tickets/round-2.safetensors
    """
    from earlybird.tickets.transfer import expected_jaccard, jaccard

    one, other = _load(first, number), _load(second, number)
    together = one.distance(other)
    overall, layers = jaccard(one, other)
    masks = other.masks
    widest = max(len(name) for name in (*one.masks, "together"))
    print(f"{'layer':<{widest}}  differ  Jaccard")
    for name, mask in one.masks.items():
        print(f"{name:<{widest}}  {float((mask ^ masks[name]).float().mean()):.4f}  {layers[name]:.4f}")
    print(f"{'together':<{widest}}  {together:.4f}  {overall:.4f}")
    print(
        f"of random tickets of these sizes, a Jaccard index of {expected_jaccard(one.keep, other.keep):.4f} is expected"
    )


def refill(
    run: RunFolder,
    out: OutFile,
    criterion: Annotated[
        Criterion, typer.Option(help="What ranks channels: weights left, their size, or feature maps of a batch.")
    ] = Criterion.magnitude,
    fill_back: Annotated[
        float, typer.Option(help="Share of the other channels to give back; published: 0, Refill+ above.", min=0, max=1)
    ] = 0.0,
    images: Annotated[int, typer.Option(help="Training images of the batch for l1, l2 and saliency.", min=2)] = 256,
    number: Round = None,
    seed: Annotated[int, typer.Option(help="Breaks ties, and chooses the batch.")] = 0,
) -> None:
    """Make a ticket over whole channels, which are cut in training, of one over single weights.

    Each layer keeps as many channels as its weights would fill.

    \b
    Examples:
      earlybird ticket refill runs/lottery --out refilled.safetensors
      earlybird ticket refill runs/lottery --out refilled.safetensors --criterion saliency --fill-back 0.1
      earlybird ticket refill runs/lottery --out refilled.safetensors --criterion remain --round 3
    """
    import torch

    from earlybird.start import read_trained
    from earlybird.tickets import structure

    ticket = _load(run, number)
    if any(kind != "weight" for kind in ticket.kinds.values()):
        raise InputError(f"{run} has a ticket over whole channels already", needed="one over single weights")
    _check_out(out)
    if criterion is not Criterion.remain and ticket != _load(run):
        raise InputError(
            f"round {number} is not the last one, and its trained weights were not kept",
            hint="rank by --criterion remain, which needs none, or leave --round out",
        )
    blueprint, weights = read_trained(run)
    model = blueprint.build()
    model.load_state_dict(weights)
    inputs, labels = blueprint.example(2), None
    if criterion not in (Criterion.remain, Criterion.magnitude):
        inputs, labels = _batch(run, images, seed)
    refilled = structure.refill(
        ticket,
        model,
        inputs,
        criterion=criterion.value,
        fill_back=fill_back,
        labels=labels,
        generator=torch.Generator().manual_seed(seed),
    )
    refilled.save(out)
    about = refilled.provenance
    kept, total = (sum(counts) for counts in zip(*refilled.widths.values()))
    print(f"{kept:,} of {total:,} channels in {len(refilled.masks)} layers, {len(about['whole'])} layers left whole")
    print(f"weights: {about['source_keep']:.2%} before, {about['weights_kept']:.2%} now")
    print(f"ticket: {out}   next: {_train(run, refilled, out, run / 'rewind.safetensors')}")


def regroup(
    run: RunFolder,
    out: OutFile,
    parts: Annotated[int, typer.Option(help="Into how many the outputs of a layer are put at most.", min=1)] = 8,
    t1: Annotated[float, typer.Option(help="Weights of a row that may go for each dense column.")] = 1.5,
    block_rows: Annotated[int, typer.Option(help="Rows of a block.", min=1)] = 32,
    least_rows: Annotated[int, typer.Option(help="Blocks of at most so many rows are thrown away.", min=0)] = 16,
    number: Round = None,
    seed: Annotated[int, typer.Option(help="Of the clustering.")] = 0,
) -> None:
    """Make a ticket of dense blocks, which a kernel of ours multiplies, of one over single weights.

    \b
    Examples:
      earlybird ticket regroup runs/lottery --out blocks.safetensors
      earlybird ticket regroup runs/lottery --out blocks.safetensors --round 5 --parts 4
    """
    import torch

    from earlybird.tickets import structure

    ticket = _load(run, number)
    _check_out(out)
    regrouped = structure.regroup(
        ticket,
        parts=parts,
        t1=t1,
        block_rows=block_rows,
        least_rows=least_rows,
        generator=torch.Generator().manual_seed(seed),
    )
    about = regrouped.provenance
    found = about["blocks"]
    none = [name for name, blocks in found.items() if not blocks]
    if len(none) == len(found):
        raise InputError(
            f"no layer of {run} has a dense block: none keeps more than {least_rows} rows of one part",
            hint="lower --parts or --least-rows, or take an earlier --round, which keeps more",
        )
    regrouped.save(out)
    print(f"{sum(found.values())} blocks in {len(found) - len(none)} layers; in {len(none)} none was found")
    print(f"weights: {about['source_keep']:.2%} before, {about['weights_kept']:.2%} now")
    print(f"ticket: {out}   next: {_train(run, regrouped, out, run / 'rewind.safetensors')}")


def stretch(
    run: RunFolder,
    to: Annotated[str, typer.Option("--to", metavar="MODEL", help="Another member of the family.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.", show_default=False)],
    longer: Annotated[
        Longer, typer.Option("--stretch", help="Copies beside their originals, or the sequence again.")
    ] = Longer.interpolate,
    shorter: Annotated[
        Shorter, typer.Option("--squeeze", help="Leave out blocks in between, or the last ones.")
    ] = Shorter.interleaved,
    number: Round = None,
) -> None:
    """Make the ticket of another depth of the family, and the weights it starts from, without training.

    Writes ticket.safetensors and rewind.safetensors.

    \b
    Examples:
      earlybird ticket stretch runs/lottery-resnet20 --to resnet44 --out runs/resnet44-elastic
      earlybird ticket stretch runs/lottery-vgg19 --to vgg16 --out runs/vgg16-elastic --squeeze consecutive
    """
    import dataclasses

    from earlybird.files import read_tensors, write_tensors
    from earlybird.start import read_trained
    from earlybird.tickets.elastic import elastic

    ticket = _load(run, number)
    rewind = run / "rewind.safetensors"
    if not rewind.is_file():
        raise InputError(
            f"{run} has no rewind.safetensors, the weights that its rounds start from",
            needed="a run of --method iterative with --rewind weights",
        )
    blueprint, _ = read_trained(run)
    if out.is_file():
        raise InputError(f"{out} is a file", needed="a folder")
    for name in ("ticket.safetensors", "rewind.safetensors"):
        if (out / name).exists():
            raise InputError(f"{out / name} is there already", hint="choose another folder")
    target = dataclasses.replace(blueprint, model=to).build()
    try:
        new, weights = elastic(
            ticket, read_tensors(rewind)[0], target.state_dict(), stretch=longer.value, squeeze=shorter.value
        )
    except InputError as error:
        fitting = _members(blueprint)
        hint = f"{blueprint.model} becomes {', '.join(fitting)}" if fitting else error.hint
        raise InputError(error.found, needed=error.needed, hint=hint) from error
    files = out / "ticket.safetensors", out / "rewind.safetensors"
    new.save(files[0])
    write_tensors(files[1], weights, {})
    print(f"{blueprint.model} to {to}: {new.provenance['source_keep']:.2%} of the weights before, {new.keep:.2%} now")
    print(f"ticket: {out}   next: {_train(run, new, *files, model=to)}")


def _members(blueprint: Blueprint) -> list[str]:
    """Return the models of the zoo that a ticket of this one can become."""
    import dataclasses

    from earlybird.models import MODELS
    from earlybird.tickets.elastic import names_for

    family = MODELS[blueprint.model].path.partition(":")[0] if blueprint.in_zoo else None
    own = blueprint.build().state_dict()
    found = []
    for name, info in MODELS.items():
        if info.path.partition(":")[0] == family and name != blueprint.model:
            try:
                names_for(own, dataclasses.replace(blueprint, model=name).build().state_dict())
            except InputError:
                continue
            found.append(name)
    return found


def _load(path: Path, number: int | None = None) -> Ticket:
    """Return the ticket of a file, or of a run: the last one, or that of a round."""
    from earlybird.tickets.ticket import Ticket, round_files

    if path.is_file() and number is not None:
        raise InputError(f"{path} is one ticket", needed="the folder of a run, to choose a round of it")
    if path.is_dir():
        rounds = round_files(path)
        file = path / ("ticket.safetensors" if number is None else f"tickets/round-{number}.safetensors")
        if not file.is_file():
            raise InputError(
                f"no {file.relative_to(path)} in {path}",
                needed=f"a round from 1 to {max(rounds)}" if rounds and number else "a finished run with a ticket",
            )
        return Ticket.load(file)
    return Ticket.load(path)


def _batch(run: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return training images of a run as it normalised them, and their classes."""
    from earlybird.data.loader import Loader
    from earlybird.train.parts import read_data
    from earlybird.train.recipe import Recipe

    data = read_data(Recipe.from_toml(run / "recipe.toml"))
    loader = Loader(
        data.train_images,
        data.train_labels,
        batch_size=min(count, len(data.train_images)),
        mean=data.mean,
        std=data.std,
        seed=seed,
    )
    images, labels = next(iter(loader.epoch(0)))
    return images, labels


def _check_out(path: Path) -> None:
    """Refuse to replace anything but a ticket."""
    from earlybird.tickets.ticket import Ticket

    if path.is_dir():
        raise InputError(f"{path} is a folder", needed="a file name")
    if path.exists():
        try:
            Ticket.load(path)
        except InputError as error:
            raise InputError(f"{path} exists and is no ticket", hint="choose another name") from error


def _train(run: Path, made: Ticket, ticket: Path, start: Path, model: str | None = None) -> str:
    """Return the command that trains ticket ``made`` as the run trained, from the same step of the schedule on.

    Args:
        run: Its folder.
        made: What was made of the run's ticket.
        ticket: Its file.
        start: The weights to begin from, if there is such a file.
        model: Where it is another one than the run's.
    """
    from earlybird.step import Step
    from earlybird.train.recipe import Recipe

    recipe = run / "recipe.toml"
    words = [str(recipe)] if recipe.is_file() else ["--model", "MODEL"]
    if model is not None:
        words += ["--model", model]
    words += ["--method", "fixed_ticket", "--ticket", str(ticket)]
    if start.is_file():
        words += ["--start", str(start)]
        if steps := made.provenance["source"].get("rewind_to"):
            began = Recipe.from_toml(recipe).start_at if recipe.is_file() else None
            words += ["--start-at", str((began or Step()).later(steps))]
    return shlex.join(["earlybird", "train", *words])
