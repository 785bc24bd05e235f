"""The command line: ``earlybird train | compare | verify | transfer | resume | report | export | bill | ...``.

Every key of a recipe is also a flag of ``train``, ``compare``, ``transfer`` and ``bill``; the flags are made from the
one definition, `earlybird.train.recipe`. That definition needs torch, so it is loaded only when one of these is typed,
and ``earlybird --help`` answers at once.

Exit codes: 0 done, 2 wrong input, 3 interrupted and resumable, 130 interrupted outside training (nothing to resume),
1 our own failure (with a traceback).
"""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from earlybird.cli_ticket import application as tickets
from earlybird.errors import EarlybirdError, InputError, nearest

if TYPE_CHECKING:
    from earlybird.train.recipe import Key, Recipe
    from earlybird.train.result import Result

# Base of every parsing error, whether this typer brings its own click or uses the separate package
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar; only the result.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", help="Recipe (TOML); flags win over it.", show_default=False)
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Words after ``earlybird``; those of the process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(_application(next((word for word in words if not word.startswith("-")), "")))
    try:
        code = command.main(args=words, prog_name="earlybird", standalone_mode=False)
    except EarlybirdError as error:
        return _complain(str(error), error.exit_code)
    except UsageError as error:
        return _complain(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _SIGINT
    if code == _SIGINT:
        return _complain("interrupted; type the same command again", _SIGINT)
    return code if isinstance(code, int) else 0


_SIGINT = 130  # what typer returns for Ctrl-C


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Exception) -> str:
    """Turn a parsing error into found; needed; hint on one line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "earlybird"
    near = getattr(error, "possibilities", None)
    unknown = getattr(error, "option_name", None)
    if near is not None and unknown:
        found = f"no flag {unknown}"
        guess = nearest(unknown, near)
        guess = f"; {guess}" if guess else ""
    else:
        found, guess = error.format_message().rstrip("."), ""  # type: ignore[attr-defined]
    return f"{found}{guess}; '{command} --help' lists what there is"


def _application(command: str) -> typer.Typer:
    application = typer.Typer(
        name="earlybird",
        help="Train the small network from the first epochs on, and prove with a bill what it saved.",
        epilog="Start with 'earlybird train'; 'earlybird train --help' lists all keys.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # sixty flags read better as a plain list, and it answers sooner
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_options)
    commands: list[Callable[..., None]] = [
        train, compare, verify, transfer, resume, report, export, bill, methods, data,
    ]  # fmt: skip
    for function in commands:
        if function in _OF_A_RECIPE and function.__name__ == command:
            function = _with_recipe_keys(function, without=_OF_A_RECIPE[function])
        application.command()(function)
    application.add_typer(tickets())
    return application


def _print_version(asked: bool) -> None:
    if asked:
        from earlybird import __version__

        print(f"earlybird {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def train(recipe: RecipeFile = None, quiet: Quiet = False, **keys: Any) -> None:
    """Train a network as an early ticket, or dense.

    The whole network trains only until the ticket is drawn; then model and optimizer shrink and the small one goes on.

    \b
    Examples:
      earlybird train                                     # the bundled digits
      earlybird train --data digits --dense               # the baseline
      earlybird train --model vgg16 --data cifar10 --keep 0.5 --epochs 20
      earlybird train recipes/resnet20-cifar10.toml --keep 0.7
      earlybird train --model mypackage.nets:build --data ./my_images
    """
    from earlybird.train.run import train as train_run

    settings = _recipe(recipe, keys)
    _print_result(train_run(settings, quiet=quiet))


def _print_result(result: Result) -> None:
    from earlybird.objective import measure

    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun, one process speaks for all
    print(f"\n{result.bill}\n")
    ticket = "" if result.drawn_at is None else f", ticket drawn at step {result.drawn_at:,} of {result.steps:,}"
    print(f"{measure(result.judged_by)} {result.accuracy:.2%} after {result.epochs} epochs{ticket}")
    print(f"run: {result.folder}   next: earlybird report {shlex.quote(str(result.folder))}")


def bill(recipe: RecipeFile = None, **keys: Any) -> None:
    """Print what a run would count, and its modelled energy, without running it.

    Nothing is measured: it says what a paper's table would say. The ticket keeps the same share of each layer and is
    drawn at the deadline; shares that a method steers are at their targets.

    \b
    Examples:
      earlybird bill --model resnet74 --data cifar10 --epochs 160 --method batch_dropping=0.5
      earlybird bill --model vgg16 --data cifar10 --epochs 160 --preset published --keep 0.3 --deadline 10ep
    """
    from earlybird.forecast import forecast

    print(forecast(_recipe(recipe, keys)))


def _recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    from earlybird.train.recipe import Recipe

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    return Recipe.from_values(given) if path is None else Recipe.from_toml(path, given)


def _with_recipe_keys(function: Callable[..., None], *, without: Container[str]) -> Callable[..., None]:
    """Return ``function`` with one flag for every key of a recipe in place of its ``**keys``."""
    from earlybird.train.recipe import keys

    own = [
        item
        for item in inspect.signature(function, eval_str=True).parameters.values()
        if item.kind is not item.VAR_KEYWORD
    ]
    flags = [_flag(key) for key in keys() if key.name not in without]

    def command(**values: Any) -> None:
        function(**values)

    parameters = [*own, *flags]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _flag(key: Key) -> inspect.Parameter:
    """Make the flag of one key; what it takes is read and checked by the recipe, as in a file."""
    name = "--" + key.name.replace("_", "-")
    default = "" if key.default in (None, "", ()) else f"  [{_shown(key.default)}]"
    kind: Any
    if key.type == tuple[str, ...]:  # may be given several times
        kind, metavar = list[str], "NAME"
    elif key.type is bool:
        name, kind, metavar = f"{name}/--no-{name[2:]}", bool, None
        default = ""
    else:
        kind, metavar = str, _metavar(key.type)
    option = typer.Option(name, metavar=metavar, help=key.help + default, show_default=False)
    return inspect.Parameter(
        key.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(hint: Any) -> str:
    """Say in one word what a key takes: ``NUMBER``, ``STEP``, ``sgd|adamw``."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        found = [part for part in parts if part is not type(None) and not (part is int and float in parts)]
        return "|".join(dict.fromkeys(_metavar(part) for part in found))
    if origin is tuple:
        return f"{_metavar(parts[0])},..."
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false"}.get(
        hint, getattr(hint, "__name__", "TEXT").upper()
    )


