"""Progressive precision: few bits first, and more whenever the loss has stopped falling (PFQ).

The temporal half of Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for
Efficient DNN Training, NeurIPS 2020, https://arxiv.org/abs/2012.13113; reference code github.com/RICE-EIC/FracTrain.

The next rung of the ladder begins at each turning point of the loss (`earlybird.precision.turning_points`), at points
of one's own, or at the deadline. With a rung of ``a`` and ``g`` bits, all convolutions and linear layers but the
classifier compute

    forward  X_a * W_a        error  G_g * W_a        weight gradient  X_a * G_g

quantised as in `earlybird.precision.quantize`: affine, weights by output channel, gradients of outputs stochastically.

What it saves: bit-MACs and modelled joules of hardware that has such arithmetic. Whole numbers are *simulated*, which
takes longer than to compute without. For who wants seconds there are real rungs: in 'bf16' and 'fp32' autocast is
switched inside of the model's call, in any loop; 'int8' is bf16 with the forward pass of wide convolutions in int8
(`earlybird.precision.int8`). The bill shows the time.

The loss is a matter of the loop. It tells it by ``observe(loss)``, before each ``optimizer.step()``; the shipped loop
does so. A ladder with points of its own (``rungs_at``) needs none.

Deviations of the default, each with the published behaviour under ``PRESETS['published']``: looks are shares of the
run instead of 400 steps; a loss that has not yet begun to fall, as when the rate is still warming up, is no turning
point; each rung has a deadline, since turning points that never come would end the run in 3 bits, and the first one an
early one, since 3 bits teach little after the warm-up; 6 bits have gradients of 6 bits (published: 8); and each sample
has ranges of its own (``ladder_ranges``).
Depthwise convolutions keep at least 8 bits of values and 16 of gradients, as published for MobileNetV2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from earlybird.calls import Hook, around, arounds, given_optimizers, unwrapped
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.precision.int8 import ARITHMETIC, Int8Layer, check_device, wide
from earlybird.precision.quantize import Bits, QuantisedLayer, check_bits, declare, quantisable, seed_of_step
from earlybird.precision.turning_points import Stages, TurningPoints, foreseen
from earlybird.settings import check_choice, check_count, check_number, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after, computing
from earlybird.tickets.layers import is_depthwise
from earlybird.traces import Trace

__all__ = ["PrecisionLadder", "ProgressivePrecision", "Rung"]

REAL = {"int8": (8, 16), "bf16": (16, 16), "fp32": (32, 32)}
"""Rungs that are not simulated, and their bits of values and gradients."""
_DEPTHWISE = Bits(8, 8, 16)  # at least, where there are few products to average over


@dataclass(frozen=True)
class Rung:
    """One stage of the ladder.

    Attributes:
        forward: Bits of activations and weights.
        gradient: Bits of the gradients of outputs.
        real: Of `REAL`, or '' for whole numbers that are simulated.
    """

    forward: int
    gradient: int
    real: str = ""

    @property
    def floating(self) -> int:
        """Bits of the floating point in which the model computes; 0: as the run does."""
        return 0 if not self.real else 32 if self.real == "fp32" else 16

    def bits(self, layer: nn.Module) -> Bits:
        """Return the bits of one layer's operands."""
        if self.real:
            return Bits()
        if not is_depthwise(layer):
            return Bits(self.forward, self.forward, self.gradient)
        forward = max(self.forward, _DEPTHWISE.activation)
        return Bits(forward, forward, max(self.gradient, _DEPTHWISE.gradient))

    def __str__(self) -> str:
        return self.real or f"{self.forward}/{self.gradient}"


