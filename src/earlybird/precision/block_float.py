"""Block floating point: numbers of a few bits that share one exponent, as in SWALP; to draw a ticket in 8 bits.

Yang, Zhang, Li, Bai, Gordon, De Sa, SWALP: Stochastic Weight Averaging in Low-Precision Training, ICML 2019,
https://arxiv.org/abs/1904.11943; You et al. search for early tickets with it (ICLR 2020,
https://arxiv.org/abs/1909.11957, "EB Train LF and LL"). With ``E`` the exponent of the largest number of a block,

    E = floor(log2(max |x|)),   step = 2**(E - bits + 2),   code = round(x / step) in -2**(bits-1) .. 2**(bits-1) - 1

where rounding is stochastic (or to the nearest). A block is a whole tensor, or each index of its first dimension: the
filters of a weight, the samples of a batch. Inputs, weights and the gradients of outputs of all convolutions and linear
layers but the classifier are rounded before they are multiplied.

While an early ticket is searched for, the search runs in these bits and, once it is drawn, training goes on in full
precision (published as LF); with ``block_until='100%'`` it stays (LL).

What it saves: bit-MACs, moved bytes and modelled joules of the search. It is simulated: the search takes *longer*. It
does not pay where the search is a small part of the run, which is what the early ticket is for.

Deviation: weights, gradients of weights and momentum stay in float32 between steps, of which the shrink is made and
which train at least as well; ``block_state`` rounds them, too, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from earlybird.calls import Hook, after_gradients, around, given_optimizers, hook_owners, unwrapped
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for
from earlybird.precision.quantize import (
    check_bits,
    declare,
    forward_with,
    gradient_through,
    quantisable,
    round_,
    seed_of_step,
    straight_through,
)
from earlybird.settings import check_choice, check_count, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after, computing
from earlybird.tickets.search import Search

__all__ = ["BlockFloat", "BlockFloating", "block_float"]

_EXPONENTS = 127  # of 8 bits


@dataclass(frozen=True, kw_only=True)
class BlockFloat:
    """Hyper-parameters of training in block floating point; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    block_bits: int = option(8, "Bits of a number, its sign included, 2 to 16.")
    block_of: Literal["tensor", "slice"] = option(
        "slice", "What shares an exponent: a whole 'tensor', or a 'slice' of it (a filter, a sample)."
    )
    block_rounding: Literal["stochastic", "nearest"] = option("stochastic", "How numbers are rounded in training.")
    block_until: Step | None = option(
        None, "When full precision begins; by default when the ticket is drawn, without a search never."
    )
    block_state: bool = option(False, "Round weights, their gradients and the optimizer's state, too, at each step.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {"block_state": True}}

    def __post_init__(self) -> None:
        check_bits("block_bits", self.block_bits, 2)
        check_choice("block_of", self.block_of, ("tensor", "slice"))
        check_choice("block_rounding", self.block_rounding, ("stochastic", "nearest"))
        until = self.block_until
        object.__setattr__(self, "block_until", None if until is None or str(until) == "none" else Step.parse(until))
        if not isinstance(self.block_state, bool):
            raise InputError(f"block_state is {self.block_state!r}", needed="true or false")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run in block floating point, for `earlybird.forecast`.

        It ends with the first stretch of the network that is trained to the end: when a ticket is drawn.
        """
        total = round(sum(stretch.steps for stretch in stretches))
        until = float(total)
        if self.block_until is not None:
            until = self.block_until.in_iterations(round(plan.steps_per_epoch * total / plan.total_steps), total)
        else:
            until = sum(stretch.steps for stretch in stretches if stretch.model is not stretches[-1].model) or until
        bits = self.block_bits
        own = Arithmetic(activation=bits, weight=bits, gradient=bits, whole=PASSES)

        def rounded(model: nn.Module) -> dict[nn.Module, Arithmetic | None]:
            return dict.fromkeys(quantisable(model).values(), own)

        in_blocks = after(stretches, 0, partial(computing, method="block_float", arithmetic=rounded))
        return after(in_blocks, until, partial(computing, method="block_float", arithmetic=lambda _: {}))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> BlockFloating:
        """Start; with a search for a ticket on the same model, in whatever order, it ends with the draw.

        Args:
            model: The module that is trained, on the device where it will be.
            optimizer: Its ``step`` is the clock; of several, the first one's.
            steps_per_epoch: Optimizer steps in an epoch; needed when ``block_until`` is given in epochs.
            total_steps: Optimizer steps of the training; needed when ``block_until`` is a share of it.
            ledger: Where to record; by default an own one, which `BlockFloating.bill` reads.
            seed: Of stochastic rounding.

        Returns:
            The running method.

        Raises:
            InputError: A length is not known, there is nothing to round, or another method decides already how a
                layer computes.
        """
        return BlockFloating(self, model, optimizer, steps_per_epoch, total_steps, ledger, seed)


@torch.no_grad()
def block_float(x: Tensor, bits: int, *, per: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x`` in block floating point, in its own type and memory format.

    Args:
        x: Floating point, any shape.
        bits: Of a number, its sign included, 2 to 16.
        per: Dimension each index of which has an exponent of its own; None: one for all.
        generator: Of stochastic rounding, on the device of ``x``; None rounds to the nearest.
    """
    check_bits("bits", bits, 2)
    if not x.numel():
        return x
    size = x.detach().abs()
    if per is None or not x.ndim:
        largest = size.amax()
    else:
        others = [dim for dim in range(x.ndim) if dim != per % x.ndim]
        largest = size.amax(others, keepdim=True) if others else size
    # frexp gives m * 2**e with m in [0.5, 1): exact at powers of two, where a logarithm may err by one
    exponent = (torch.frexp(largest.float()).exponent - 1).clamp_(-_EXPONENTS, _EXPONENTS)
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - (bits - 2))
    step = torch.where(largest.isfinite(), step, largest)  # what has overflowed must not become a number again
    codes = round_(x.detach().float() / step, generator)
    return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).mul_(step).to(x.dtype)


