"""Batch norms folded into the convolutions before them, for inference.

In eval mode a batch norm is ``y = gamma (x - mean) / sqrt(variance + eps) + beta``, with numbers that stay, so that the
convolution can do it with other weights and another bias. It saves a pass over every feature map. Results differ by
rounding.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from earlybird.calls import undisturbed, unwrapped
from earlybird.kernels.readers import sole_readers

__all__ = ["fold_batch_norms"]


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy in eval mode, in which batch norms that can be part of a convolution are `nn.Identity`.

    A batch norm can where it alone reads a convolution, in a pass over the example, both are called once in it and have
    one name each, and it has running statistics. All others stay. Names of modules stay, too; folded convolutions have
    a bias.

    Args:
        model: Left as it is.
        example_inputs: What it is called with.
    """
    folded = copy.deepcopy(unwrapped(model)).eval()
    calls: Counter[nn.Module] = Counter()
    with undisturbed(folded):
        handles = [
            module.register_forward_pre_hook(lambda module, args: calls.update([module])) for module in folded.modules()
        ]
        try:
            with torch.no_grad():  # what is saved for a backward pass would look like one more reader
                alone = sole_readers(folded, example_inputs, nn.Conv2d, nn.BatchNorm2d)
        finally:
            for handle in handles:
                handle.remove()
    names: dict[nn.Module, list[str]] = {}
    for name, module in folded.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for convolution, (norm, *_) in alone.items():
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        once = calls[convolution] == calls[norm] == len(names[convolution]) == len(names[norm]) == 1
        if once and norm.running_mean is not None:
            folded.set_submodule(names[convolution][0], fuse_conv_bn_eval(convolution, norm))
            folded.set_submodule(names[norm][0], nn.Identity())
    return folded
