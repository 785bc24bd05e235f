"""One flat list of settings for a run, as TOML file, as flags and as a checked value.

The keys are the fields of `Recipe` and, beside them, the fields of the methods' dataclasses; methods are found by name
in `earlybird.methods`, so this file knows none. Precedence, last wins: defaults, defaults of the data set, preset of
the methods, TOML file, flags.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from earlybird.data.parts import split
from earlybird.errors import InputError, nearest
from earlybird.step import Step

Auto = Literal["auto"]


class Recipe(BaseModel):
    """Everything a run depends on; frozen. Build it with `from_toml` or `from_values`, which fill in the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # what is trained
    model: str = Field("small_cnn", min_length=1, description="zoo name or 'package.module:function'")
    width: float = Field(1.0, gt=0, le=64, description="factor on the channels of a zoo model")
    data: str = Field(
        "digits",
        min_length=1,
        description="digits, mnist, fashion-mnist, cifar10, a folder or an .npz; part: cifar10:0-4",
    )
    train_images: int | None = Field(
        None, ge=1, description="train on a random choice of so many images, classes in their shares; default: all"
    )
    image_size: int | None = Field(None, ge=4, le=4096, description="side to which images are resized, in pixels")
    crop: int = Field(0, ge=0, description="random crop after padding by this many pixels")
    pad: Literal["zeros", "reflect"] = Field("zeros", description="what crop pads with")
    flip: bool | Literal["alternating"] = Field(
        False, description="horizontal flip: random, or alternating (random in the first epoch, then turned each epoch)"
    )
    cutout: int = Field(0, ge=0, description="side of the square that is blanked out, in pixels")
    start: str | None = Field(
        None,
        description="weights to begin from: a .safetensors file, or a run's folder (of a run in rounds, those that "
        "they begin from; else its trained ones)",
    )
    start_at: Step | None = Field(
        None,
        description="with start: the step of the schedule at which its weights were; the run goes on from there",
    )
    fresh_head: bool = Field(False, description="with start: keep the model's own last layer, for other classes")
    # how long
    epochs: int | float = Field(10, gt=0, description="passes over the training images, search included")
    batch_size: int = Field(128, ge=1, description="images in a forward pass, over all processes")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one optimizer step")
    # optimizer and schedule
    optimizer: Literal["sgd", "adamw", "muon"] = Field(
        "sgd", description="sgd (with momentum), adamw, or muon for filters with sgd for all else"
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate; of muon's filters")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd, of muon's filters; beta1 of adamw")
    nesterov: bool = Field(True, description="Nesterov momentum (sgd, muon)")
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="L2 penalty (sgd), decoupled decay (adamw); muon: what an image takes off head and biases",
    )
    lr_head: float = Field(
        1e-3, gt=0, description="muon: peak rate of the last layer, for a loss summed over the batch"
    )
    lr_bias: float = Field(1e-3, gt=0, description="muon: peak rate of biases, for a loss summed over the batch")
    sgd_momentum: float = Field(0.85, ge=0, lt=1, description="muon: of head and biases")
    stem_until: Step | None = Field(
        None, description="muon: when the rate of the first layer's bias reaches 0; default: the end"
    )
    schedule: Literal["cosine", "step", "one_cycle", "constant"] = Field(
        "one_cycle", description="learning rate over the whole run; the draw does not disturb it"
    )
    lr_warmup: Step | None = Field(None, description="linear rise from 0; default 15 % of a one_cycle run, else 0it")
    milestones: tuple[Step, ...] = Field((), description="points at which schedule 'step' multiplies lr by lr_factor")
    lr_factor: float = Field(0.1, gt=0, lt=1, description="what a milestone multiplies lr by")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    clip_norm: float | None = Field(None, gt=0, description="gradients are scaled down to this norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an average of the weights, which is the result")
    test_time: Literal["none", "mirror", "mirror_shift"] = Field(
        "none", description="views of a test image whose logits are averaged, in the last evaluation"
    )
    # the methods
    dense: bool = Field(False, description="train the whole model, without any method")
    method: tuple[str, ...] = Field(
        ("early_bird",),
        min_length=1,
        description="one or several of 'earlybird methods'; NAME=VALUE sets its first key",
    )
    preset: str = Field(
        "default", description="named settings of the methods: default, published, or fast (searches on small images)"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="fields of the methods; flat in files and flags")
    # where and how it is computed
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order of images, augmentation and dropout")
    tune: bool = Field(True, description="choose what is 'auto' below by timed steps")
    exact: bool = Field(False, description="fp32, contiguous, eager, PyTorch's kernels; nothing is tuned")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="bf16 computes in bf16 on fp32 weights")
    channels_last: bool | Auto = Field("auto", description="memory order of images")
    compile: bool | Auto = Field("auto", description="torch.compile")
    kernels: bool | Auto = Field("auto", description="own kernels for what PyTorch is slow at on a CPU, if they gain")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: PyTorch's choice")
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a device")
    devices: int | None = Field(None, ge=1, description="processes, one a device; more than one needs torchrun")
    # what is written
    evaluate_every: Step = Field(Step.parse("1ep"), description="test accuracy and a line in metrics.jsonl")
    checkpoint_every: Step | None = Field(
        None, description="default: each epoch, but never more than 1 % of the time since the last one"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (extra 'tensorboard')")
    out: str | None = Field(None, description="run folder; default: a new one under runs/")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0; set nesterov = false")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, such as ['80ep', '120ep']")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones are for schedule 'step', not '{self.schedule}'")
        for name in _MUON if self.optimizer != "muon" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for optimizer 'muon', not '{self.optimizer}'")
        if self.start_at is not None and self.start is None:
            raise ValueError("start_at is for weights that were trained before: name them with start")
        if self.kernels is True and not self.tune:
            raise ValueError("kernels = true needs tune = true: which of them gain here is known by timing alone")
        if self.exact:
            for key, exact in (("precision", "fp32"), ("channels_last", False), ("compile", False), ("kernels", False)):
                if getattr(self, key) not in ("auto", exact):
                    raise ValueError(f"exact and {key} = {getattr(self, key)!r} contradict each other")
        return self

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe file; ``overrides`` (see `from_values`) win over it.

        Raises:
            InputError: No such file, not TOML, an unknown key, a wrong type or range.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"no recipe {path}", hint="check the path, or give --model and --data") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} cannot be read as TOML ({error})") from error
        return _build(values, overrides or {}, where=str(path))

    @classmethod
    def from_values(cls, values: Mapping[str, Any] | None = None) -> Recipe:
        """Make a recipe from keys and values.

        Args:
            values: Text is read the way flags are: ``'0.5'`` for a number, ``'0.3,0.5'`` for several, ``'none'`` for
                nothing, ``'true'``, ``'3ep'``. Other types are taken as they are. Keys that are missing get the
                default of the data set, or the general one.

        Raises:
            InputError: An unknown key (the nearest name is offered), a wrong type or range.
        """
        return _build({}, values or {}, where="recipe")

    def replace(self, **changes: Any) -> Recipe:
        """Return this recipe with some keys changed; everything else stays, but for settings of methods that go."""
        by_name = {key.name: key for key in keys()}
        methods = _from_toml(changes["method"], by_name["method"]) if "method" in changes else self.method
        stay = {name for name, key in by_name.items() if key.method in ("", *methods)}
        own = {name: value for name, value in self.values().items() if name in stay}
        return _build({**own, **changes}, {}, where="recipe")

    def with_absolute_paths(self) -> Recipe:
        """Return this recipe with whole paths in place of those of files and folders that are there from here."""
        given = {key.name: self.settings.get(key.name) for key in keys() if key.path and key.method in self.method}
        given["start"] = self.start
        paths = {name: Path(value).expanduser() for name, value in given.items() if value}
        found = {name: str(path.absolute()) for name, path in paths.items() if path.exists()}
        return self.replace(**found) if found else self

    def values(self) -> dict[str, Any]:
        """Return every key, flat, with its value; steps are `Step`."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "settings"}
        return {**own, **self.settings}

    def to_toml(self) -> str:
        """Return the recipe as a TOML document from which `from_toml` makes an equal one."""
        return "".join(f"{key} = {_as_toml(value)}\n" for key, value in self.values().items())

    def hash(self) -> str:
        """Return 16 hexadecimal digits that stand for all keys on which the trained weights depend."""
        values = {key: value for key, value in self.values().items() if key not in _NO_EFFECT}
        if self.dense:
            values = {key: value for key, value in values.items() if key not in {*self.settings, "method", "preset"}}
        text = json.dumps({key: _as_toml(value) for key, value in values.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run, at least one; the last epoch may be a part of one."""
        return max(round(self.epochs * steps_per_epoch), 1)

    def build_methods(self) -> dict[str, Any]:
        """Return the methods with their settings by name, in the order given; none for a dense run."""
        names = () if self.dense else self.method
        return {name: method_class(name)(**_own_settings(name, self.settings)) for name in names}

    def _label(self, method: str) -> str:
        keep = _own_settings(method, self.settings).get("keep")
        if keep is None:
            return method
        return "keep" + ("-".join(f"{ratio:g}" for ratio in keep) if isinstance(keep, tuple) else str(keep))

    @property
    def name(self) -> str:
        """A short name for the run folder, such as ``vgg16-cifar10-keep0.5-seed0``; always a plain file name."""
        what = "dense" if self.dense else "-".join(map(self._label, self.method))
        model, data = _word(self.model.rpartition(":")[2], "model"), _word(Path(self.data).stem, "data")
        return "-".join([model, data, what, f"seed{self.seed}"])