class _BlockLayer:
    """A layer whose operands are rounded to block floating point where its ``forward`` runs."""

    def __init__(self, module: nn.Module, round_: Callable[..., Tensor], generator: torch.Generator) -> None:
        self.module, self.active = module, False
        self._round, self._generator = round_, generator
        self._around = around(module, self._run, self)

    def remove(self) -> None:
        self._around.remove()

    def _run(self, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.active or not x.numel():
            return forward(x, *args, **kwargs)
        generator = self._generator if self.module.training else None
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        x, weight = (straight_through(operand, self._round(operand, generator)) for operand in (x, weight))
        output = forward_with(self.module, weight, forward, x, *args, **kwargs)
        return gradient_through(output, lambda gradient: self._round(gradient, generator))


class BlockFloating:
    """Running training in block floating point, made by `BlockFloat.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        active: Whether the next step is in block floating point.
    """

    def __init__(
        self,
        settings: BlockFloat,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings, self.active = settings, True
        until = settings.block_until
        self._until = None if until is None else until.in_iterations(steps_per_epoch, total_steps)
        self._steps, self._seed = 0, seed
        self._model = model = unwrapped(model)
        self._optimizers = optimizers = given_optimizers(optimizer)
        self._generator = torch.Generator(next(model.parameters()).device)
        self._layers = {
            name: _BlockLayer(module, self._round, self._generator) for name, module in quantisable(model).items()
        }
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger)
        self._follow()
        self._handles: list[Any] = [
            # before all other hooks: whoever counts shall see how the pass is computed
            model.register_forward_pre_hook(Hook(self._before_forward, self), prepend=True),
            optimizers[0].register_step_post_hook(Hook(self._after_step, self)),
        ]
        if settings.block_state:
            self._handles += [one.register_step_pre_hook(Hook(self._before_step, self)) for one in optimizers]
            self._handles += [one.register_step_post_hook(Hook(self._round_state, self)) for one in optimizers]

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the bits, while they are few."""
        return {"bits": f"block {self.settings.block_bits}"} if self.active else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: how many steps were made, whether it is over, and what the own ledger holds."""
        return {
            "steps": self._steps,
            "active": self.active,
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps, self.active = int(state["steps"]), bool(state["active"])
        self._follow()
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off; full precision from here on."""
        self.active = False
        self._follow()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers.values():
            layer.remove()
        if self._own_ledger:
            self._ledger.stop()

    def _round(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        noisy = self.settings.block_rounding == "stochastic"
        per = 0 if self.settings.block_of == "slice" else None
        return block_float(x, self.settings.block_bits, per=per, generator=generator if noisy else None)

    def _follow(self) -> None:
        """Let noise and layers be those of the step that comes."""
        self._generator.manual_seed(seed_of_step(self._seed, self._steps))
        self.active = self.active and not self._over()
        if all(layer.active == self.active for layer in self._layers.values()):
            return
        bits = self.settings.block_bits
        own = Arithmetic(activation=bits, weight=bits, gradient=bits, whole=PASSES)
        for layer in self._layers.values():
            layer.active = self.active
            declare(layer.module, own if self.active else None)
        self._ledger.reread_arithmetic()

    def _over(self) -> bool:
        if self._until is not None:
            return self._steps >= self._until
        return any(search.drawn for search in hook_owners(self._model, Search))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        # here and not after the step, so that it does not matter who is told of the draw first
        if self.active and self._over():
            self._follow()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        self._follow()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, lambda: self._round_gradients(optimizer))

    def _round_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        noise = self._noise(optimizer, 0)
        for parameter in _held(optimizer) if self.active else ():
            if parameter.grad is not None:
                parameter.grad.copy_(self._round(parameter.grad, noise))

    def _round_state(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        noise = self._noise(optimizer, 1)
        for parameter in _held(optimizer) if self.active else ():
            for tensor in (parameter.data, *optimizer.state.get(parameter, {}).values()):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    tensor.copy_(self._round(tensor, noise))

    def _noise(self, optimizer: torch.optim.Optimizer, moment: int) -> torch.Generator:
        """Return noise of its own for one moment of one optimizer's step, whoever of several keeps the clock."""
        stream = 1 + 2 * self._optimizers.index(optimizer) + moment
        return torch.Generator(self._generator.device).manual_seed(seed_of_step(self._seed, self._steps, stream))


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
