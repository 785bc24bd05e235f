"""The models of the papers, by name, and models from outside as ``'package.module:factory'``.

Importing this module does not import torch: the table is plain text, and a family's file is loaded when one of its
models is built.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from earlybird.errors import InputError, nearest
from earlybird.settings import accepted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "ModelInfo", "build"]


@dataclass(frozen=True)
class ModelInfo:
    """One row of the table of models.

    Attributes:
        name: What to write after ``--model``.
        path: ``module:factory``.
        citation: Paper, with link.
    """

    name: str
    path: str
    citation: str


_VGG = "Simonyan and Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556"
_RESNET = "He et al., CVPR 2016, https://arxiv.org/abs/1512.03385"
_PREACT = "He et al., ECCV 2016, https://arxiv.org/abs/1603.05027"
_MOBILE = "Sandler et al., CVPR 2018, https://arxiv.org/abs/1801.04381"
_LENET = "LeCun et al., Proc. IEEE 1998; Frankle and Carbin, ICLR 2019, https://arxiv.org/abs/1803.03635"
_SPEEDRUN = "Jordan, 2024, https://arxiv.org/abs/2404.00498"

MODELS: dict[str, ModelInfo] = {
    name: ModelInfo(name, f"earlybird.models.{file}:{name}", citation)
    for file, citation, names in (
        ("lenet", _LENET, ("lenet300",)),
        ("small_cnn", _VGG, ("small_cnn",)),
        ("vgg", _VGG, ("vgg11", "vgg16", "vgg19")),
        ("resnet_cifar", _RESNET, tuple(f"resnet{depth}" for depth in (14, 20, 26, 32, 38, 44, 56, 74, 110))),
        ("preact_resnet", _PREACT, ("preact_resnet29", "preact_resnet56", "preact_resnet101", "preact_resnet164")),
        ("resnet", _RESNET, ("resnet18", "resnet34", "resnet50")),
        ("mobilenet_v2", _MOBILE, ("mobilenet_v2",)),
        ("speedrun", _SPEEDRUN, ("speedrun",)),
    )
    for name in names
}


def build(
    spec: str, *, classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0, seed: int = 0
) -> nn.Module:
    """Build the model ``spec`` with freshly drawn weights.

    A factory from outside gets those of ``classes`` (or ``num_classes``), ``in_channels``, ``image_size`` and
    ``width`` that its signature accepts; it is looked up in the current directory too. Its output is checked once on
    one empty image. PyTorch's global generator is left as it was.

    Args:
        spec: A name of `MODELS` or ``'package.module:factory'``.
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels.
        width: Factor on the channels of every layer.
        seed: Seed of the initial weights.

    Raises:
        InputError: Unknown name, module or factory; a factory that fails, returns no module, takes no ``width`` while
            one was asked for, or builds a model whose output does not match the classes.
    """
    import torch

    info = MODELS.get(spec)
    if info is None and ":" not in spec:
        raise InputError(
            f"unknown model {spec!r}",
            needed=f"one of {', '.join(MODELS)}, or 'package.module:factory'",
            hint=nearest(spec, MODELS),
        )
    factory = _find(spec if info is None else info.path)
    offered: dict[str, Any] = {
        "classes": classes,
        "num_classes": classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "width": width,
    }
    arguments = _accepted(factory, offered)
    if width != 1 and "width" not in arguments:
        raise InputError(
            f"{spec} takes no width, but width={width:g} was asked for",
            hint="leave width at 1, or give the factory a keyword argument 'width'" if info is None else "",
        )
    with torch.random.fork_rng(devices=()):
        # not torch.manual_seed: that would reseed the generators of every accelerator as well
        torch.default_generator.manual_seed(seed)
        if info is not None:
            model = factory(**arguments)
        else:
            try:
                model = factory(**arguments)
            except Exception as error:
                raise InputError(
                    f"{spec} failed: {type(error).__name__}: {error}",
                    hint="a factory with **kwargs is given classes, in_channels, image_size and width: wrap it in a "
                    "function that names what it takes"
                    if "unexpected keyword" in str(error)
                    else "",
                ) from error
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__}", needed="a torch.nn.Module")
    if info is None:
        _check_output(model, spec, classes=classes, in_channels=in_channels, image_size=image_size)
    return model


def takes_width(spec: str) -> bool:
    """Tell whether the factory ``'package.module:factory'`` takes a keyword argument ``width``.

    Raises:
        InputError: Unknown module or factory.
    """
    return "width" in _accepted(_find(spec), {"width": 1.0})


def _find(path: str) -> Callable[..., Any]:
    """Import ``'package.module:factory'``, looking in the current directory after the usual places."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise InputError(f"model {path!r}", needed="'package.module:factory'", hint="for example mypackage.nets:build")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"cannot import {module_name!r} for model {path!r}: {type(error).__name__}: {error}",
            hint=f"install it, or start from the folder that holds it (now {here})"
            if isinstance(error, ModuleNotFoundError)
            else "",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{module_name} has no {name!r}", hint=nearest(part, dir(found)))
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{path} is {type(found).__name__}", needed="a function or class that builds the model")
    return found  # type: ignore[no-any-return]


def _accepted(factory: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return those of ``offered`` that ``factory`` takes by keyword; with ``**kwargs`` it takes all but the alias."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        named = "num_classes" in parameters and "classes" not in parameters
        return {key: value for key, value in offered.items() if key != ("classes" if named else "num_classes")}
    return accepted(factory, offered)


def _check_output(model: nn.Module, spec: str, *, classes: int, in_channels: int, image_size: int) -> None:
    """Run one empty image through ``model`` in eval mode and compare the output's shape with the classes."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    first = next(model.parameters(), None)
    image = torch.zeros(1, in_channels, image_size, image_size)
    if first is not None:
        image = image.to(first.device, first.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            output = model.eval()(image)
    except Exception as error:
        raise InputError(
            f"{spec} cannot run on an image of shape ({in_channels}, {image_size}, {image_size}): "
            f"{type(error).__name__}: {error}",
            hint="let the factory take in_channels and image_size, or fit the images to the model with --image-size",
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != (1, classes):
        found = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else type(output).__name__
        raise InputError(
            f"{spec} gives {found} for an image",
            needed=f"one logit for each of the {classes} classes of the data",
            hint="let the factory take the keyword argument 'classes'",
        )
