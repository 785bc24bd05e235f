"""Count what a model does for one sample: multiply-accumulates, parameters and numbers moved.

The forward pass runs once, on one sample, and every operation that PyTorch really executes is seen below autograd
(`TorchDispatchMode`), so functional calls, attention and shared layers count like modules do. One MAC is one
multiplication with its addition (FLOPs = 2 MACs).

    forward F = sum over convolutions and matrix products of their MACs
    backward = F for each operand that needs a gradient: 2F, less the input gradient of the first layer

Not counted: BatchNorm, activations, pooling and the optimizer's arithmetic (under 2 % in the convolutional nets here),
recomputation by gradient checkpointing, and operations hidden in a user's own kernel. The model runs in eval mode, so
branches that exist in training only (auxiliary heads) are not seen.

Checked against published counts in ``tests/cost/test_count.py`` (VGG-16, ResNet-18 and 50, MobileNetV2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from earlybird.calls import as_call, first_sample, hooks_idle, left_as_found, plain_execution, tensors_in, unwrapped
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError
from earlybird.sharded import hollow

__all__ = ["Amount", "LayerCost", "ModelCost", "count"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of the operations that one module executes itself, not in its children; or the sum over several.

    Attributes:
        macs: Forward MACs per sample.
        error_macs: MACs per sample of the gradient of its inputs.
        weight_macs: MACs per sample of the gradient of its weights.
        input_elements: Activation numbers read per sample in the forward pass.
        output_elements: Activation numbers written per sample in the forward pass.
        weight_elements: Weight numbers read once per batch.
        saved_elements: Activation numbers read again per sample in the backward pass.
        gradient_elements: Gradient numbers read and written per sample in the backward pass.
    """

    macs: int = 0
    error_macs: int = 0
    weight_macs: int = 0
    input_elements: int = 0
    output_elements: int = 0
    weight_elements: int = 0
    saved_elements: int = 0
    gradient_elements: int = 0

    @property
    def backward_macs(self) -> int:
        """MACs of both backward passes, per sample."""
        return self.error_macs + self.weight_macs

    @property
    def backward_elements(self) -> int:
        """Activation and gradient numbers moved per sample in the backward pass."""
        return self.saved_elements + self.gradient_elements

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(**{key.name: getattr(self, key.name) + getattr(other, key.name) for key in fields(self)})

    def scaled(self, factor: float) -> LayerCost:
        """Return the cost of samples with ``factor`` times as many pixels, in proportion."""
        of_a_sample = {key.name: round(factor * getattr(self, key.name)) for key in fields(self)}
        return LayerCost(**{**of_a_sample, "weight_elements": self.weight_elements})


@dataclass
class Amount:
    """Operations and moved bits of some passes.

    Attributes:
        macs: MACs (or what stands for one) by pass, see `earlybird.cost.arithmetic`.
        bit_macs: The same, each weighted with the bits of its operands.
        operations: Primitive operations by name, such as ``'mult fp32'``.
        moved_bits: Bits moved, each tensor once a pass.
    """

    macs: dict[str, float] = field(default_factory=dict)
    bit_macs: dict[str, float] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    moved_bits: float = 0

    def add(
        self, cost: LayerCost, arithmetic: Arithmetic, images: float, batches: float = 0, *, training: bool,
        density: float = 1.0, gradient_density: float | None = None,
    ) -> None:  # fmt: skip
        """Add ``images`` samples in ``batches`` batches that pass layers of ``cost``; negative ones take away.

        Of the layers' weights, a share ``density`` is not zero. The others are multiplied with here, but have no bits,
        and hardware that skips them spends no operations on them. Gradients are wanted of a share ``gradient_density``
        of the weights; by default of those that are not zero.
        """
        amounts = {"forward": cost.macs}
        if training:
            amounts |= {"error": cost.error_macs, "weight": cost.weight_macs}
        for pass_, macs in amounts.items():
            if not macs:
                continue
            share = gradient_density if pass_ == "weight" and gradient_density is not None else density
            _raise(self.macs, pass_, images * macs)
            _raise(self.bit_macs, pass_, images * macs * share * arithmetic.bit_macs(pass_))
            for name, count_ in arithmetic.operations(pass_).items():
                _raise(self.operations, name, images * macs * share * count_)
        moved = (cost.input_elements + cost.output_elements) * arithmetic.activation
        weights = cost.weight_elements * arithmetic.weight
        if training:
            moved += cost.saved_elements * arithmetic.activation + cost.gradient_elements * arithmetic.gradient
            weights += cost.weight_elements * (arithmetic.weight + arithmetic.gradient)  # read again, gradient written
        self.moved_bits += images * moved + batches * weights