@dataclass(frozen=True, kw_only=True)
class ProgressivePrecision:
    """Hyper-parameters of progressive precision; `attach` starts it.

    Raises:
        InputError: A value is out of its range, or the ladder does not rise; the message names it.
    """

    forward_ladder: tuple[int | str, ...] | str = option(
        "3,4,6,8",
        "Bits of activations and weights, rung by rung: 1 to 16 (simulated), 'int8', 'bf16' or 'fp32' (real).",
    )
    gradient_ladder: tuple[int | str, ...] | str | None = option(
        None,
        "Bits of gradients, rung by rung; by default 6 for rungs of up to 6 bits, 8 up to 8, else 16; 'published': 6 "
        "up to 4 bits.",
    )
    rungs_at: tuple[Step, ...] | None = option(
        None, "When each rung but the first begins, such as '25%,50%,75%', instead of at turning points."
    )
    turning_every: Step = option(Step.parse("2.5%"), "How often the mean loss is looked at.")
    turning_from: Step = option(
        Step.parse("10%"), "Warm-up: a loss that stands still before this point has not begun to fall."
    )
    turning_window: int = option(5, "Looks that are compared, the newest included.")
    turning_threshold: float = option(0.05, "Largest difference of losses that is a standstill, of the early loss.")
    turning_decay: float = option(0.3, "What each turning point multiplies the threshold by, in (0, 1].")
    first_rung_until: Step | None = option(
        Step.parse("15%"),
        "When the second of more than two rungs begins, turning point or not; those up to the last follow evenly.",
    )
    last_rung_by: Step | None = option(
        Step.parse("85%"), "When the last rung begins, turning points or not; 'none': all after the second wait."
    )
    ladder_ranges: Literal["batch", "sample"] = option(
        "sample", "Ranges of activations and gradients: one for the batch, or one for each sample."
    )
    ladder_range_memory: float = option(
        0.9, "Share of a running range of activations that stays at each step, in [0, 1)."
    )
    ladder_may_fall: bool = option(False, "Control experiment: accept a ladder that does not rise.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {
            "turning_every": Step.parse("400it"),
            "turning_from": Step(),
            "first_rung_until": None,
            "last_rung_by": None,
            "gradient_ladder": "published",
            "ladder_ranges": "batch",
        },
        "fast": {"forward_ladder": "bf16,fp32", "rungs_at": (Step.parse("80%"),)},
    }

    def __post_init__(self) -> None:
        for name in ("turning_every", "turning_from", "first_rung_until", "last_rung_by"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value in (None, "none") else Step.parse(value))
        if self.turning_every in (None, Step()) or self.turning_from is None:
            raise InputError(
                f"turning_every is {self.turning_every} and turning_from {self.turning_from}",
                needed="a positive step such as '0.5ep' or '400it', and one such as '10%' or '0it'",
            )
        if self.rungs_at is not None:
            object.__setattr__(self, "rungs_at", tuple(Step.parse(point) for point in self.rungs_at))
            if len(self.rungs_at) != len(self.rungs) - 1:
                raise InputError(
                    f"rungs_at names {len(self.rungs_at)} points, and the ladder has {len(self.rungs)} rungs",
                    needed="one point for each rung but the first",
                )
        check_count("turning_window", self.turning_window, "5", optional=False)
        if self.turning_window < 2:
            raise InputError(f"turning_window is {self.turning_window!r}", needed="a whole number of at least 2")
        check_number("turning_threshold", self.turning_threshold, lambda value: value >= 0, "at least 0")
        needed = "a number greater than 0 and at most 1"
        check_number("turning_decay", self.turning_decay, lambda value: 0 < value <= 1, needed)
        check_choice("ladder_ranges", self.ladder_ranges, ("batch", "sample"))
        memory = self.ladder_range_memory
        check_number("ladder_range_memory", memory, lambda share: 0 <= share < 1, "a number from 0 to below 1")
        if not isinstance(self.ladder_may_fall, bool):
            raise InputError(f"ladder_may_fall is {self.ladder_may_fall!r}", needed="true or false")
        if not self.ladder_may_fall:
            _check_rises(self.rungs)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The ladder, from the first stage to the last."""
        forward = _read("forward_ladder", self.forward_ladder)
        if self.gradient_ladder in (None, "published"):
            least = 6 if self.gradient_ladder is None else 4
            return tuple(_rung(bits, bits if bits in REAL else _usual_gradient(int(bits), least)) for bits in forward)
        gradient = _read("gradient_ladder", self.gradient_ladder)
        if len(gradient) != len(forward):
            raise InputError(
                f"gradient_ladder has {len(gradient)} rungs, and forward_ladder {len(forward)}", needed="as many"
            )
        return tuple(_rung(*pair) for pair in zip(forward, gradient))

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run with fewer bits, for `earlybird.forecast`.

        Rungs are taken to begin at their deadlines, or evenly up to the last one's, or to the end where it has none.
        """
        total = round(sum(stretch.steps for stretch in stretches))
        per_epoch = round(plan.steps_per_epoch * total / plan.total_steps)
        rungs = self.rungs
        points = foreseen(
            len(rungs), self.rungs_at or (), self.first_rung_until, self.last_rung_by, per_epoch, total
        )  # fmt: skip
        for rung, point in zip(rungs, points):

            def bits(model: nn.Module, rung: Rung = rung) -> dict[nn.Module, Arithmetic | None]:
                floats = Arithmetic.of_floats(rung.floating) if rung.real else None
                found = {layer: floats or rung.bits(layer).arithmetic() for layer in quantisable(model).values()}
                return {**found, **dict.fromkeys(wide(model).values(), ARITHMETIC)} if rung.real == "int8" else found

            stretches = after(stretches, point, partial(computing, method="progressive_precision", arithmetic=bits))
        return stretches

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> PrecisionLadder:
        """Start on the first rung; call ``observe(loss)`` of what is returned before each ``optimizer.step()``.

        Args:
            model: The module that is trained, on the device where it will be.
            optimizer: Its ``step`` is the clock; of several, the first one's.
            steps_per_epoch: Optimizer steps in an epoch; needed when a point is given in epochs.
            total_steps: Optimizer steps of the training; needed when a point is a share of it, as by default.
            ledger: Where to record; by default an own one, which `PrecisionLadder.bill` reads.
            seed: Of stochastic rounding.

        Returns:
            The running method.

        Raises:
            InputError: A length is not known, a rung begins before the one below it or after the end, there is nothing
                to quantise, or another method decides already how a layer computes.
        """
        return PrecisionLadder(self, model, optimizer, steps_per_epoch, total_steps, ledger, seed)


