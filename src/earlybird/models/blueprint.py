"""What a network was built from, in a few plain values, so that it can be built again without its data set."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from earlybird.errors import InputError
from earlybird.methods import METHODS
from earlybird.models import MODELS, build

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Blueprint"]


@dataclass(frozen=True)
class Blueprint:
    """What the original definition needs to be built again, and its images to be read as in training.

    Attributes:
        model: Zoo name or ``'package.module:function'``.
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels.
        width: Factor on the channels.
        mean: What is subtracted from each channel of an image in 0 to 1; empty if that is not known.
        std: What each channel is then divided by.
        class_names: In the order of the logits.
        conversions: Methods that replace layers of the model as built, in order: name, and settings as JSON.
    """

    model: str
    classes: int
    in_channels: int
    image_size: int
    width: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    conversions: tuple[tuple[str, str], ...] = ()

    @property
    def in_zoo(self) -> bool:
        """Whether `model` is a name of our own table; building anything else imports and calls what it names."""
        return self.model in MODELS

    def build(self, seed: int = 0) -> nn.Module:
        """Return the dense model with fresh weights, as `earlybird.models.build` draws them from ``seed``.

        Raises:
            InputError: It cannot be built, or not be converted.
        """
        model = build(
            self.model,
            classes=self.classes,
            in_channels=self.in_channels,
            image_size=self.image_size,
            width=self.width,
            seed=seed,
        )
        for name, settings in self.conversions:
            module, _, kind = METHODS[name].path.partition(":")
            try:
                method = getattr(importlib.import_module(module), kind)(**json.loads(settings))
            except TypeError as error:
                raise InputError(f"not settings of {name}: {settings[:80]}") from error
            method.convert(model, self.example(2), seed=seed)
        return model

    def example(self, batch: int = 1) -> Tensor:
        """Return images of noise, the same ones at each call, shape (batch, in_channels, image_size, image_size)."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.in_channels, self.image_size, self.image_size, generator=generator)

    def to_json(self) -> str:
        """Return the values as text, the same one for the same blueprint; `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Blueprint:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: ``text`` is not a blueprint.
        """
        try:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
            }
            found = cls(**values)
            sizes = (found.classes, found.in_channels, found.image_size)
            object.__setattr__(found, "conversions", tuple((name, text) for name, text in found.conversions))
            if not all(name in METHODS and isinstance(json.loads(text), dict) for name, text in found.conversions):
                raise ValueError("a conversion that is no method of ours")
            fits = isinstance(found.model, str) and all(type(size) is int and size > 0 for size in sizes)
            fits = fits and all(len(part) in (0, found.in_channels) for part in (found.mean, found.std))
            if not fits or not 0 < found.width < math.inf:
                raise ValueError("a name, whole sizes and a width above 0 are needed")
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"not a blueprint of a network: {text[:80]!r}") from error
        return found
