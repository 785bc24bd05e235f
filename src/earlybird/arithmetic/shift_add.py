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

Deviations: see `earlybird.arithmetic.convert`; learning rates are the run's own (published: SGD, 0.1, 160 epochs; of
AdderNet alone 400 epochs); weights are not averaged (published for frozen shifts: SWA from epoch 100 on).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from earlybird.arithmetic.add import AddConv2d, AddLinear, adapt_gradients
from earlybird.arithmetic.convert import Replaced, convert
from earlybird.arithmetic.shift import Form, ShiftConv2d, ShiftLinear, check_shift, weight_parameters
from earlybird.calls import as_optimizers, hook_owners, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_of
from earlybird.settings import option
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
    shift_form: Form = option("ps", "Shift weights are a shift and a sign ('ps'), or a real number rounded ('q').")
    shift_bits: int = option(5, "Bits of a shift weight, 2 to 7.")
    shift_frozen: bool = option(False, "Shift weights are drawn once and never trained.")
    shift_threshold: float = option(0.5, "Signs up to this are zero, in [0, 1): what prunes frozen shift weights.")
    add_eta: float = option(0.2, "Root mean square that an add layer's gradient is scaled to.")
    fixed_point: int | None = option(
        None, "Floor inputs of shift and add layers to this many bits after the point; 'none' computes in floats."
    )
    leave_layers: tuple[str, ...] = option((), "Layers that stay as they are: names or patterns such as 'blocks.0.*'.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {"fixed_point": 16}, "fast": {}}

    def __post_init__(self) -> None:
        if self.operation not in _OPERATIONS:
            raise InputError(f"operation is {self.operation!r}", needed=f"one of {', '.join(_OPERATIONS)}")
        if str(self.fixed_point) == "none":
            object.__setattr__(self, "fixed_point", None)
        if not isinstance(self.shift_frozen, bool):
            raise InputError(f"shift_frozen is {self.shift_frozen!r}", needed="true or false")
        check_shift(self.shift_form, self.shift_bits, self.shift_threshold, self.shift_frozen, self.fixed_point)
        number = isinstance(self.add_eta, (int, float)) and not isinstance(self.add_eta, bool)
        if not number or not 0 < self.add_eta < float("inf"):
            raise InputError(f"add_eta is {self.add_eta!r}", needed="a number above 0, such as 0.2")
        names = (self.leave_layers,) if isinstance(self.leave_layers, str) else tuple(self.leave_layers)
        object.__setattr__(self, "leave_layers", names)

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
            frozen=self.shift_frozen, fraction_bits=self.fixed_point,
        )  # fmt: skip

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
        optimizers = as_optimizers(optimizer)
        if not optimizers:
            raise InputError("no optimizer was given", needed="the one that trains the model, or several")
        self._own_ledger = ledger is None
        self._ledger = ledger_of(model) if ledger is None else ledger
        before = dict(model.named_modules())
        ...