_CONTENDERS = "dense,ticket"


def compare(
    recipe: RecipeFile = None,
    seeds: Annotated[int, typer.Option(help="Runs of each contender; their seeds are 0, 1, 2, ...", min=1)] = 3,
    contenders: Annotated[
        str,
        typer.Option(
            help="Of dense, ticket, dense-equal-time, small-dense, ticket-shuffled, ticket-reinitialised; "
            "dense always runs."
        ),
    ] = _CONTENDERS,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Instead of contenders: methods to compare, each at every share of --keep. imp, lr_rewinding, "
            "fine_tuning, snip, grasp, synflow, random, set, rigl, early_bird, ...",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Runs at a time. More than one disturb each other: then no time is judged.", min=1)
    ] = 1,
    quiet: Quiet = False,
    **keys: Any,
) -> None:
    """Train dense and ticket in turn, or methods at several shares of the network, and say who won.

    All train on the same seeds, each run in a process of its own. Type the same command again to go on after a stop.
    With --methods, --keep lists the shares for all of them, and the report draws accuracy against what stays and costs.

    \b
    Examples:
      earlybird compare --data digits --seeds 1
      earlybird compare recipes/resnet20-cifar10.toml --out runs/resnet20
      earlybird compare --data digits --contenders dense-equal-time,small-dense   # would less do as well?
      earlybird compare --data digits --methods imp,snip,early_bird --keep 0.5,0.2,0.05
      earlybird compare --model resnet20 --data cifar10 --methods imp,rigl --keep 0.1 --jobs 4
    """
    from earlybird.train.compare import compare as compare_runs
    from earlybird.train.compare import comparison_folder, describe

    asked = _names(methods or "")
    if methods is not None and not asked:
        raise InputError("--methods names no method", needed="names such as imp,early_bird")
    if asked and contenders != _CONTENDERS:
        raise InputError("both --contenders and --methods", needed="one of them: checks on a ticket, or methods")
    shares = _shares(keys.pop("keep", None)) if asked else ()
    settings = _recipe_for(recipe, asked, keys) if asked else _recipe(recipe, keys)
    out = comparison_folder(settings, asked)
    comparison = compare_runs(
        settings, out, seeds=range(seeds), contenders=_names(contenders), methods=asked, keeps=shares, jobs=jobs,
        quiet=quiet,
    )  # fmt: skip
    bill = "" if asked else f"{_bill_against_dense(out, comparison)}\n\n"
    print(f"\n{bill}{describe(comparison)}\n")
    print(f"runs: {out}   next: earlybird report {shlex.quote(str(out))}")