class PrecisionLadder:
    """Running progressive precision, made by `ProgressivePrecision.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        rung: Number of the rung of the next step, from 0.
        turning: The indicator.
        history: One entry a rung: ``{'step', 'rung', 'bits', 'reason', 'layers'}``; ``layers`` has the bits of
            activation, weight and gradient by layer.
    """

    def __init__(
        self,
        settings: ProgressivePrecision,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings, self.rung = settings, 0
        self.turning = TurningPoints(settings.turning_window, settings.turning_threshold, settings.turning_decay)
        self.history: list[dict[str, Any]] = []
        self._rungs, self._steps, self._seed = settings.rungs, 0, seed
        self._stages = Stages(
            "rungs_at", len(self._rungs), points=settings.rungs_at or (), every=settings.turning_every,
            warm_up=settings.turning_from, first_until=settings.first_rung_until, last_by=settings.last_rung_by,
            turning=self.turning, steps_per_epoch=steps_per_epoch, total_steps=total_steps,
        )  # fmt: skip
        self._model = model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        if arounds(model, PrecisionLadder):
            raise InputError(
                "the precision of this model is progressive already", hint="call detach() of the other one first"
            )
        device = next(model.parameters()).device
        modules = quantisable(model) if any(not rung.real for rung in self._rungs) else {}
        convolutions: dict[str, nn.Module] = {}
        if any(rung.real == "int8" for rung in self._rungs):
            check_device(device)
            convolutions = wide(model)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed_of_step(seed, 0))
        self._layers = {
            name: QuantisedLayer(
                module, generator=self._generator, memory=settings.ladder_range_memory, ranges=settings.ladder_ranges
            )
            for name, module in modules.items()
        }
        self._convolutions = {name: Int8Layer(module) for name, module in convolutions.items()}
        self._around = around(model, self._in_rung, self)
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger)
        self._bits = self._ledger.bits
        self._climb_to(0, "start")
        self._handle = optimizers[0].register_step_post_hook(Hook(self._after_step, self))

    def observe(self, loss: Tensor | float) -> None:
        """Take note of the loss of one batch, a scalar; call it before ``optimizer.step()``."""
        self._stages.observe(self.rung, loss)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the bits of values and of gradients."""
        return {"bits": str(self._rungs[self.rung])}

    def traces(self) -> list[Trace]:
        """Return what the report shows: the bits of each layer's values and gradients over the steps."""

        def bits(operand: int) -> dict[str, list[tuple[int, float]]]:
            return {
                name: [(entry["step"], entry["layers"][name][operand]) for entry in self.history]
                for name in self.history[0]["layers"]
            }

        named = (("bits of activations and weights", 0), ("bits of gradients", 2))
        return [Trace(title=title, unit="bits", series=bits(operand), steps_hold=True) for title, operand in named]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers, strings and lists."""
        return {
            "steps": self._steps,
            "rung": self.rung,
            "turning": self.turning.state_dict(),
            "history": [dict(entry) for entry in self.history],
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: The state belongs to another model or another ladder.
        """
        if list(state["layers"]) != list(self._layers) or not 0 <= state["rung"] < len(self._rungs):
            raise InputError("the saved precision belongs to another model or ladder", needed="those it was saved with")
        self._steps = int(state["steps"])
        self._generator.manual_seed(seed_of_step(self._seed, self._steps))
        self.turning.load_state_dict(state["turning"])
        for name, layer in self._layers.items():
            layer.load_state_dict(state["layers"][name])
        self._climb_to(int(state["rung"]), "")
        self.history = [dict(entry) for entry in state["history"]]
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Give model and layers their plain forward back; full precision from here on."""
        self._handle.remove()
        self._around.remove()
        for layer in self._layers.values():
            layer.remove()
        for convolution in self._convolutions.values():
            convolution.remove()
        self._ledger.reread_arithmetic()
        if self._rungs[self.rung].real:
            self._tell_bits(self._bits)
        if self._own_ledger:
            self._ledger.stop()

    def _tell_bits(self, bits: int) -> None:
        for ledger in ledgers_on(self._model, self._ledger):
            ledger.bits = bits

    def _climb_to(self, number: int, reason: str) -> None:
        was_real, rung = self._rungs[self.rung].real, self._rungs[number]
        self.rung = number
        layers: dict[str, list[int]] = {}
        for name, layer in self._layers.items():
            layer.bits = rung.bits(layer.module)
            declare(layer.module, layer.bits.arithmetic())
            bits = layer.bits if not rung.real else Bits(*[rung.floating] * 3)
            layers[name] = [bits.activation, bits.weight, bits.gradient]
        for name, convolution in self._convolutions.items():
            convolution.active = rung.real == "int8"
            if rung.real:
                declare(convolution.module, ARITHMETIC if convolution.active else None)
                layers[name] = [rung.forward, rung.forward, rung.gradient]
        self._ledger.reread_arithmetic()
        if rung.real or was_real:
            self._tell_bits(rung.floating or self._bits)
        self.history.append(
            {"step": self._steps, "rung": number, "bits": str(rung), "reason": reason, "layers": layers}
        )

    def _in_rung(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model in the rung's floating point; what leaves it has the type that it would have without."""
        floating = self._rungs[self.rung].floating
        if not floating:
            return forward(*args, **kwargs)
        device = next(self._model.parameters()).device.type
        outside = torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.bfloat16, enabled=floating == 16):
            output = forward(*args, **kwargs)
        if floating == 32 or outside:
            return output
        return _pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, output)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        self._generator.manual_seed(seed_of_step(self._seed, self._steps))
        number, reason = self._stages.after(self.rung, self._steps)
        if number != self.rung:
            self._climb_to(number, reason)


