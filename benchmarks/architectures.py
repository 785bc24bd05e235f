"""Question: which architectures can be cut as they come, does the cut compute what was asked, and what does it save?

Every network is drawn to half of its free channels (`earlybird.draw`, with `example_inputs`) and cut
(`earlybird.shrink`). Its outputs, in eval mode, are compared with those of a copy in which what went is zero: the
filters, scales and shifts of the removed channels. Then it trains one step with AdamW, goes through ONNX and
onnxruntime, and is timed, dense and small in turns, forward and backward. torch-pruning (`BasePruner`, magnitude, half
of the channels, the outputs ignored) gets the same dense network. Parameters of random networks say what a cut does,
not what an accuracy becomes.

    python benchmarks/architectures.py                   # under six minutes; goes on where it was stopped
    python benchmarks/architectures.py --only resnet unet
    python benchmarks/architectures.py --again           # all rows anew
    python benchmarks/architectures.py --page            # write docs/architectures.md from the rows and stop
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import handwritten
import torch
from common import HERE, check_known, comparable, interleaved, machine, rows
from records import Row, record
from tables import origin
from torch import Tensor, nn

import earlybird as eb
from earlybird.calls import as_call, tensors_in
from earlybird.errors import EarlybirdError
from earlybird.tickets.layers import layer_of, width

NAME = "architectures"
PAGE = HERE.parent / "docs" / "architectures.md"
KEEP = 0.5
PATIENCE_S = 30
QUICK = ("perceptron", "audio", "generator", "unet")
NORMS = "but for norms over what is left"
HEAD = (
    "| network | parameters | after the cut | equal to masked | step dense, ms | step small, ms | ONNX differs by "
    "| torch-pruning |\n|" + " --- |" * 8
)
TEXT = """# Architectures

What `eb.draw(model, keep=0.5, example_inputs=x)` and `eb.shrink` make of networks that were not written for them, made
from the rows of `python benchmarks/architectures.py`. Weights are random and widths small; the topologies are the real
ones (transformers, torch-geometric, or written by hand where no package here has them).

{summary}

{table}

- *equal to masked*: the largest difference, relative to the largest output, from a copy of the dense network in which
  the filters, scales and shifts of what was removed are zero; in eval mode. Group, layer and response norms take their
  statistics over the channels that are left, which the masked copy does not.