def transfer(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs of iterative pruning that began from pre-trained weights.", show_default=False
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(metavar="TASK,...", help="Data as for --data of train, or recipe files.", show_default=False),
    ],
    rounds: Annotated[str, typer.Option(metavar="NUMBER,...", help="Rounds to try; default: all.")] = "",
    controls: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of random_init, shuffled, one_shot, reversed; or none.")
    ] = "random_init,shuffled,one_shot",
    seeds: Annotated[int, typer.Option(help="Runs of each contender; their seeds are 0, 1, 2, ...", min=1)] = 3,
    deviations: Annotated[
        float, typer.Option(help="Standard deviations of the full weights that a matching ticket may lose.", min=0)
    ] = 1.0,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe (TOML) of what the tasks have in common; flags win over it.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    quiet: Quiet = False,
    **keys: Any,
) -> None:
    """Try tickets of pre-trained weights on other tasks: which sparsity still matches the full weights?

    Network and weights are those of the runs; every task has a fresh head. Data with masks or boxes get the head that
    finds them. Type the same command again to go on after a stop.

    \b
    Examples:
      earlybird train --model resnet20 --data cifar10:0-4 --dense --out runs/pretrained
      earlybird train --model resnet20 --data cifar10:0-4 --start runs/pretrained --method iterative --keep-weights 0.05
          --leave-dense first,last --epochs 1 --lr 0.01 --out runs/lottery
      earlybird transfer runs/lottery --tasks cifar10:5-9,fashion-mnist:rgb --rounds 4,8,12 --epochs 5
      earlybird transfer runs/lottery --tasks ./my_cracks,mnist:boxes+rgb --seeds 5 --controls shuffled,reversed
    """
    from earlybird.train.transfer import describe
    from earlybird.train.transfer import transfer as transfer_runs

    def of(task: str) -> Recipe:
        if task.endswith(".toml"):
            return _recipe(Path(task), keys)
        return _recipe(recipe, {**keys, "data": task})

    names = _names(tasks)
    out = Path(keys.get("out") or f"runs/transfer-{sources[0].name}")
    found = transfer_runs(
        sources,
        {Path(name).stem if name.endswith(".toml") else name: of(name) for name in names},
        out,
        rounds=_whole_numbers("--rounds", rounds),
        controls=() if controls == "none" else _names(controls),
        seeds=range(seeds),
        deviations=deviations,
        jobs=jobs,
        quiet=quiet,
    )
    print(f"\n{describe(found)}\n")
    print(f"runs: {out}   next: earlybird report {shlex.quote(str(out / found['tasks'][0]['folder']))}")


_OF_A_RECIPE: dict[Callable[..., None], set[str]] = {
    train: set(),
    compare: {"seed", "dense"},
    transfer: {"seed", "dense", "data", "model", "width", "start", "fresh_head", "ticket", "control", "fixed_weights"},
    bill: set(),
}
"""Commands with the keys of a recipe as flags, and those that they have not."""


