"""Progressive resizing: train on small images first, and on whole ones only towards the end.

Introduced by J. Howard for fast.ai's DAWNBench entry (2018); the schedule and its defaults are those of the method
"Progressive Resizing" of MosaicML's Composer. With ``q`` the share of the run that is done, ``a`` = ``grow_from``,
``b`` = ``whole_from``, the side of an image is multiplied by

    initial_scale + (1 - initial_scale) * clip((q - a) / (b - a), 0, 1)

and rounded to ``size_step`` pixels; pixels are means over those they cover (Composer takes the nearest). A convolution
costs as much less as there are fewer pixels: a quarter at half the side. Evaluation always sees whole images; so does
what the network ends on.

What it saves: seconds, MACs and moved bytes of the steps on small images, at once and in any loop. It does *not* pay
where details decide (small objects, text), where the network has been pooled down to few pixels already, or with
``torch.compile`` on short runs, since each size is compiled anew. Targets that are images, too (segmentation), are not
resized. Accuracies of the first part of a run look worse than the network is: it is trained for another size than it
is evaluated at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.calls import Call, Hook, as_call, first_sample, given_optimizers, hook_owners, undisturbed, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.settings import check_count, check_share, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after


@dataclass(frozen=True, kw_only=True)
class ProgressiveResizing:
    """Hyper-parameters of progressive resizing; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    initial_scale: float = option(0.5, "Side of the first images as a share of the whole, in (0, 1].")
    grow_from: Step = option(Step.parse("50%"), "When images begin to grow.")
    whole_from: Step = option(Step.parse("80%"), "From when on images are whole.")
    size_step: int = option(4, "Multiple of pixels to which sides are rounded.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # with an early ticket: small images as long as it is searched for
        "fast": {"grow_from": Step.parse("1ep"), "whole_from": Step.parse("1ep")},
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial_scale", check_share("initial_scale", self.initial_scale))
        for name in ("grow_from", "whole_from"):
            object.__setattr__(self, name, Step.parse(getattr(self, name)))
        check_count("size_step", self.size_step, "4 (pixels)", optional=False)
        grow, whole = self.grow_from, self.whole_from
        if (grow, whole) == (Step(share=grow.share), Step(share=whole.share)) and grow.share > whole.share:
            raise _late(self)

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run on smaller images, one for each size, for `earlybird.forecast`."""
        total = round(sum(stretch.steps for stretch in stretches))
        per_epoch = round(plan.steps_per_epoch * total / plan.total_steps)
        grow, whole = (point.in_iterations(per_epoch, total) for point in (self.grow_from, self.whole_from))
        done = 0
        for side, steps in groupby(
            _side(plan.shape[1], _scale(self.initial_scale, step, grow, whole), self.size_step) for step in range(total)
        ):
            stretches = after(stretches, done, partial(replace, side=side))
            done += sum(1 for _ in steps)
        return stretches

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
    ) -> Resizing:
        """Start resizing: from now on, images that the model is called with in training are made smaller.

        Args:
            model: The module that is trained; its first argument is a batch of images (N, C, H, W).
            optimizer: Its ``step`` is the clock; of several, the first one's.
            example_inputs: A batch of images, or a tuple that begins with one: the model is tried on one of them, as
                small as it will get. By default, too small an image is noticed in the first step.
            steps_per_epoch: Optimizer steps in an epoch; needed when a point is given in epochs.
            total_steps: Optimizer steps of the training; needed when a point is a share of it, as by default.
            ledger: Where to record; by default an own one, which `Resizing.bill` reads.

        Returns:
            The running method.

        Raises:
            InputError: A length is not known, images would have to be whole before they begin to grow or only after
                the end, the model does not run on images as small, or its images are resized already.
        """
        return Resizing(self, model, optimizer, example_inputs, steps_per_epoch, total_steps, ledger)


class Resizing:
    """Running progressive resizing, made by `ProgressiveResizing.attach`; all its state is in `state_dict`."""

    def __init__(
        self,
        settings: ProgressiveResizing,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
    ) -> None:
        check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings = settings
        self._grow_from = settings.grow_from.in_iterations(steps_per_epoch, total_steps)
        self._whole_from = settings.whole_from.in_iterations(steps_per_epoch, total_steps)
        if self._whole_from < self._grow_from:
            raise _late(settings)
        if total_steps is not None and self._whole_from > total_steps:
            raise InputError(
                f"whole_from = {settings.whole_from} comes after the end of the run ({total_steps} steps)",
                hint="lower it: the network has to end on whole images",
            )
        self._steps = 0
        self._side: int | None = None  # of the last training images
        model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        if hook_owners(model, Resizing):
            raise InputError(
                "the images of this model are resized already", hint="call detach() of the other one first"
            )
        if example_inputs is not None:
            _check_runs(model, as_call(first_sample(example_inputs)), settings)
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger)
        self._handles: list[Any] = [
            # before all other hooks: whoever counts or scores shall see what the model sees
            model.register_forward_pre_hook(Hook(self._before_forward, self), prepend=True, with_kwargs=True),
            optimizers[0].register_step_post_hook(Hook(self._after_step, self)),
        ]

    @property
    def scale(self) -> float:
        """Factor on the side of the images of the next step."""
        return _scale(self.settings.initial_scale, self._steps, self._grow_from, self._whole_from)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the side of the images, while they are not whole."""
        return {"images": f"{self._side} px"} if self._side is not None and self.scale < 1 else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: how many steps were made, and what the own ledger holds."""
        return {"steps": self._steps, "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps = int(state["steps"])
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off model and optimizer; images stay whole from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return None
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            raise InputError(
                f"{type(module).__name__} was not called with a batch of images (N, C, H, W) as first argument",
                hint="leave progressive resizing out for this model",
            )
        for ledger in ledgers_on(module, self._ledger):
            ledger.count_whole(Call(args, kwargs))
        resized = resize(args[0], self.scale, self.settings.size_step)
        self._side = resized.shape[-1]
        return (resized, *args[1:]), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1


def _scale(first: float, step: int, grow_from: int, whole_from: int) -> float:
    """Return the factor on the side of the images of the step that follows ``step`` finished ones."""
    if step >= whole_from:
        return 1.0
    return first + (1 - first) * max(step - grow_from, 0) / max(whole_from - grow_from, 1)


def _side(whole: int, scale: float, step: int) -> int:
    """Return a side of ``whole`` pixels times ``scale``, rounded to a multiple of ``step``."""
    return whole if scale >= 1 else min(max(round(whole * scale / step), 1) * step, whole)


def _late(settings: ProgressiveResizing) -> InputError:
    return InputError(
        f"whole_from = {settings.whole_from} comes before grow_from = {settings.grow_from}",
        hint="raise whole_from or lower grow_from",
    )


def _check_runs(model: nn.Module, call: Call, settings: ProgressiveResizing) -> None:
    """Refuse a model that does not run on the smallest images: one that flattens them, or pools them to nothing."""
    if not call.args or not isinstance(call.args[0], Tensor) or call.args[0].ndim != 4:
        return  # the first step will say what is wrong
    small = resize(call.args[0], settings.initial_scale, settings.size_step)
    with undisturbed(model), torch.no_grad():
        try:
            model(small, *call.args[1:], **call.kwargs)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} does not run on images of {small.shape[-2]} x {small.shape[-1]} pixels: "
                f"{type(error).__name__}: {error}",
                hint="raise initial_scale or size_step, or leave progressive resizing out",
            ) from error


def resize(images: Tensor, scale: float, step: int = 1) -> Tensor:
    """Return smaller images, each pixel a mean over those it covers (bilinear with antialiasing).

    Args:
        images: Floating point (N, C, H, W).
        scale: Factor on both sides, in (0, 1].
        step: Sides are rounded to the nearest multiple of this, at least one and at most the whole side.

    Returns:
        (N, C, h, w) of the same type, device and memory format; ``images`` itself where nothing changes.
    """
    if scale >= 1:
        return images
    height, width = (_side(side, scale, step) for side in images.shape[-2:])
    if (height, width) == tuple(images.shape[-2:]):
        return images
    # by the strides: an image of one channel is contiguous either way
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    # in float32: on a CPU, antialiasing has no kernel for shorter types
    small = functional.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
    return small.to(images.dtype, memory_format=layout)