def _read(name: str, ladder: tuple[int | str, ...] | str) -> list[int | str]:
    """Return the rungs of one ladder as numbers of bits and words of `REAL`."""
    parts: Iterable[Any] = ladder.split(",") if isinstance(ladder, str) else ladder
    read = []
    for part in parts:
        value = part.strip() if isinstance(part, str) else part
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(value, str) and value not in REAL:
            raise InputError(f"{name} names {value!r}", needed=f"bits from 1 to 16, or one of {', '.join(REAL)}")
        read.append(value if isinstance(value, str) else check_bits(f"a rung of {name}", value))
    if not read:
        raise InputError(f"{name} has no rung", needed="bits such as '3,4,6,8'")
    return read


def _rung(forward: int | str, gradient: int | str) -> Rung:
    if isinstance(forward, str):
        if gradient != forward:
            raise InputError(
                f"a rung in {forward} has gradients of {gradient}", needed=f"'{forward}' in both ladders at this rung"
            )
        return Rung(*REAL[forward], forward)
    if gradient in REAL and gradient != "fp32":
        raise InputError(f"a rung of {forward} bits has gradients in {gradient}", needed="bits from 1 to 16, or 'fp32'")
    return Rung(forward, 32 if isinstance(gradient, str) else gradient)


def _usual_gradient(forward: int, least: int) -> int:
    """Return the bits of gradients that go with those of values: 6 with up to ``least`` of them, then 8 and 16."""
    return 6 if forward <= least else 8 if forward <= 8 else 16


def _check_rises(rungs: Sequence[Rung]) -> None:
    for lower, higher in pairwise(rungs):
        if (higher.forward, higher.gradient) == (lower.forward, lower.gradient) or (
            higher.forward < lower.forward or higher.gradient < lower.gradient
        ):
            raise InputError(
                f"the ladder goes from {lower} to {higher}",
                needed="rungs that rise in bits",
                hint="ladder_may_fall = true allows it, as a control experiment",
            )