- *step*: forward and backward, measured, the median of steps taken in turns.
- *torch-pruning*: the share of parameters that `BasePruner` leaves at `pruning_ratio=0.5` (it cuts residual sums, too),
  and how far its network is from the masked one, which it does not promise to equal. It was told of the outputs, and of
  nothing else that it can be told by hand (heads, dimensions of bare parameters, pruners of one's own layers).

## Left whole

Heads of attention are not channels (see [shrink](shrink.md)). What else stays as it was, with the first reason:

{whole}
"""
EQUAL = 1e-5
"""Largest difference, relative to the largest output, at which two networks count as equal."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    """Of `earlybird.draw`; batch-norm scales rank by default."""
    ignored: tuple[str, ...] = ()
    """The layers of the outputs, by name, which torch-pruning must be told; default: the last one."""


def hub(model: str, config: str | None = None, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a model of transformers, with random weights."""

    def build() -> nn.Module:
        import transformers

        named = config or model.removesuffix("ForImageClassification").removesuffix("Backbone") + "Config"
        return getattr(transformers, model)(getattr(transformers, named)(**settings))

    return build


def graph(model: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a model of torch-geometric."""

    def build() -> nn.Module:
        import torch_geometric.nn.models as models

        return getattr(models, model)(24, 48, num_layers=3, out_channels=7, **settings)

    return build


def images(side: int = 64, count: int = 2) -> Tensor:
    """Return random images."""
    return torch.randn(count, 3, side, side)


def nodes() -> tuple[Tensor, Tensor]:
    """Return the nodes and edges of a random graph."""
    return torch.randn(60, 24), torch.randint(60, (2, 300))


MAGNITUDE = {"score": "magnitude"}
GROUPED = {"score": "magnitude", "coupled": "group"}
THREE = {"hidden_sizes": [24, 48, 96], "depths": [1, 2, 1]}
FOUR = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1]}
SCALED = {"layer_scale_init_value": 0.5}

ARCHITECTURES: dict[str, Architecture] = {
    "resnet": Architecture(
        "ResNet, bottleneck", hub("ResNetForImageClassification", **FOUR, embedding_size=16, num_labels=10), images
    ),
    "resnet_basic": Architecture(
        "ResNet, basic",
        hub("ResNetForImageClassification", **FOUR, embedding_size=16, layer_type="basic", num_labels=10), images,
        {"coupled": "group"},
    ),
    "regnet": Architecture(
        "RegNet-Y", hub("RegNetForImageClassification", **FOUR, embedding_size=16, groups_width=8, num_labels=10),
        images,
    ),
    "convnext": Architecture(
        "ConvNeXt", hub("ConvNextForImageClassification", **FOUR, **SCALED, num_labels=10), images, MAGNITUDE
    ),
    "convnext_v2": Architecture(
        "ConvNeXt V2", hub("ConvNextV2ForImageClassification", **FOUR, num_labels=10), images, GROUPED
    ),
    "mobilenet_v1": Architecture(
        "MobileNet V1", hub("MobileNetV1ForImageClassification", depth_multiplier=0.25, num_labels=10), images
    ),
    "mobilenet_v2": Architecture(
        "MobileNet V2", hub("MobileNetV2ForImageClassification", depth_multiplier=0.35, num_labels=10), images
    ),
    "mobilenet_v3": Architecture("MobileNet V3 (by hand)", handwritten.MobileNetV3, images),
    "efficientnet": Architecture(
        "EfficientNet",
        hub("EfficientNetForImageClassification", width_coefficient=0.5, depth_coefficient=0.5, image_size=64,
            hidden_dim=640, num_labels=10), images,
    ),
    "bit": Architecture(
        "BiT (ResNet V2)", hub("BitForImageClassification", **FOUR, embedding_size=16, num_groups=4, num_labels=10),
        images, MAGNITUDE,
    ),
    "densenet": Architecture("DenseNet (by hand)", handwritten.DenseNet, partial(images, 32)),
    "shufflenet": Architecture(
        "ShuffleNet V2 (by hand)", handwritten.ShuffleNetV2, images, {"coupled": "group"}
    ),
    "hgnet_v2": Architecture(
        "HGNet V2",
        hub("HGNetV2ForImageClassification", embedding_size=16, stem_channels=[3, 16, 16],
            hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1],
            stage_in_channels=[16, 32, 64, 96], stage_mid_channels=[16, 16, 24, 32],
            stage_out_channels=[32, 64, 96, 128], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[3, 3, 3, 3],
            num_labels=10), images,
    ),
    "textnet": Architecture(
        "TextNet",
        hub("TextNetForImageClassification", stem_out_channels=16, hidden_sizes=[16, 16, 24, 32, 48],
            conv_layer_kernel_sizes=[[[3, 3], [3, 1]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3]]],
            conv_layer_strides=[[1, 2], [2, 1], [2], [2]], num_labels=10), images, {"coupled": "group"},
    ),
    "rt_detr_resnet": Architecture(
        "RT-DETR backbone", hub("RTDetrResNetBackbone", "RTDetrResNetConfig", **FOUR, embedding_size=16), images
    ),
    "poolformer": Architecture(
        "PoolFormer", hub("PoolFormerForImageClassification", **FOUR, **SCALED, num_labels=10), images, MAGNITUDE
    ),
    "focalnet": Architecture(
        "FocalNet",
        hub("FocalNetForImageClassification", image_size=64, embed_dim=16, hidden_sizes=[32, 64, 64], depths=[1, 1, 1],
            focal_levels=[2, 2, 2], focal_windows=[3, 3, 3], num_labels=10), images, MAGNITUDE,
    ),
    "van": Architecture("VAN (by hand)", handwritten.LargeKernelAttention, images, MAGNITUDE),
    "mixer": Architecture("MLP-Mixer (by hand)", handwritten.Mixer, partial(images, 32), MAGNITUDE),
    "segformer": Architecture(
        "SegFormer",
        hub("SegformerForSemanticSegmentation", "SegformerConfig", **{**FOUR, "hidden_sizes": [16, 32, 40, 64]},
            num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=32, num_labels=5), images, MAGNITUDE,
    ),
    "upernet": Architecture(
        "UPerNet on ConvNeXt", lambda: upernet(), images, MAGNITUDE,
        ("decode_head.classifier", "auxiliary_head.classifier"),
    ),
    "swin": Architecture(
        "Swin",
        hub("SwinForImageClassification", image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4],
            window_size=4, num_labels=10), images, MAGNITUDE,
    ),
    "pvt_v2": Architecture(
        "PVT V2",
        hub("PvtV2ForImageClassification", image_size=64, hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 5, 8], num_labels=10), images, MAGNITUDE,
    ),
    "levit": Architecture(
        "LeViT",
        hub("LevitForImageClassification", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=10,
            down_ops=[["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2], [""]]), images, MAGNITUDE,
    ),
    "cvt": Architecture(
        "CvT",
        hub("CvtForImageClassification", embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=10),
        images, MAGNITUDE,
    ),
    "swiftformer": Architecture(
        "SwiftFormer",
        hub("SwiftFormerForImageClassification", image_size=64, embed_dims=[16, 24, 32, 48], depths=[1, 1, 1, 1],
            num_labels=10), images, MAGNITUDE,
    ),
    "unet": Architecture("U-Net (by hand)", handwritten.UNet, partial(images, 32)),
    "generator": Architecture(
        "DCGAN generator (by hand)", handwritten.Generator, lambda: torch.randn(4, 32)
    ),
    "audio": Architecture("M5, 1-d audio (by hand)", handwritten.audio, lambda: torch.randn(2, 1, 4000)),
    "perceptron": Architecture(
        "multi-layer perceptron", handwritten.perceptron, lambda: torch.randn(8, 1, 28, 28), MAGNITUDE
    ),
    "lstm": Architecture("LSTM with a head", handwritten.Recurrent, lambda: torch.randn(4, 12, 24), MAGNITUDE),
    "gcn": Architecture("GCN (torch-geometric)", graph("GCN"), nodes, GROUPED),
    "graphsage": Architecture("GraphSAGE (torch-geometric)", graph("GraphSAGE"), nodes, GROUPED),
    "gin": Architecture("GIN (torch-geometric)", graph("GIN"), nodes, GROUPED),
}  # fmt: skip


def upernet() -> nn.Module:
    """Build UPerNet on a ConvNeXt."""
    import transformers

    backbone = transformers.ConvNextConfig(**FOUR, **SCALED, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=32, auxiliary_channels=16, auxiliary_in_channels=64, num_labels=5
    )
    return transformers.UperNetForSemanticSegmentation(config)


def lively(model: nn.Module) -> nn.Module:
    """Give every constant tensor (scales, shifts, running statistics) other values: nothing shall agree by accident."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.uniform_(0.5, 1.5)
    return model


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the outputs in eval mode."""
    call = as_call(inputs)
    with torch.no_grad():
        return [tensor for tensor in tensors_in(model.eval()(*call.args, **call.kwargs)) if tensor.is_floating_point()]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest output."""
    scale = max(float(tensor.abs().max()) for tensor in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / max(scale, 1e-12)


def zeroed(model: nn.Module, gone: dict[str, Tensor]) -> nn.Module:
    """Return a copy in which what writes the channels in ``gone`` (layer name to indices) is zero."""
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for name, indices in gone.items():
            layer = layer_of(modules[name])
            assert layer is not None
            for attribute, dim in layer.writes:
                parameter = getattr(modules[name], attribute, None)
                if parameter is not None and parameter.dim():
                    parameter.index_fill_(dim % parameter.dim(), indices, 0.0)
    return masked


def lost(model: nn.Module, change: eb.Change) -> dict[str, Tensor]:
    """Return the channels that layers of the dense ``model`` have lost or that have fallen silent: name to indices."""
    gone = {}
    for name, module in model.named_modules():
        if layer_of(module) is not None and (name in change.kept or name in change.silenced):
            mask = torch.zeros(width(module) or 0, dtype=torch.bool)
            if name in change.kept:
                mask = ~mask
                mask[change.kept[name]] = False
            mask[change.silenced.get(name, [])] = True
            gone[name] = mask.nonzero().flatten()
    return gone


def step(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Go forward and backward in training mode, and take a step where an optimizer is given."""
    call = as_call(inputs)
    model.train()
    model.zero_grad()
    found = tensors_in(model(*call.args, **call.kwargs))
    sum(tensor.square().mean() for tensor in found if tensor.is_floating_point()).backward()  # type: ignore[union-attr]
    if optimizer is not None:
        optimizer.step()


def to_onnx(model: nn.Module, inputs: Any) -> str:
    """Export, run in onnxruntime, and say how far its outputs are off; or what failed."""
    import onnxruntime

    call = as_call(inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model.eval(), call.args, kwargs=call.kwargs, dynamo=True, verbose=False)
        assert program is not None
        file = io.BytesIO()
        program.save(file)  # type: ignore[arg-type]
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        given = {
            one.name: value.numpy() for one, value in zip(session.get_inputs(), tensors_in([*call.args, call.kwargs]))
        }
        found = [torch.from_numpy(value) for value in session.run(None, given)]
    except Exception as error:  # exporter and runtime have dozens of their own
        return f"fails: {shortened(error)}"
    wanted = outputs(model, inputs)
    return f"{difference(found[: len(wanted)], wanted):.0e}"


def shortened(error: Exception) -> str:
    """Return the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r"\x1b\[\d+m", "", lines[0] if lines else "")
    return f"{type(error).__name__}: {line}"[:160].replace("|", "/")


def cut(model: nn.Module, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Draw, cut and compare; the model is the small one afterwards."""
    dense = copy.deepcopy(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    try:
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, inputs, optimizer)
        model.load_state_dict(dense.state_dict())
        model.zero_grad()
        ticket = eb.draw(model, KEEP, example_inputs=inputs, **options)
        change = eb.shrink(model, ticket, inputs, optimizer=optimizer)
    except EarlybirdError as error:
        return {"parameters": parameters, "error": shortened(error)}
    seconds = time.perf_counter() - start
    layers = dict(dense.named_modules())
    masked = zeroed(dense, lost(dense, change))
    for name, kept in change.kept.items():  # parameters that belong to no layer go with the channels they belong to
        if name not in dict(model.named_modules()):
            whole, left = masked.get_parameter(name), model.get_parameter(name)
            (dim,) = (d for d in range(whole.dim()) if whole.shape[d] != left.shape[d])
            gone = torch.ones(whole.shape[dim], dtype=torch.bool)
            gone[kept] = False
            whole.data.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    wanted = outputs(masked, inputs)
    off, effect = difference(outputs(model, inputs), wanted), difference(outputs(dense, inputs), wanted)
    step(model, inputs, optimizer)
    after = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters, "after": after, "difference": off, "effect": effect, "cut_seconds": seconds,
        "whole": {name: reason[:200] for name, reason in change.whole.items()},
        "silenced": sum(map(len, change.silenced.values())),
        "normed": any(isinstance(layers.get(name), (nn.GroupNorm, nn.LayerNorm)) for name in change.kept),
    }  # fmt: skip


@contextmanager
def patience() -> Iterator[None]:
    """Raise a `TimeoutError` after `PATIENCE_S` seconds: some searches for indices do not end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end within {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rival(model: nn.Module, inputs: Any, ignored: Sequence[str]) -> dict[str, Any]:
    """Prune ``model`` with torch-pruning in its documented way, and compare with the channels zeroed."""
    import torch_pruning as tp

    dense, call = copy.deepcopy(model.eval()), as_call(inputs)
    modules = dict(model.named_modules())
    last = [name for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))][
        -1:
    ]
    gone: dict[str, list[int]] = {}
    names = {module: name for name, module in modules.items()}
    try:
        with warnings.catch_warnings(), patience():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=1 - KEEP,
                ignored_layers=[modules[name] for name in ignored or last],
                forward_fn=lambda m, _: m(*call.args, **call.kwargs),
                output_transform=lambda output: [t for t in tensors_in(output) if t.grad_fn is not None],
            )  # fmt: skip
            for group in pruner.step(interactive=True):
                for dep, indices in group:
                    module = dep.target.module
                    if module in names and pruner.DG.is_out_channel_pruning_fn(dep.handler):
                        gone.setdefault(names[module], []).extend(indices)
                group.prune()
    except Exception as error:  # whatever it raises is the result
        return {"rival": f"fails: {shortened(error)}"}
    after = sum(parameter.numel() for parameter in model.parameters())
    try:
        found = outputs(model, inputs)
    except Exception as error:
        return {"rival": f"pruned network does not run: {shortened(error)}", "rival_after": after}
    try:
        wanted = outputs(zeroed(dense, {name: torch.tensor(sorted(set(lost))) for name, lost in gone.items()}), inputs)
        off = difference(found, wanted)
    except Exception:  # layers outside our table, or outputs of another shape: there is nothing to compare with
        return {"rival": "runs", "rival_after": after}
    return {"rival": "runs", "rival_after": after, "rival_difference": off}


def examine(name: str, options: argparse.Namespace) -> Row:
    """Return the row of one architecture."""
    one = ARCHITECTURES[name]
    head = machine()
    torch.manual_seed(0)
    dense = lively(one.build())
    inputs = one.inputs()
    small = copy.deepcopy(dense)
    row: Row = {"name": name, "title": one.title, **cut(small, inputs, one.options), **head}
    if "after" in row:
        if not options.no_times:
            actions = {"dense": partial(step, copy.deepcopy(dense), inputs), "small": partial(step, small, inputs)}
            times, others = interleaved(actions, options.rounds)
            row |= {f"{which}_seconds": statistics.median(taken) for which, taken in times.items()}
            row |= {"others": others, "rounds": options.rounds}
        if not options.no_onnx:
            row["onnx"] = to_onnx(small, inputs)
            if row["onnx"].startswith("fails") and to_onnx(dense, inputs).startswith("fails"):
                row["onnx"] = "fails, as does the dense network"
    if not options.no_rival:
        row |= rival(dense, inputs, one.ignored)
    return row


def newest_of(found: Sequence[Row]) -> list[Row]:
    """Return the last row of each architecture, in the order of the table."""
    last = {row["name"]: row for row in found}
    return [last[name] for name in ARCHITECTURES if name in last]


def line(row: Row) -> str:
    """Return one row as a line of the table."""
    if "error" in row:
        cells = [f"{row['parameters']:,}", "", f"no: {row['error']}", "", "", ""]
    else:
        off = row["difference"]
        times = [f"{1e3 * row[key]:.1f}" if key in row else "" for key in ("dense_seconds", "small_seconds")]
        cells = [
            f"{row['parameters']:,}", f"{row['after']:,} ({row['after'] / row['parameters']:.0%})",
            f"{'yes' if off <= EQUAL else NORMS if row['normed'] else '**no**'} ({off:.0e})", *times,
            row.get("onnx", ""),
        ]  # fmt: skip
    return "| " + " | ".join([row["title"], *cells, rival_cell(row)]) + " |"


def rival_cell(row: Row) -> str:
    """Say what torch-pruning made of it."""
    if row.get("rival") != "runs":
        return row.get("rival", "")
    if row["rival_after"] == row["parameters"]:
        return "cuts nothing"
    share = f"{row['rival_after'] / row['parameters']:.0%}"
    if "rival_difference" not in row:
        return f"{share}, not promised to be equal"
    return f"{share}, {'equal' if row['rival_difference'] <= EQUAL else 'not equal'} ({row['rival_difference']:.0e})"


def page(found: Sequence[Row]) -> str:
    """Return docs/architectures.md."""
    mine = newest_of(found)
    if not mine:
        return TEXT.format(summary="No rows yet.", table="", whole="")
    cut_ones = [row for row in mine if "after" in row]
    equal = sum(row["difference"] <= EQUAL for row in cut_ones)
    run = [row for row in mine if row.get("rival") == "runs" and row["rival_after"] < row["parameters"]]
    rivals = [row for row in run if row.get("rival_difference", 1.0) <= EQUAL]
    summary = (
        f"{len(cut_ones)} of {len(mine)} are cut, {equal} of them to what the masked network computes (within "
        f"{EQUAL:.0e}); torch-pruning cuts {len(run)}, {len(rivals)} of them to what the masked network computes."
        f" {origin(mine)}"
    )
    table = "\n".join([HEAD, *map(line, mine)])
    whole = [
        f"- {row['title']}: {len(row['whole'])} layers, among them `{name}`: {reason}"
        for row in cut_ones
        for name, reason in list(row["whole"].items())[:1]
    ]
    return TEXT.format(summary=summary, table=table, whole="\n".join(whole) or "- nothing").rstrip() + "\n"


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these alone, and anew")
    parser.add_argument("--again", action="store_true", help="do not go on where this revision was stopped: all anew")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed, dense and small in turns")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--quick", action="store_true", help="four small ones; nothing is recorded")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} from the rows and stop")
    options = parser.parse_args(words)
    check_known(parser, "architecture", options.only, ARCHITECTURES)
    if options.quick:
        options.only, options.rounds = options.only or list(QUICK), 1
    return options


def main() -> None:
    options = read()
    head = machine()
    if not options.page:
        known = [] if options.again or options.only else newest_of(rows(NAME))
        done = {row["name"] for row in known if row["revision"] == head["revision"] and comparable(row, head)}
        print(HEAD)
        for name in options.only or ARCHITECTURES:
            if name not in done:
                row = examine(name, options)
                print(line(row), flush=True)
                record(NAME, row, quick=options.quick)
    if not options.quick:
        PAGE.write_text(page(rows(NAME)), encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