_MUON = ("lr_head", "lr_bias", "sgd_momentum", "stem_until")
_NO_EFFECT = frozenset({"out", "tensorboard", "checkpoint_every", "evaluate_every", "test_time"})

# What differs from the general defaults, by data set.
_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {"model": "small_cnn", "epochs": 30, "batch_size": 64, "lr": 0.05},
    "mnist": {"model": "small_cnn", "epochs": 5, "crop": 2},
    "fashion-mnist": {"model": "small_cnn", "epochs": 10, "flip": True},
    "cifar10": {"model": "resnet20", "epochs": 20, "crop": 4, "flip": True, "label_smoothing": 0.1},
}
_BY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2e-3, "weight_decay": 0.01, "nesterov": False},
    "muon": {"lr": 0.05, "momentum": 0.6, "weight_decay": 2e-6},
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: As in the file; the flag is the same with dashes.
        type: Type annotation.
        default: General default, before the data set's.
        help: One line.
        method: Name of the method to which the key belongs; '' for a key of every run.
        path: Whether it names a file or a folder.
    """

    name: str
    type: Any
    default: Any
    help: str
    method: str
    path: bool = False


@functools.cache
def keys() -> tuple[Key, ...]:
    """Return all keys of recipes, in the order of the file; no two methods share the name of one."""
    from earlybird.methods import METHODS

    own = [
        Key(name, _OWN[name], field.get_default(call_default_factory=True), field.description or "", "")
        for name, field in Recipe.model_fields.items()
        if name != "settings"
    ]
    return (*own, *(key for method in METHODS for key in _keys_of(method)))


def _keys_of(method: str) -> list[Key]:
    cls = method_class(method)
    hints = typing.get_type_hints(cls)
    return [
        Key(
            field.name,
            hints[field.name],
            _default(field),
            field.metadata.get("help", ""),
            method,
            field.metadata.get("path", False),
        )
        for field in dataclasses.fields(cls)
    ]


def _own_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: settings[field.name] for field in dataclasses.fields(method_class(method))}


def method_class(name: str) -> Any:
    """Return the dataclass of the method called ``name``.

    Raises:
        InputError: There is no such method.
    """
    from earlybird.methods import METHODS

    if name not in METHODS:
        known = ", ".join(METHODS)
        raise InputError(f"unknown method '{name}'", needed=f"one of {known}", hint=nearest(name, METHODS))
    module, _, attribute = METHODS[name].path.partition(":")
    return getattr(importlib.import_module(module), attribute)


_OWN = typing.get_type_hints(Recipe, include_extras=True)


def _build(values: Mapping[str, Any], flags: Mapping[str, Any], *, where: str) -> Recipe:
    from earlybird.methods import PRESET_METHODS

    by_name = {key.name: key for key in keys()}
    values, flags = (_spelled_out(part, by_name["method"], where) for part in (values, flags))
    given = {**values, **flags}
    typed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in by_name:
            raise InputError(f"{where}: unknown key '{name}'", hint=nearest(name, by_name))
        key = by_name[name]
        typed[name] = _check(where, key, _from_text(value, key) if name in flags else _from_toml(value, key))

    if "method" not in typed and typed.get("preset") in PRESET_METHODS:
        typed["method"] = PRESET_METHODS[typed["preset"]]
    methods: tuple[str, ...] = typed.get("method", by_name["method"].default)
    classes = {name: method_class(name) for name in methods}
    if len(classes) < len(methods):
        raise InputError(f"{where}: method = {', '.join(methods)} names one twice")
    told = [name for name in flags if by_name[name].method or name == "method"]
    if told and typed.get("dense") and "dense" not in flags:  # the file's, which a flag would not get past
        raise InputError(
            f"{where}: dense leaves no method to which '{told[0]}' could belong",
            hint=f"add --no-dense, or leave {told[0]} out",
        )
    if typed.get("keep") in (1, (1,), (1.0,)):
        # Keeping everything is the run without a ticket; no search is needed to find that out.
        owner = by_name["keep"].method
        others = tuple(name for name in methods if name != owner)
        if others:
            methods = typed["method"] = others
            typed = {name: value for name, value in typed.items() if by_name[name].method != owner}
        else:
            del typed["keep"]
            typed["dense"] = True
    for name in list(typed):
        owner = by_name[name].method
        if owner and owner not in methods:
            if "method" in flags and name not in flags:
                del typed[name]  # a flag has put other methods in place of the file's
                continue
            raise InputError(
                f"{where}: '{name}' belongs to the method {owner}, and the run has {', '.join(methods)}",
                hint=f"set method = '{','.join((owner, *methods))}'",
            )

    data = typed.get("data", Recipe.model_fields["data"].default)
    filled = {**_of_data(data), **_BY_OPTIMIZER.get(typed.get("optimizer", ""), {}), **typed}
    classes = {name: classes[name] for name in methods}
    preset = _preset(classes.values(), filled.get("preset", "default"))
    settings = {
        # Presets come in under whatever was said explicitly.
        name: filled[name] if name in filled else _check(where, key, preset[name]) if name in preset else key.default
        for name, key in by_name.items()
        if key.method in classes
    }
    try:
        built = {name: cls(**_own_settings(name, settings)) for name, cls in classes.items()}
        if not filled.get("dense"):
            _check_rounds(built)
        return Recipe(**{k: v for k, v in filled.items() if not by_name[k].method}, settings=settings)
    except ValidationError as error:
        raise InputError(f"{where}: {_say(error)}") from error


def _check_rounds(methods: Mapping[str, Any]) -> None:
    """Refuse methods that go by the steps of the whole run beside one that trains several times in it."""
    repeating = next((name for name, method in methods.items() if getattr(method, "rounds", 0)), None)
    for name, method in methods.items() if repeating else ():
        values = [getattr(method, field.name) for field in dataclasses.fields(method)]
        steps = [step for value in values for step in _flat(value) if isinstance(step, Step) and step != Step()]
        asks = "clock" in inspect.signature(method.attach).parameters  # where in one training it is
        # of several that draw a ticket, the second one is refused when it is attached
        if name != repeating and steps and not asks and not hasattr(method, "KEEP_KEY"):
            raise InputError(
                f"{name} changes with the steps of the run, and {repeating} trains several times in it",
                needed="methods that do the same in each training",
                hint=f"leave {name} out",
            )


def _of_data(data: str) -> dict[str, Any]:
    """Return what differs from the general defaults; things that are looked for stay where they are in an image."""
    base, parts = split(data)
    return {k: v for k, v in _BY_DATA.get(base, {}).items() if not (parts.boxes and k in ("crop", "flip"))}


def _spelled_out(given: Mapping[str, Any], method: Key, where: str) -> Mapping[str, Any]:
    """Read ``method = 'batch_dropping=0.5'`` as that method with its first setting, whatever that is called."""
    named = _from_toml(given.get("method"), method)
    if not isinstance(named, tuple) or not any(isinstance(name, str) and "=" in name for name in named):
        return given
    found: dict[str, Any] = dict(given)
    names = []
    for entry in named:
        name, has_value, value = (part.strip() for part in entry.partition("="))
        names.append(name)
        if not has_value:
            continue
        first = _keys_of(name)[0]
        if first.name in given:
            raise InputError(f"{where}: both '{entry}' and {first.name} = {given[first.name]!r}", needed="one of them")
        found[first.name] = _from_text(value, first)
    return {**found, "method": tuple(names)}


def _check(where: str, key: Key, value: Any) -> Any:
    try:
        checked = _adapter(key, ranged=not key.method).validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {key.name} = {value!r}", needed=_say(error)) from error
    if any(isinstance(number, float) and not math.isfinite(number) for number in _flat(checked)):
        raise InputError(f"{where}: {key.name} = {value!r}", needed="a finite number")
    return checked


def _from_toml(value: Any, key: Key) -> Any:
    if value == "none" and type(None) in typing.get_args(key.type):
        return None
    if key.type == tuple[str, ...]:  # 'a,b' stands for several, in a list as well
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
            return tuple(name.strip() for part in parts for name in part.split(","))
    return tuple(value) if isinstance(value, list) else value


def _from_text(value: Any, key: Key) -> Any:
    """Read what was typed as a flag: as text if the key takes it so, else as a TOML value, else as a list."""
    value = _from_toml(value, key)
    if not isinstance(value, str):
        return value
    attempts: list[Callable[[], Any]] = [
        lambda: value,
        lambda: tomllib.loads(f"v = {value}")["v"],
        lambda: float(value),  # .5, which TOML does not have
        lambda: tuple(tomllib.loads(f"v = [{value}]")["v"]),
        lambda: tuple(part.strip() for part in value.split(",")),
    ]
    for attempt in attempts:
        try:
            read = _from_toml(attempt(), key)
            _adapter(key).validate_python(read, strict=True)
            return read
        except ValueError:  # of TOML, of float, of the key's type
            continue
    return value


@functools.cache
def _adapter(key: Key, *, ranged: bool = False) -> TypeAdapter[Any]:
    """Return the check of a key's type, or of its type and range."""
    hint: Any = typing.Annotated[key.type, Recipe.model_fields[key.name]] if ranged else key.type
    return TypeAdapter(hint)


def _preset(classes: Iterable[Any], name: str) -> dict[str, Any]:
    """Return the settings of every method that has a preset of this name."""
    presets: dict[str, dict[str, Any]] = {"default": {}}
    for cls in classes:
        for known, settings in getattr(cls, "PRESETS", {}).items():
            presets[known] = {**presets.get(known, {}), **settings}
    if name not in presets:
        listed = ", ".join(presets)
        raise InputError(f"unknown preset '{name}'", needed=f"one of {listed}", hint=nearest(name, presets))
    return presets[name]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _say(error: ValidationError) -> str:
    """Say in one line what pydantic found; branches of a union repeat themselves."""
    parts = []
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        parts.append(message[:1].lower() + message[1:])
    return ", or ".join(dict.fromkeys(parts)).removeprefix("input should be ")


def _word(text: str, otherwise: str) -> str:
    """Return ``text`` without what does not belong in the name of a folder."""
    return re.sub(r"[^\w.+=-]+", "-", text)[:60].strip("-.") or otherwise


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _as_toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_as_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON lets it stand, TOML does not