def _whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, _names(text)))
    except ValueError as error:
        raise InputError(f"{flag} {text}", needed="whole numbers, such as 4,8,12") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shares(text: str | None) -> tuple[float, ...]:
    """Read the shares of a comparison of methods."""
    try:
        return tuple(map(float, _names(text or "")))
    except ValueError as error:
        raise InputError(f"--keep {text}", needed="shares, such as 0.5,0.2,0.05") from error


def _recipe_for(path: Path | None, asked: Sequence[str], flags: dict[str, Any]) -> Recipe:
    """Return a recipe that takes the settings of all methods asked for, and those that the recipe has beside them."""
    from earlybird.train.contenders import resolve

    told = flags.get("method") or (_recipe(path, {}).method if path is not None else [])
    resolved = [resolve(name)[0] for name in asked if name != "dense"]
    return _recipe(path, {**flags, "method": list(dict.fromkeys([*resolved, *told]))})


def verify(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run that drew a ticket; or a ticket file, with --recipe.")
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of a ticket file: its model, data, and the seed of its first weights.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each contender; their seeds are 0, 1, 2, ...", min=1)] = 3,
    lr: Annotated[
        str, typer.Option(metavar="NUMBER,...", help="Learning rates; default: the run's own, and a tenth of it.")
    ] = "",
    number: Annotated[
        int | None, typer.Option("--round", metavar="K", help="Ticket after K prunings; default: the last.", min=1)
    ] = None,
    rounds: Annotated[bool, typer.Option("--rounds", help="The tickets of all rounds.")] = False,
    tolerance: Annotated[
        float, typer.Option(help="Points of accuracy by which a ticket may stay behind and be as accurate.")
    ] = 0.5,
    top: Annotated[float, typer.Option(help="Share of the largest weights whose places are followed.")] = 0.2,
    equal_budget: Annotated[
        bool,
        typer.Option(help="Also train dense for the ticket's whole bill, where that is more than one training."),
    ] = True,
    jobs: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: runs/verify-RUN.")] = None,
    quiet: Quiet = False,
) -> None:
    """Check whether a ticket wins: against dense, its controls, new weights, and pruning with retraining.

    At each learning rate, with each seed. Type the same command again to go on after a stop.

    \b
    Examples:
      earlybird verify runs/small_cnn-digits-iterative-seed0
      earlybird verify runs/imp --rounds --lr 0.01,0.1 --jobs 2
      earlybird verify ticket.safetensors --recipe recipe.toml --seeds 5
    """
    from earlybird.train.recipe import Recipe
    from earlybird.train.verification import describe, read_source, verification_folder
    from earlybird.train.verification import verify as verify_ticket

    if number is not None and rounds:
        raise InputError("both --round and --rounds", needed="one of them")
    asked = "all" if rounds else "last" if number is None else number
    try:
        rates = tuple(map(float, _names(lr)))
    except ValueError as error:
        raise InputError(f"--lr {lr}", needed="learning rates, such as 0.01,0.1") from error
    found = read_source(source, None if recipe is None else Recipe.from_toml(recipe), rounds=asked)
    out = verification_folder(found) if out is None else out
    verification = verify_ticket(
        found, out, seeds=range(seeds), rates=rates, tolerance=tolerance, share=top, equal_budget=equal_budget,
        jobs=jobs, quiet=quiet,
    )  # fmt: skip
    print(f"\n{describe(verification)}\n")
    print(f"runs: {out}   next: earlybird report {out}")


def _bill_against_dense(out: Path, comparison: Mapping[str, Any]) -> str:
    """Return the bill of the first contender that is not dense, against the dense run of its seed."""
    from earlybird.cost.bill import Bill
    from earlybird.files import read_json

    other = next(row for row in comparison["runs"] if row["contender"] != "dense")
    dense = next(row for row in comparison["runs"] if row["contender"] == "dense" and row["seed"] == other["seed"])
    bill, reference = (Bill.from_json(read_json(out / row["folder"] / "bill.json")) for row in (other, dense))
    return str(bill.against(reference)).replace("Training bill", f"Training bill of {other['folder']}", 1)


