"""A classifier as a backbone: its feature maps, and a head on them that is trained in the classifier's place.

The map of a resolution is the output of the last module that gives one of it, so that the maps of the stages of a
network come without naming its layers. The classifier's own last layer stays as it was drawn; the head belongs to the
method: it is in the optimizer, in a group like the last layer's, but not in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import Call, Hook, as_call, given_optimizers, undisturbed, unwrapped
from earlybird.cost.count import ModelCost, count
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.pretraining.encoder import Encoder, EncoderRun

__all__ = ["Backbone", "HeadTask", "find_maps"]

Head = Callable[[Sequence[int], int], nn.Module]
"""Makes a head from the channels of the maps that it is called with, one argument each, and the number of classes."""


def find_maps(model: nn.Module, example_inputs: Any) -> dict[str, torch.Size]:
    """Return the names of the modules whose outputs are the feature maps, finest first, and the shapes of these.

    Args:
        model: Calls modules that return (N, C, H, W) on the way.
        example_inputs: A batch that it runs on.

    Raises:
        InputError: No module returns a map of more than one pixel, or there are no inputs.
    """
    if example_inputs is None:
        raise InputError("no inputs to find the feature maps with", hint="pass example_inputs=x to attach")
    found: dict[tuple[int, ...], tuple[str, torch.Size]] = {}  # resolution to the last one that has it

    def seen(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
            found[tuple(output.shape[2:])] = name, output.shape

    call = as_call(example_inputs)
    with undisturbed(model), torch.no_grad():
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(partial(seen, name))
        model(*call.args, **call.kwargs)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no feature maps of more than one pixel",
            needed="a convolutional network, and images that it does not pool to nothing",
            hint="set a larger image_size, or take another model",
        )
    return dict(found[size] for size in sorted(found, reverse=True))


class Backbone(Encoder):
    """A model that is trained by a head on its feature maps.

    Args:
        model, optimizers, example_inputs, seed, method: As of `Encoder`.
        head: See `Head`.
        maps: Names of the modules that give the maps, and the shapes of these, from `find_maps`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        example_inputs: Any,
        head: Head,
        seed: int,
        method: str,
        maps: Mapping[str, torch.Size],
    ) -> None:
        self.shapes = dict(maps)
        self._maps: dict[str, Tensor] = {}
        channels = [shape[1] for shape in maps.values()]
        super().__init__(
            model, optimizers, example_inputs, lambda _: head(channels, self.head.out_features), seed, method
        )
        for name in maps:
            hook = Hook(partial(self._keep, name), self)
            self._handles.append(self.model.get_submodule(name).register_forward_hook(hook))

    def run(self, forward: Callable[[Tensor], Any], images: Tensor, ledger: Ledger) -> Any:
        """Return what the head makes of ``images``, and charge it; ``forward`` is the model, or what wraps it."""
        self._wanted = True
        try:
            forward(images)
        finally:
            self._wanted, self._features = False, None
        maps, self._maps = self._maps, {}
        if maps.keys() != self.shapes.keys():
            raise InputError(
                "the model was called without some of its layers",
                needed="the model that the method was attached to, or what wraps it",
            )
        output = self.projector(*(maps[name] for name in self.shapes))
        ledger.passes_of(self._cost, len(images), training=torch.is_grad_enabled())
        return output

    def _count(self) -> ModelCost:
        weight = self.head.weight
        maps = tuple(torch.zeros(2, *s[1:], device=weight.device, dtype=weight.dtype) for s in self.shapes.values())
        return count(self.projector, Call(maps, {}))

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._wanted:
            self._maps[name] = output


class HeadTask(EncoderRun):
    """What running methods share that train a backbone by a head on its maps; they add loss and measure.

    Args:
        method: Its name.
        judged_by: What the accuracy of the run is that of.
        looked_for: ``'mask'`` or ``'box'``: what the targets of the loaders have to be.
        model: The module that is trained; its last layer is frozen.
        optimizer: Gets the head; of several, the first one.
        head: See `Head`.
        coarsest: Whether the head reads the last map alone.
        example_inputs: A batch that the model runs on.
        loader: Of the training images; hands out its targets from now on.
        test: Of the test images; the same.
        ledger: Where to record; None: an own one.
        seed: Of the head's weights.

    Attributes:
        encoder: The backbone; its ``projector`` is the head.
        judged_by: What the accuracy of the run is that of.

    Raises:
        InputError: The loaders' targets are none, or others; they are augmented; or as for `Encoder`.
    """

    def __init__(
        self,
        method: str,
        judged_by: str,
        looked_for: str,
        model: nn.Module,
        optimizer: Any,
        *,
        head: Head,
        coarsest: bool,
        example_inputs: Any,
        loader: Loader | None,
        test: Loader | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self._loaders = [one for one in (loader, test) if one is not None]
        for one in self._loaders:
            _check_targets(one, method, looked_for)
        optimizers = given_optimizers(optimizer)
        maps = find_maps(unwrapped(model), example_inputs)
        if coarsest:
            maps = dict(list(maps.items())[-1:])
        self._check_maps(maps)
        self._backbone = Backbone(model, optimizers, example_inputs, head, seed, method, maps)
        self.judged_by = judged_by
        super().__init__(self._backbone, optimizers, example_inputs, ledger)
        for one in self._loaders:
            assert one.targets is not None
            one.beside = one.targets[None]  # one view

    def _check_maps(self, maps: Mapping[str, torch.Size]) -> None:
        """Raise an `InputError` where the maps do not suit the head."""

    def outputs(self, forward: Callable[[Tensor], Any], images: Tensor) -> Any:
        """Return what the head makes of images (N, C, H, W), in float32."""
        output = self._backbone.run(forward, images, self._ledger)
        return output.float()

    def files(self) -> dict[str, Any]:
        """Return the head's weights, by file name."""
        return {"head.safetensors": dict(self.encoder.projector.state_dict())}

    def detach(self) -> None:
        """Take hooks and head away; the last layer learns again, and the loaders hand out no targets."""
        super().detach()
        for one in self._loaders:
            one.beside = None


def _check_targets(loader: Loader, method: str, looked_for: str) -> None:
    targets = loader.targets
    kind = "" if targets is None else "box" if targets.dim() == 2 else "mask"
    if kind != looked_for:
        example = {"mask": "a folder with images and masks", "box": "mnist:boxes"}[looked_for]
        found = f"a {kind} for each image" if kind else "classes alone"
        raise InputError(f"{method} looks for a {looked_for} in each image, and the data have {found}",
                         needed=f"data such as {example}")  # fmt: skip
    augment = loader.augment
    if augment.crop or augment.flip or augment.cutout:
        raise InputError(
            f"{method} knows where things are in an image, and crop, flip or cutout moves or hides them",
            hint="set crop = 0, flip = false and cutout = 0",
        )


def targets_of(beside: tuple[Tensor, ...], method: str) -> Tensor:
    """Return the targets that a loader hands out beside images and labels, or raise an `InputError`."""
    if not beside:
        raise InputError(
            f"{method} was given no targets", hint="pass them after the labels, or loader=loader to attach"
        )
    return beside[0]
