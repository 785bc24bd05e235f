"""Which tensors kernels of our own may be given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_eager"]


def is_eager(x: Tensor) -> bool:
    """Tell whether ``x`` is a tensor with numbers in a CPU's memory, of which first gradients are asked at most.

    What transforms of `torch.func`, forward-mode gradients and tracing need, PyTorch's own operators have alone.
    """
    return (
        not torch.compiler.is_compiling()  # first, since dynamo cannot see through some others
        and type(x) is Tensor  # what only looks like one has no memory of its own
        and x.layout is torch.strided
        and x.device.type == "cpu"
        and x.numel() > 0
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )
