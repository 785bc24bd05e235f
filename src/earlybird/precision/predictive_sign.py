"""Predictive sign gradient descent: the sign of a weight's gradient, mostly from the operands' first bits (PSG).

The algorithm-level part of Wang et al., E2-Train: Training State-of-the-art CNNs with Over 80% Energy Savings,
NeurIPS 2019, https://arxiv.org/abs/1910.13349; reference code github.com/RICE-EIC/E2Train.

Convolutions compute with inputs ``x`` and weights of 8 bits. The gradient ``g`` of their output has 16, and goes back
to the layer before as it is. For the weight there are two gradients:

    full     = x * g                              8 and 16 bits
    first    = x_first * g_first                  the 4 and 10 most significant bits of the same codes
    gradient = sign(first where |first| >= tau, full elsewhere),  tau = beta * max |first|

``full`` need only be computed where ``first`` is too small to be sure of its sign. The sign is taken right before the
optimizer's step, of what has been accumulated until then; its weight decay comes on top, unsigned. Norms, biases and
the classifier learn as usual. Signs want a smaller rate than gradients: 0.03 where SGD has 0.1. The average of weights
that the paper ends with is the matter of the recipe's ``ema``.

What it saves: bit-MACs and modelled joules of hardware that multiplies so. In simulation both gradients are computed:
each step takes *longer* than a plain one. It does not pay where the momentum of real gradients is what trains well, as
in nets with large batches.

Not published, or otherwise: ranges of inputs have a memory of 0.9 (published: 0.1, see ``PRESETS``); steps are
``range / (2**bits - 1)``, so that the largest number has a code (published: ``range / 2**bits``). A fixed ``tau``
(``predictor_threshold``), which the reference code has by default, depends on the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.calls import Hook, after_gradients, around, given_optimizers, unwrapped
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.precision.quantize import (
    Encoded,
    LayerRanges,
    Range,
    check_bits,
    declare,
    encode,
    most_significant,
    quantisable,
    range_of,
)
from earlybird.settings import check_choice, check_count, check_number, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after, computing
from earlybird.traces import Trace

__all__ = ["PredictiveSign", "SignPrediction", "mixed_gradient"]

_CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d,
}  # fmt: skip
_HISTORY_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class PredictiveSign:
    """Hyper-parameters of predictive sign gradient descent; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    sign_of: Literal["predicted", "full"] = option(
        "predicted", "'full' is SignSGD in full precision, what the predicted signs are compared with."
    )
    sign_from: Step = option(Step.parse("0it"), "When signs begin; plain training before that.")
    sign_bits: int = option(8, "Bits of inputs and weights, 2 to 16.")
    sign_gradient_bits: int = option(16, "Bits of the gradients of outputs, 2 to 16.")
    predictor_bits: int = option(4, "Most significant bits of inputs that the predictor sees.")
    predictor_gradient_bits: int = option(10, "Most significant bits of gradients that the predictor sees.")
    predictor_beta: float = option(0.05, "Signs are predicted above this share of a layer's largest gradient.")
    predictor_threshold: float | None = option(None, "Fixed gradient above which signs are predicted, instead.")
    sign_range_memory: float = option(0.9, "Share of a running range of inputs that stays at each step, in [0, 1).")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {"sign_range_memory": 0.1}}

    def __post_init__(self) -> None:
        check_choice("sign_of", self.sign_of, ("predicted", "full"))
        object.__setattr__(self, "sign_from", Step.parse(self.sign_from))
        for name, whole in (("predictor_bits", "sign_bits"), ("predictor_gradient_bits", "sign_gradient_bits")):
            check_bits(whole, getattr(self, whole), 2)
            check_bits(name, getattr(self, name))
            if getattr(self, name) > getattr(self, whole):
                raise InputError(f"{name} is {getattr(self, name)}", needed=f"at most {whole}, {getattr(self, whole)}")
        check_number("predictor_beta", self.predictor_beta, lambda share: 0 <= share <= 1, "a number from 0 to 1")
        if self.predictor_threshold is not None:
            check_number("predictor_threshold", self.predictor_threshold, lambda tau: tau >= 0, "at least 0")
        memory = self.sign_range_memory
        check_number("sign_range_memory", memory, lambda share: 0 <= share < 1, "a number from 0 to below 1")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run in these bits, for `earlybird.forecast`.

        How many signs the predictor gives is not known before: all weight gradients are taken to be computed in full.
        """
        if self.sign_of == "full":
            return stretches
        total = round(sum(stretch.steps for stretch in stretches))
        begin = self.sign_from.in_iterations(round(plan.steps_per_epoch * total / plan.total_steps), total)
        own = Arithmetic(
            activation=self.sign_bits, weight=self.sign_bits, gradient=self.sign_gradient_bits, whole=PASSES
        )

        def convolutions(model: nn.Module) -> dict[nn.Module, Arithmetic | None]:
            return dict.fromkeys(_convolutions(model).values(), own)

        return after(stretches, begin, partial(computing, method="predictive_sign", arithmetic=convolutions))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
    ) -> SignPrediction:
        """Start: from now on the optimizer sees signs in place of the gradients of convolutions' weights.

        Args:
            model: The module that is trained, on the device where it will be.
            optimizer: The one that holds the weights, or several.
            steps_per_epoch: Optimizer steps in an epoch; needed when ``sign_from`` is given in epochs.
            total_steps: Optimizer steps of the training; needed when ``sign_from`` is a share of it.
            ledger: Where to record; by default an own one, which `SignPrediction.bill` reads.

        Returns:
            The running method.

        Raises:
            InputError: A length is not known, there is no convolution, or another method decides already how one
                computes.
        """
        return SignPrediction(self, model, optimizer, steps_per_epoch, total_steps, ledger)


def mixed_gradient(first: Tensor, full: Tensor, beta: float, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradient whose signs are taken, and where it is the predictor's.

    Args:
        first: Gradient of a weight from the most significant bits.
        full: Gradient of the weight, of the same shape.
        beta: Share of the largest ``|first|`` from which on it is trusted.
        threshold: Fixed gradient from which on it is trusted, instead.
    """
    size = first.abs()
    sure = size >= (beta * size.amax() if threshold is None else threshold)
    return torch.where(sure, first, full), sure


class _SignedConvolution(torch.autograd.Function):
    """A convolution of quantised operands, whose weight's gradient is `mixed_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Range, layer: _SignedLayer) -> Tensor:
        settings, module = layer.settings, layer.module
        inputs = encode(x, settings.sign_bits, bounds, symmetric=True)
        weights = encode(weight, settings.sign_bits, range_of(weight, 0), symmetric=True).values().to(weight.dtype)
        ctx.save_for_backward(inputs.codes, inputs.step, inputs.zero, weights)
        ctx.layer, ctx.bias_shape, ctx.input_type = layer, None if bias is None else bias.shape, x.dtype
        ctx.shape = (module.stride, layer.padding, module.dilation, False, (0,) * (weight.ndim - 2), module.groups)
        convolve = _CONVOLVE[type(module)]
        return convolve(
            inputs.values().to(x.dtype), weights, bias, module.stride, layer.padding, module.dilation, module.groups
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer, settings = ctx.layer, ctx.layer.settings
        codes, step, zero, weights = ctx.saved_tensors
        inputs = Encoded(codes, step, zero, settings.sign_bits)
        gradient = gradients[0]
        outputs = encode(gradient, settings.sign_gradient_bits, range_of(gradient), symmetric=True)

        def back(x: Encoded, y: Encoded, *mask: bool) -> list[Tensor]:
            """Return the gradients of input, weight and bias that ``mask`` asks for, in the products' type."""
            operands = [tensor.to(gradient.dtype) for tensor in (y.values(), x.values(), weights)]
            return torch.ops.aten.convolution_backward(*operands, ctx.bias_shape, *ctx.shape, mask)  # type: ignore[no-any-return]

        needs = ctx.needs_input_grad
        of_input, full, of_bias = back(inputs, outputs, *needs[:3])
        if needs[1]:
            first = back(
                most_significant(inputs, settings.predictor_bits),
                most_significant(outputs, settings.predictor_gradient_bits),
                False, True, False,
            )[1]  # fmt: skip
            full = layer.mix(first.float(), full.float(), codes.shape[0])
        return (
            of_input.to(ctx.input_type) if needs[0] else None,
            full.to(weights.dtype) if needs[1] else None,
            of_bias.to(weights.dtype) if needs[2] else None,
            None,
            None,
        )


class _SignedLayer:
    """A convolution that computes with quantised operands and notes how often signs are predicted."""

    def __init__(
        self, module: nn.Module, settings: PredictiveSign, seen: list[tuple[_SignedLayer, int, Tensor]]
    ) -> None:
        self.module, self.settings, self.active = module, settings, False
        self.ranges = LayerRanges(module, "mean", settings.sign_range_memory)
        self.sums = [0.0] * 4  # of gradients: how many, and of their entries the shares predicted, so and right, right
        self._seen = seen
        self._around = around(module, self._run, self)

    @property
    def padding(self) -> Any:
        """Zeros that the convolution itself adds; others have been added to its input already."""
        module = self.module
        inside = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return module.padding if inside else (0,) * len(module.stride)  # type: ignore[arg-type]

    def remove(self) -> None:
        self._around.remove()

    def mix(self, first: Tensor, full: Tensor, images: int) -> Tensor:
        """Return the mixed gradient, and note how many signs were predicted and how many of them are right."""
        mixed, sure = mixed_gradient(first, full, self.settings.predictor_beta, self.settings.predictor_threshold)
        right = first.sign() == full.sign()
        # shares stay on their device until the optimizer's step
        self._seen.append((self, images, torch.stack([x.float().mean() for x in (sure, sure & right, right)])))
        return mixed

    def _run(self, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        module = self.module
        if not self.active or not x.numel():
            return forward(x)
        if self.padding != module.padding:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
        bounds = self.ranges.of_inputs(x)
        output: Tensor = _SignedConvolution.apply(x, module.weight, module.bias, bounds, self)
        return output


class SignPrediction:
    """Running predictive sign gradient descent, made by `PredictiveSign.attach`; its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        history: One entry each 100 steps: ``{'step', 'predicted', 'right', 'right_below'}``, each of the latter by
            layer; see `shares`.
    """

    def __init__(
        self,
        settings: PredictiveSign,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
    ) -> None:
        check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self._begin = settings.sign_from.in_iterations(steps_per_epoch, total_steps)
        self._steps = 0
        self._model = model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self._seen: list[tuple[_SignedLayer, int, Tensor]] = []
        self._layers = {
            name: _SignedLayer(module, settings, self._seen) for name, module in _convolutions(model).items()
        }
        self._names = {layer: name for name, layer in self._layers.items()}
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger)
        self._begin_if_due()
        self._handles: list[Any] = [one.register_step_pre_hook(Hook(self._before_step, self)) for one in optimizers]
        self._handles.append(optimizers[0].register_step_post_hook(Hook(self._after_step, self)))

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def shares(self) -> dict[str, dict[str, float]]:
        """Return by layer, as means over all gradients since the last entry of `history`, 0 to 1.

        Returns:
            'predicted': entries whose sign the predictor gave; 'right': of these, those with the sign of the full
            gradient; 'right_below': of the others, those whose sign it would have given, too.
        """
        found: dict[str, dict[str, float]] = {"predicted": {}, "right": {}, "right_below": {}}
        for name, layer in self._layers.items():
            count, predicted, both, right = layer.sums
            if count:
                found["predicted"][name] = predicted / count
                found["right"][name] = both / predicted if predicted else 1.0
                found["right_below"][name] = (right - both) / (count - predicted) if predicted < count else 1.0
        return found

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the share of signs that were predicted, over the layers."""
        predicted = self.shares()["predicted"].values() or (
            self.history[-1]["predicted"].values() if self.history else ()
        )
        return {"predicted": f"{sum(predicted) / len(predicted):.0%}"} if predicted else {}

    def traces(self) -> list[Trace]:
        """Return what the report shows: by layer, signs that were predicted, and of these the right ones."""

        def share(key: str) -> dict[str, list[tuple[int, float]]]:
            return {
                name: [(entry["step"], entry[key][name]) for entry in self.history if name in entry[key]]
                for name in self._layers
            }

        note = "Of the predicted signs, those that the full gradient has, too."
        return [
            Trace(title="signs that were predicted", unit="share", series=share("predicted")),
            Trace(title="signs that were right", unit="share", series=share("right"), note=note),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers, strings and lists."""
        return {
            "steps": self._steps,
            "history": [dict(entry) for entry in self.history],
            "sums": {name: list(layer.sums) for name, layer in self._layers.items()},
            "ranges": {name: layer.ranges.state() for name, layer in self._layers.items()},
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: The state belongs to another model.
        """
        if list(state["sums"]) != list(self._layers):
            raise InputError("the saved signs belong to another model", needed="the model they were saved with")
        self._steps = int(state["steps"])
        self.history = [dict(entry) for entry in state["history"]]
        for name, layer in self._layers.items():
            layer.ranges.load(state["ranges"][name])
            layer.sums = [*state["sums"][name]]
        self._begin_if_due()
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Give layers their plain forward and the optimizer its gradients back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers.values():
            layer.remove()
            declare(layer.module, None)
        self._ledger.reread_arithmetic()
        if self._own_ledger:
            self._ledger.stop()

    def _begin_if_due(self) -> None:
        if self.settings.sign_of == "full" or self._steps < self._begin:
            return
        for layer in self._layers.values():
            layer.active = True
            declare(layer.module, self._arithmetic(None))
        self._ledger.reread_arithmetic()

    def _arithmetic(self, weight_pass: tuple[int, int] | None) -> Arithmetic:
        bits, gradient = self.settings.sign_bits, self.settings.sign_gradient_bits
        return Arithmetic(activation=bits, weight=bits, gradient=gradient, whole=PASSES, weight_pass=weight_pass)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, lambda: self._take_signs(optimizer))

    def _take_signs(self, optimizer: torch.optim.Optimizer) -> None:
        self._note()
        if self._steps < self._begin:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = [
            weight.grad
            for weight in (layer.module.weight for layer in self._layers.values())
            if id(weight) in held and isinstance(weight.grad, Tensor)
        ]
        if not gradients:
            return
        torch._foreach_sign_(gradients)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer under GradScaler unscales in its own kernel
            torch._foreach_mul_(gradients, float(scale))

    def _note(self) -> None:
        """Add what the backward passes since the last step have seen, with one wait for the device."""
        if not self._seen:
            return
        reduced = self._arithmetic((self.settings.predictor_bits, self.settings.predictor_gradient_bits))
        shares = torch.stack([shares for _, _, shares in self._seen]).tolist()
        for (layer, images, _), (predicted, both, right) in zip(self._seen, shares):
            layer.sums = [have + more for have, more in zip(layer.sums, (1.0, predicted, both, right))]
            for ledger in ledgers_on(self._model, self._ledger):
                ledger.reroute((self._names[layer],), predicted * images, reduced, training=True)
        self._seen.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        if self._steps == self._begin:
            self._begin_if_due()
        if self._steps % _HISTORY_STEPS == 0 and any(layer.sums[0] for layer in self._layers.values()):
            self.history.append({"step": self._steps, **self.shares()})
            for layer in self._layers.values():
                layer.sums = [0.0] * 4


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions by name; a transposed one, or one with a forward of its own, is refused."""
    found = {name: module for name, module in quantisable(model).items() if not isinstance(module, nn.Linear)}
    if not found:
        raise InputError(f"{type(model).__name__} has no convolution", hint="leave predictive_sign out for this model")
    for name, module in found.items():
        if type(module) not in _CONVOLVE:
            raise InputError(
                f"layer '{name}' is a {type(module).__name__}", needed="Conv1d, Conv2d and Conv3d for predictive_sign"
            )
    return found