def resume(run: RunFolder, quiet: Quiet = False) -> None:
    """Go on with a run after any stop.

    On a CPU the final weights are those of an undisturbed run, to the last bit.

    \b
    Example:
      earlybird resume runs/vgg16-cifar10-keep0.5-seed0
    """
    from earlybird.train.run import resume as resume_run

    _print_result(resume_run(run, quiet=quiet))


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or of a comparison.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="HTML file; default: report.html in the folder, or here if there are several."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs.

    It shows bill, accuracy against time, mask distances, channels, tuning and environment.

    \b
    Examples:
      earlybird report runs/compare-digits
      earlybird report runs/dense runs/ticket --out both.html
    """
    from earlybird.report import write

    print(f"report: {write(runs, out or (runs[0] if len(runs) == 1 else Path()) / 'report.html')}")


def export(
    run: RunFolder,
    onnx: Annotated[
        Path | None, typer.Option(help="Write ONNX, checked against PyTorch; needs the extra 'onnx'.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Write weights and ticket as one safetensors file for earlybird.export.load.")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Time inference here, in turns with the dense network. Writes nothing.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images in a batch that is timed.")] = 64,
    threads: Annotated[
        int | None, typer.Option(help="Threads for what is timed.", show_default="PyTorch's choice")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE:FUNCTION", help="Confirm code of your own that an exported file names."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no export.")] = False,
) -> None:
    """Take the trained small network out of a run, or time it.

    \b
    Examples:
      earlybird export runs/vgg16-cifar10-keep0.5-seed0 --onnx model.onnx
      earlybird export runs/vgg16-cifar10-keep0.5-seed0 --weights model.safetensors
      earlybird export runs/vgg16-cifar10-keep0.5-seed0 --time --batch 1 --threads 1
    """
    from earlybird import export as exporting

    if onnx is None and weights is None and not time:
        raise InputError(
            "nothing to export", hint="add --onnx model.onnx or --weights model.safetensors, or --time to measure it"
        )
    for sentence in exporting.caveats(run):
        print(f"note: {sentence}")
    if weights is not None:
        print(f"weights: {exporting.export_weights(run, weights, model=model, force=force)}")
    if onnx is not None:
        path, difference = exporting.export_onnx(run, onnx, model=model, force=force)
        print(f"onnx: {path} (largest difference to PyTorch {difference:.1e})")
    if time:
        from earlybird.inference import describe, time_run

        print(describe(time_run(run, batch=batch, threads=threads, model=model)))


def methods(
    measure: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Time training steps of this model here, whole and shrunk; vgg16, say."),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the channels that stay in what is timed.")] = 0.5,
) -> None:
    """List the methods, what they save and where not.

    \b
    Examples:
      earlybird methods
      earlybird methods --measure resnet20 --keep 0.3
    """
    from earlybird.methods import METHODS

    for info in METHODS.values():
        _entry(info.name, f"Saves {info.saves}.", f"Does not pay in {info.limits}.", f"{info.citation}. {info.link}")
    if measure is None:
        print("\nOn this device: 'earlybird methods --measure resnet20' times what a cut saves here.")
    else:
        from earlybird.gain import measure as measure_gain

        print(f"\nOn this device: {measure_gain(measure, keep=keep)}")


def data() -> None:
    """List the data sets that --data knows by name."""
    from earlybird.data.catalogue import CATALOGUE

    for info in CATALOGUE.values():
        amount = f"{info.train_images:,} training and {info.test_images:,} test images, {info.classes} classes"
        size = f"; download {info.bytes / 2**20:.0f} MiB" if info.bytes else ""
        source = f"{info.citation}. {info.link}"
        _entry(info.name, info.description, amount + size, source, f"Licence: {info.licence}")
    print(
        "\nFiles are looked for in the folder EARLYBIRD_DATA, then in the user's cache, then downloaded.\n"
        "--data also takes a folder of images, one subfolder per class (train/ and test/ inside it are kept apart),\n"
        "and an .npz file."
    )


def _entry(name: str, *texts: str) -> None:
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    print(name)
    for text in texts:
        print(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    "))
