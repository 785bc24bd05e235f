"""ShiftAddNet: train with shifts and additions in the place of multiplications.

You et al., "ShiftAddNet: A Hardware-Inspired Deep Network", NeurIPS 2020, https://arxiv.org/abs/2010.12785; reference
code github.com/RICE-EIC/ShiftAddNet. Every convolution becomes a shift layer and an add layer behind it
(`earlybird.arithmetic.convert`), or only one of the two (DeepShift, AdderNet). The layers' own files have their
equations; what belongs to training is here:

    P and S of shift layers have no weight decay
    the gradient of each add layer is scaled to a root mean square of ``add_eta`` when the optimizer steps

What it saves: modelled joules, of a chip that has shifters and adders in fixed point; the bill counts what stands for
a MAC (a shift and an addition, two additions) in each pass, and that the gradients of add layers are products. It does
*not* save time: both kinds of layers take longer than a convolution, on every machine that multiplies as fast as it
adds. A chain has about twice the weights of a convolution.

Deviations: see `earlybird.arithmetic.convert`; shift weights are rounded numbers by default, and all is computed in
floating point (published: a shift and a sign, fixed point: ``ShiftAdd(**ShiftAdd.PRESETS['published'])``); learning
rates are the run's own (published: SGD, 0.1, 160 epochs; of AdderNet alone 400 epochs); weights are not averaged
(published for frozen shifts: SWA from epoch 100 on).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from earlybird.arithmetic.add import AddConv2d, AddLinear, adapt_gradients
from earlybird.arithmetic.convert import Replaced, convert, plan
from earlybird.arithmetic.fixed_point import check_fraction_bits
from earlybird.arithmetic.shift import Form, ShiftConv2d, ShiftLinear, check_shift, weight_parameters
from earlybird.calls import given_optimizers, hook_owners, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_of, ledgers_on
from earlybird.settings import check_choice, check_number, option
from earlybird.stretches import LAYERS, Plan, Stretch
from earlybird.tickets.search import Search

_OPERATIONS = ("shift_add", "shift", "add", "conv")


@dataclass(frozen=True, kw_only=True)
class ShiftAdd:
    """Hyper-parameters of training with shifts and additions; `attach` converts the model.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    operation: Literal["shift_add", "shift", "add", "conv"] = option(
        "shift_add", "What convolutions become: a shift and an add layer, one of them, or 'conv': what they are."
    )
    shift_form: Form = option(
        "q", "Shift weights are a number rounded ('q'), a shift and a sign ('ps'), or drawn and not trained ('frozen')."
    )
    shift_bits: int = option(5, "Bits of a shift weight, 2 to 7.")
    shift_threshold: float = option(
        0.5, "Of 'ps' and 'frozen': signs up to this are zero, in [0, 1); more prunes what is frozen."
    )
    add_eta: float = option(0.2, "Root mean square that an add layer's gradient is scaled to.")
    fixed_point: int | None = option(
        None, "Floor inputs of shift and add layers to this many bits after the point; 'none' computes in floats."
    )
    leave_layers: tuple[str, ...] = option((), "Layers that stay as they are: names or patterns such as 'blocks.0.*'.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"shift_form": "ps", "fixed_point": 16},
        "fast": {},
    }

    def __post_init__(self) -> None:
        check_choice("operation", self.operation, _OPERATIONS)
        if str(self.fixed_point) == "none":
            object.__setattr__(self, "fixed_point", None)
        check_shift(self.shift_form, self.shift_bits, self.shift_threshold)
        check_fraction_bits(self.fixed_point)
        check_number("add_eta", self.add_eta, lambda eta: 0 < eta < math.inf, "a number above 0, such as 0.2")
        names: Any = self.leave_layers
        object.__setattr__(self, "leave_layers", (names,) if isinstance(names, str) else tuple(names))

    def convert(self, model: nn.Module, example_inputs: Any = None, *, seed: int = 0) -> dict[str, Replaced]:
        """Convert ``model`` in place, without its optimizer; see `earlybird.arithmetic.convert.convert`.

        Args:
            model: The module that is, or will be, trained.
            example_inputs: What it runs on; needed for add layers.
            seed: Of the new weights.

        Returns:
            Layer name to what was replaced; nothing where ``operation`` is 'conv'.
        """
        if self.operation == "conv":
            return {}
        return convert(
            model, self.operation, example_inputs=example_inputs, generator=torch.Generator().manual_seed(seed),
            leave=self.leave_layers, form=self.shift_form, bits=self.shift_bits, threshold=self.shift_threshold,
            fraction_bits=self.fixed_point,
        )  # fmt: skip

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run of the converted network, for `earlybird.forecast`."""
        converted: dict[int, nn.Module] = {}
        for stretch in stretches:
            if id(stretch.model) not in converted:
                model = converted[id(stretch.model)] = copy.deepcopy(stretch.model)
                self.convert(model, plan.images(), seed=plan.seed)
        shifted = [replace(stretch, model=converted[id(stretch.model)]) for stretch in stretches]
        return [stretch.decided("shift_add", LAYERS) for stretch in shifted] if self.operation != "conv" else shifted

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> ShiftAdding:
        """Convert ``model`` in place, exchange its weights in the optimizer, and scale gradients from now on.

        Args:
            model: The module that is trained; before the first step.
            optimizer: The optimizer over its parameters, or several. New weights take the places of the old ones; P
                and S go into a group of their own, like the old weight's but without weight decay. Make learning rate
                schedules, which remember the groups, after this.
            example_inputs: A tensor, tuple or dict the model runs on; needed for add layers.
            ledger: Where to record; by default an own one, which `ShiftAdding.bill` reads.
            seed: Of the new weights.

        Returns:
            The running method.

        Raises:
            InputError: A layer cannot be converted, training has begun, an optimizer does not hold a layer's weight or
                is Muon; nothing was changed.
        """
        return ShiftAdding(self, model, optimizer, example_inputs, ledger, seed)


class ShiftAdding:
    """Running training with shifts and additions, made by `ShiftAdd.attach`.

    All that it does to the model is in the model's own state.

    Attributes:
        settings: The hyper-parameters.
        layers: Names of the layers that were converted.
    """

    def __init__(
        self,
        settings: ShiftAdd,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self.settings = settings
        model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self._own_ledger = ledger is None
        self._ledger = ledger_of(model) if ledger is None else ledger
        places = _places(optimizers)
        if settings.operation != "conv":
            planned = plan(model, settings.operation, example_inputs=example_inputs, leave=settings.leave_layers)
            _check(model, planned, places)
        if self._own_ledger:
            self._ledger.watch(model, optimizers)
            self._ledger.enter("setup")
        if settings.operation != "conv" and example_inputs is not None:
            self._ledger.count_whole(example_inputs)  # what dense training costs is the price of convolutions
        replaced = settings.convert(model, example_inputs, seed=seed)
        self.layers = tuple(replaced)
        _exchange(replaced, places)
        self._handles: list[Any] = [adapt_gradients(model, one, settings.add_eta) for one in optimizers]
        if replaced:
            _say_bits(model, self._ledger.bits)
            for search in hook_owners(model, Search):
                search.retrace()
            for one in ledgers_on(model, self._ledger):
                one.recount(model, example_inputs)
        if self._own_ledger:
            self._ledger.enter("train")

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return which layers were converted, and what the own ledger holds."""
        return {"layers": list(self.layers), "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: The state belongs to a model of which other layers were converted.
        """
        if list(state["layers"]) != list(self.layers):
            raise InputError(
                f"in the saved model {len(state['layers'])} layers were converted, in this one {len(self.layers)}, or "
                "others", needed="the same model and settings",
            )  # fmt: skip
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Stop scaling gradients; the layers stay what they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()


class _Place(NamedTuple):
    """Where a parameter is held."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]


def _places(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, _Place]:
    """Return where each parameter is held, by its id."""
    return {
        id(parameter): _Place(optimizer, group)
        for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }  # fmt: skip


def _check(model: nn.Module, layers: Iterable[str], places: Mapping[int, _Place]) -> None:
    """Raise an `InputError` where the weight of one of ``layers`` cannot be exchanged."""
    for name in layers:
        weight = model.get_submodule(name).get_parameter("weight")
        place = places.get(id(weight))
        if place is None:
            raise InputError(
                f"no given optimizer holds the weight of layer '{name}'", hint="pass all that train the model"
            )
        if place.optimizer.state.get(weight):
            raise InputError(
                f"the optimizer has made steps with the weight of layer '{name}', which is drawn anew",
                hint="attach before the first step",
            )
        if place.group.get("orthogonal"):
            raise InputError(
                f"Muon holds the norm of layer '{name}', of which neither shifts nor distances may depend",
                hint="use optimizer 'sgd' or 'adamw'",
            )
        if "param_names" in place.group:
            raise InputError(
                "the optimizer was given names of parameters, some of which will go", hint="give it parameters only"
            )


def _exchange(replaced: Mapping[str, Replaced], places: Mapping[int, _Place]) -> None:
    """Put the new weights where the optimizers held the old ones; P and S into groups of their own."""
    undecayed: dict[int, tuple[_Place, list[nn.Parameter]]] = {}
    for old, new in replaced.values():
        place = places[id(old.weight)]
        held = place.group["params"]
        free = undecayed.setdefault(id(place.group), (place, []))[1]
        instead: list[nn.Parameter] = []
        for layer in new.modules():
            if isinstance(layer, (AddConv2d, AddLinear)):
                instead.append(layer.get_parameter("weight"))
            elif isinstance(layer, (ShiftConv2d, ShiftLinear)) and layer.form != "frozen":
                own = [getattr(layer, name) for name in weight_parameters(layer)]
                (free if layer.form == "ps" else instead).extend(own)
        index = next(i for i, parameter in enumerate(held) if parameter is old.weight)
        held[index : index + 1] = instead
    for (optimizer, group), free in undecayed.values():
        if free:
            changes = {"params": free} | ({"weight_decay": 0.0} if "weight_decay" in group else {})
            optimizer.add_param_group({**group, **changes})


def _say_bits(model: nn.Module, bits: int) -> None:
    """Let shift layers in floating point say that they compute in the run's; add layers compute in float32."""
    for layer in model.modules():
        if isinstance(layer, (ShiftConv2d, ShiftLinear)) and layer.fraction_bits is None:
            layer.arithmetic = replace(layer.arithmetic, activation=bits, gradient=bits)
