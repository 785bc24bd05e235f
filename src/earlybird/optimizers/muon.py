"""Muon: momentum that is made orthogonal before each step, for filters; SGD for everything else.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/; here as in the CIFAR-10 speed-run, where filters have a constant norm
(github.com/KellerJordan/cifar10-airbench, ``airbench94_muon.py``). For a filter ``W``, flattened to a matrix, with
gradient ``G``:

    M <- momentum * M + G
    W <- sqrt(rows) * W / ||W||                          (Frobenius norm)
    W <- W - lr * orthogonalise(G + momentum * M)        (Nesterov)

What it saves: steps, so every column of the bill. It does *not* pay with small batches, since it costs the same
whatever the batch: for the speed-run network 3.2 GMAC a step, as much as nine training images. They are timed, but not
counted. Of 7.8 s of one core for a step of 2000 images in bfloat16, they took 0.04 s in bfloat16 and 0.07 s in float32
(AMD EPYC with AVX-512 BF16, PyTorch 2.13, 2026-11-21).

PyTorch's own `torch.optim.Muon` takes matrices only, and does not hold their norm.

Deviations: the gradient's norm is bounded from below by the smallest number instead of raised by 1e-7, which depended
on the loss being summed over the batch; so is that of the weights, which a filter of zeros survives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from earlybird.errors import InputError
from earlybird.tickets.layers import Conv, is_norm, mixes_channels

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that each Newton-Schulz step applies to the singular values: steep at 0, near 1 around 1."""
STEPS = 3


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``orthogonal``, SGD with momentum for the others, in one optimizer.

    A group whose rate is 0 stays as it is, momentum included.

    Args:
        params: Parameters, or groups of them, as for any optimizer.
        lr: Learning rate.
        momentum: 0 to 1.
        nesterov: Step along gradient plus momentum instead of along the momentum alone.
        weight_decay: L2 penalty; no use where the norm is constant.
        orthogonal: Step by Muon; its parameters have two dimensions or more, the first one for outputs.
        dtype: Type in which matrices are made orthogonal, by default their own; published: bfloat16.

    Raises:
        InputError: A parameter of a group with ``orthogonal`` is a vector.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 0.24,
        momentum: float = 0.6,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        orthogonal: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "orthogonal": orthogonal,
                "dtype": dtype,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        vectors = [tuple(parameter.shape) for parameter in added["params"] if parameter.ndim < 2]
        if added["orthogonal"] and vectors:
            self.param_groups.pop()
            raise InputError(
                f"a parameter of shape {vectors[0]} cannot be orthogonal", needed="two dimensions or more",
                hint="put vectors into a group with orthogonal=False",
            )  # fmt: skip

    @overload
    def step(self, closure: None = ...) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["lr"] else ():
                if parameter.grad is None:
                    continue
                direction = self._direction(parameter, group)
                if group["orthogonal"]:
                    norm = parameter.norm().clamp_min(torch.finfo(parameter.dtype).tiny)
                    parameter.div_(norm).mul_(len(parameter) ** 0.5)
                    direction = orthogonalise(direction.flatten(1).to(group["dtype"])).view(parameter.shape)
                parameter.add_(direction, alpha=-group["lr"])
        return loss

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Move the momentum and return the direction that SGD would go."""
        assert parameter.grad is not None
        gradient = parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


def orthogonalise(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """Return ``U S' V^T`` for ``matrix = U S V^T``, with all of ``S'`` near 1, by Newton-Schulz steps.

    Few steps and steep coefficients bring the singular values near 1, roughly 0.5 to 1.5, but not to it; that is as
    good for training. Those below a hundredth of the matrix's norm stay below one half.

    Args:
        matrix: (rows, columns).
        steps: Each is three matrix products.

    Returns:
        Same shape and type.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # the products are between the short sides
    x = x / x.norm().clamp_min(
        torch.finfo(x.dtype).tiny
    )  # the Frobenius norm is no smaller than the largest singular value
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        x = torch.addmm(x, polynomial, x, beta=a)  # a X + (b A + c A^2) X
    return x.T if tall else x


def by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the parameters that learn by what they are, which shape and place decide.

    Layers are linear layers and convolutions, in order of definition; depthwise ones are neither first nor last.

    Returns:
        ``head``: the weight of the last layer; ``stem``: the bias of the first layer; ``scales``: the weights of norms;
        ``filters``: the weights of all other layers; ``biases``: all that is left: biases, embeddings, tokens.
    """
    layers = [module for module in model.modules() if mixes_channels(module)]
    special = {id(module.weight): "scales" for module in model.modules() if is_norm(module)}
    special |= {id(module.weight): "filters" for module in model.modules() if isinstance(module, (Conv, nn.Linear))}
    if layers:
        special[id(layers[0].bias)] = "stem"
        special[id(layers[-1].weight)] = "head"
    roles: dict[str, list[nn.Parameter]] = {"filters": [], "head": [], "biases": [], "stem": [], "scales": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = special.get(id(parameter), "biases")
            roles[role].append(parameter)
    return roles