def _raise(amounts: dict[str, float], name: str, by: float) -> None:
    amounts[name] = amounts.get(name, 0) + by


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Cost of one model on one sample.

    Attributes:
        total: Sum over its layers.
        parameters: Number of parameters.
        layers: Cost by module name, in the order of execution; ``""`` is the model itself. Empty where only the sum
            is known.
        arithmetics: How those layers compute that say so, by module name.
        densities: Share of the weights that are not zero, of those layers that say so.
        gradient_densities: Share of the weights whose gradients are wanted, of those layers that say so.
    """

    total: LayerCost
    parameters: int
    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    arithmetics: Mapping[str, Arithmetic] = field(default_factory=dict)
    densities: Mapping[str, float] = field(default_factory=dict)
    gradient_densities: Mapping[str, float] = field(default_factory=dict)

    @property
    def altered(self) -> bool:
        """Whether some layers do not compute as those of a dense run do."""
        return bool(self.arithmetics or self.densities)

    @property
    def forward_macs(self) -> int:
        """MACs of the forward pass, per sample."""
        return self.total.macs

    @property
    def backward_macs(self) -> int:
        """MACs of the backward passes, per sample."""
        return self.total.backward_macs

    @property
    def training_macs(self) -> int:
        """MACs of one training step, per sample: forward and backward."""
        return self.forward_macs + self.backward_macs

    @property
    def update_bytes(self) -> int:
        """Bytes an optimizer step moves: 32-bit master weight and momentum of each parameter, read and written."""
        return 4 * 4 * self.parameters

    def amount(self, images: float, batches: float, bits: int, *, training: bool) -> Amount:
        """Return what ``images`` samples in ``batches`` batches cost.

        Layers that say how they compute are charged so, all others in floating point of ``bits`` bits. Training adds
        to the forward pass: saved inputs and weights read again, both kinds of gradients computed and written.
        """
        found, rest, floats = Amount(), self.total, Arithmetic.of_floats(bits)
        for name in dict.fromkeys((*self.arithmetics, *self.densities)):
            own = self.arithmetics.get(name, floats)
            found.add(self.layers[name], own, images, batches, training=training, **self._shares(name))
            rest = _less(rest, self.layers[name])
        found.add(rest, floats, images, batches, training=training)
        return found

    def exchange(
        self, amount: Amount, layers: Sequence[str], images: float, bits: int, arithmetic: Arithmetic | None, *,
        training: bool,
    ) -> None:  # fmt: skip
        """Let ``images`` samples of ``amount`` have passed ``layers`` in another arithmetic, or not at all (None)."""
        for name in layers:
            own = self.arithmetics.get(name, Arithmetic.of_floats(bits))
            if name not in self.layers:
                continue  # only the sum is known, or the layer is never executed
            shares = self._shares(name)
            amount.add(self.layers[name], own, -images, training=training, **shares)
            if arithmetic is not None:
                amount.add(self.layers[name], arithmetic, images, training=training, **shares)

    def _shares(self, name: str) -> dict[str, Any]:
        return {"density": self.densities.get(name, 1.0), "gradient_density": self.gradient_densities.get(name)}

    def moved_bytes(self, samples: int, batches: int, bits: int, *, training: bool) -> int:
        """Return the bytes moved for ``samples`` in ``batches`` batches, each tensor once a pass."""
        return int(self.amount(samples, batches, bits, training=training).moved_bits // 8)

    def scaled(self, factor: float) -> ModelCost:
        """Return the cost of samples with ``factor`` times as many pixels, in proportion."""
        layers = {name: layer.scaled(factor) for name, layer in self.layers.items()}
        return replace(self, total=self.total.scaled(factor), layers=layers)

    def computing_as(self, model: nn.Module) -> ModelCost:
        """Return the same cost with the arithmetics and densities that the layers of ``model`` say now."""
        return replace(self, **_said(model, self.layers))

    def to_json(self) -> dict[str, Any]:
        """Return the totals (not the layers) as plain numbers."""
        return {"parameters": self.parameters, **asdict(self.total)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> ModelCost:
        """Rebuild the totals that `to_json` wrote."""
        return cls(total=LayerCost(**{key.name: state[key.name] for key in fields(LayerCost)}),
                   parameters=state["parameters"])  # fmt: skip


def _less(total: LayerCost, part: LayerCost) -> LayerCost:
    return LayerCost(**{key.name: getattr(total, key.name) - getattr(part, key.name) for key in fields(LayerCost)})


def _said(model: nn.Module, layers: Mapping[str, LayerCost]) -> dict[str, Any]:
    """Return what the layers of ``model`` say now about how they compute, as fields of a `ModelCost`."""
    modules = {name: module for name, module in model.named_modules() if name in layers}

    def told(attribute: str, kind: type) -> dict[str, Any]:
        found = {name: getattr(module, attribute, None) for name, module in modules.items()}
        return {name: value for name, value in found.items() if isinstance(value, kind)}

    return {
        "arithmetics": told("arithmetic", Arithmetic),
        "densities": told("weight_density", float),
        "gradient_densities": told("gradient_density", float),
    }


def count(model: nn.Module, example_inputs: Any) -> ModelCost:
    """Count one sample's forward and backward pass of ``model``.

    Args:
        model: Any module. It is left as found: modes, buffers, gradients and random generators.
        example_inputs: What ``model`` is called with: a tensor ``(N, ...)``, a tuple or list of positional arguments,
            or a mapping of keyword arguments. Only the first of the N samples is run.

    Returns:
        The counts, per sample.

    Raises:
        InputError: The model does not run on one sample of ``example_inputs``.
    """
    model = unwrapped(model)
    args, kwargs = as_call(first_sample(example_inputs))
    with ExitStack() as stack:
        stack.enter_context(left_as_found(model))
        stack.enter_context(plain_execution(model))
        stack.enter_context(hollow(model))
        stack.enter_context(hooks_idle())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        counter = stack.enter_context(_Counter(model, weights))
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"the model does not run on one sample of example_inputs: {type(error).__name__}: {error}",
                needed="a tensor (N, ...), a tuple of positional or a dict of keyword arguments",
                hint="pass example_inputs=x with a batch as the training loop uses it",
            ) from error
    return ModelCost(
        total=sum(counter.layers.values(), LayerCost()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=counter.layers,
        **_said(model, counter.layers),
    )


# Each formula takes the operation's arguments and its (first) output, and returns MACs and the two operands that are
# multiplied, activation first, so that the backward pass of each can be charged.


def _convolution(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    image, weight, transposed = args[0], args[1], args[6]
    # a transposed convolution multiplies the whole kernel at each position of its input instead of its output
    positions = math.prod((image if transposed else output).shape[2:])
    return output.shape[0] * positions * weight.numel(), image, weight


def _matrix_product(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    left, right = args[0], args[1]
    return output.numel() * left.shape[-1], left, right


def _added_matrix_product(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    return _matrix_product(args[1:], output)


def _attention(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    query, key, value = args[:3]  # (..., L, E), (..., S, E), (..., S, V)
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1]), query, key


def _distances(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    image, filters = args[0], args[1]  # one |x - f| stands for one MAC
    return output.shape[0] * math.prod(output.shape[2:]) * filters.numel(), image, filters


def _recurrent(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    # one layer, one direction; its two matrices (4H, I) and (4H, H) are charged as one operand
    sequence, weight_input, weight_hidden = args[:3]
    return sequence.shape[:-1].numel() * (weight_input.numel() + weight_hidden.numel()), sequence, weight_input


def _cudnn_recurrent(args: Sequence[Any], output: Tensor) -> tuple[int, Tensor, Tensor]:
    # all layers and directions at once: the list holds their matrices and bias vectors
    sequence, matrices = args[0], [weight for weight in args[1] if weight.ndim == 2]
    return sequence.shape[:-1].numel() * sum(matrix.numel() for matrix in matrices), sequence, matrices[0]


_FORMULAS: dict[str, Callable[[Sequence[Any], Tensor], tuple[int, Tensor, Tensor]]] = {
    "aten::convolution": _convolution,
    "aten::mm": _matrix_product,
    "aten::bmm": _matrix_product,
    "aten::mv": _matrix_product,
    "aten::_scaled_mm": _matrix_product,
    "aten::addmm": _added_matrix_product,
    "aten::baddbmm": _added_matrix_product,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "earlybird::add_conv2d": _distances,
    "aten::mkldnn_rnn_layer": _recurrent,
    "aten::_cudnn_rnn": _cudnn_recurrent,
}


class _Counter(TorchDispatchMode):
    """Charges each operation to the module that is executing: the innermost one entered and not yet left."""

    def __init__(self, model: nn.Module, weights: set[int]) -> None:
        super().__init__()
        self.layers: dict[str, LayerCost] = {}
        self._weights = weights  # addresses of parameters and of everything computed from parameters alone
        self._alive: list[Tensor] = []  # computed weights, held so that their addresses stay theirs
        self._stack = [""]
        self._handles = []
        for name, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)),
                module.register_forward_hook(lambda *_: self._left(), always_call=True),
            ]

    def _left(self) -> None:
        self._stack.pop()

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = tensors_in((*args, *(kwargs or {}).values()))
        outputs = tensors_in(result)
        if tensors and all(self._is_weight(tensor) for tensor in tensors):
            self._alive += outputs
            self._weights |= {tensor.untyped_storage().data_ptr() for tensor in outputs}
        formula = _FORMULAS.get(operation.name().partition(".")[0])
        if formula is not None and outputs:
            macs, *operands = formula(args, outputs[0])
            self._charge(macs, operands, [t for t in tensors if t.ndim > 1], outputs[0])
        return result

    def _charge(self, macs: int, operands: Sequence[Tensor], read: Sequence[Tensor], output: Tensor) -> None:
        activations = [tensor for tensor in read if not self._is_weight(tensor)]
        inputs = sum(tensor.numel() for tensor in activations)
        gradients = sum(tensor.numel() for tensor in activations if tensor.requires_grad)
        learns = any(tensor.requires_grad for tensor in operands)
        name = self._stack[-1]
        self.layers[name] = self.layers.get(name, LayerCost()) + LayerCost(
            macs=macs,
            error_macs=macs * operands[0].requires_grad,
            weight_macs=macs * operands[1].requires_grad,
            input_elements=inputs,
            output_elements=output.numel(),
            weight_elements=sum(tensor.numel() for tensor in read if self._is_weight(tensor)),
            saved_elements=inputs if learns else 0,
            gradient_elements=output.numel() + gradients if learns else 0,
        )

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights
