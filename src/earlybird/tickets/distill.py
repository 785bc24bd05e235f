"""Soft labels: a network, or a ticket, learns what a trained teacher says of each image, beside the label itself.

Ma et al., "Good Students Play Big Lottery Better", 2021, https://arxiv.org/abs/2101.03255: a ticket that is trained
from its first weights on the soft labels of the dense network it was drawn from (KD ticket) is as good as one that is
rewound, and both together are better still; code https://github.com/VITA-Group/KD-ticket. Hinton et al., 2015,
https://arxiv.org/abs/1503.02531. With logits ``z`` of the student and ``t`` of the teacher, temperature ``T``, ``a`` =
``soft_share`` and the label ``y``,

    L = a T^2 KL(softmax(t / T) || softmax(z / T)) + (1 - a) CE(z, y)

What it saves: nothing by itself; it makes up for weights that are gone, so that more of them may go at the same
accuracy. Its price is the teacher's: training it, which is in the teacher's own bill, and its forward passes, which are
in this one's. With ``teacher_views`` they are made once: each image has so many augmentations, which come back in turn,
and what the teacher says of each is kept in a file that later runs on the same data read. It does *not* pay where the
teacher is no better than the student, or the student has room for all that the labels tell.

Deviations (``PRESETS['published']`` has none of them):

- ``kd_reduction``: the published KL is PyTorch's 'mean', over images *and* classes, so for n classes an n-th of the
  usual one, and the published ``T`` and ``a`` are for that, in 182 epochs. In short runs little is learnt from so weak
  a loss: after 6 epochs of 640 digits the published one is at 22 to 35 %, the usual one at 82 % and labels alone at
  84 %, with losses of 2.1, 0.5 and 0.7; after 12, at 48 to 76 %, 97 to 98 % and 95 to 97 % (two seeds, 2026-12);
- ``teacher_views``: augmentations come back in turn; with 0, the teacher runs on each batch, as published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird import ranks
from earlybird.calls import (
    Hook,
    as_call,
    first_sample,
    given_optimizers,
    is_distributed,
    processes,
    undisturbed,
    unwrapped,
)
from earlybird.cost.count import count
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.export import rebuild
from earlybird.files import read_json, read_tensors, write_tensors
from earlybird.ledger import Ledger, ledger_for
from earlybird.objective import Forward, claim_loss
from earlybird.settings import check_choice, check_number, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after

__all__ = ["Distillation", "Distilling", "Teacher", "soft_loss"]

_BATCH = 256
"""Images that the teacher sees at a time, where its logits are stored."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Hyper-parameters of distillation; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    teacher: str | None = option(None, "Run folder, or model.safetensors in it, of the trained teacher.", path=True)
    temperature: float = option(5.0, "Temperature T, above 0: the higher, the more small logits tell.")
    soft_share: float = option(0.9, "Share a of the soft labels in the loss, 0 to 1.")
    kd_reduction: Literal["mean", "batchmean"] = option(
        "batchmean", "KL as a mean over images, or over images and classes ('mean', published): as many times weaker."
    )
    kd_until: Step | None = option(None, "From when on labels alone count, such as '60ep'; default: never.")
    teacher_views: int = option(
        8, "Augmentations of an image, of which the teacher's logits are stored; 0: it runs on each batch (published)."
    )
    kd_storage: Literal["fp16", "fp32"] = option("fp16", "What stored logits are rounded to.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"kd_reduction": "mean", "teacher_views": 0},
    }

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, lambda t: 0 < t < math.inf, "a number above 0")
        check_number("soft_share", self.soft_share, lambda share: 0 <= share <= 1, "a share from 0 to 1")
        check_choice("kd_reduction", self.kd_reduction, ("mean", "batchmean"))
        check_choice("kd_storage", self.kd_storage, ("fp16", "fp32"))
        if self.kd_until is not None:
            object.__setattr__(self, "kd_until", Step.parse(self.kd_until))
        views = self.teacher_views
        if isinstance(views, bool) or not isinstance(views, int) or views < 0:
            raise InputError(f"teacher_views is {views!r}", needed="a whole number, 0 or more, such as 8")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run in which the teacher sees images, too, for `earlybird.forecast`.

        With ``teacher_views``, once for each of them, however many rounds there are; the papers' rules leave it out.

        Raises:
            InputError: There is no teacher to count.
        """
        if self.soft_share == 0:
            return stretches
        teacher, _ = rebuild(_named(self.teacher))
        total = sum(stretch.steps for stretch in stretches)
        if self.teacher_views:
            views = min(self.teacher_views, math.ceil(plan.total_steps / plan.steps_per_epoch))
            share, until = views * plan.steps_per_epoch / total, total
        else:
            share = 1.0
            until = total if self.kd_until is None else self.kd_until.in_iterations(plan.steps_per_epoch, round(total))
        taught = [replace(stretch, beside=(*stretch.beside, (teacher, share))) for stretch in stretches]
        return after(taught, until, lambda stretch: replace(stretch, beside=stretch.beside[:-1]))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        loader: Loader | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        training_steps: int | None = None,
        clock: Callable[[int], int] | None = None,
        label_smoothing: float = 0.0,
        class_names: Sequence[str] = (),
        folder: Path | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        ledger: Ledger | None = None,
    ) -> Distilling:
        """Start: from now on `Distilling.loss` is what is to be made small.

        Args:
            model: The module that is trained, on the device where it will be.
            optimizer: Its ``step`` is the clock; of several, the first one's.
            example_inputs: A batch of images that the model runs on.
            loader: Of the training images. With ``teacher_views``, it hands out the teacher's logits from now on, and
                each image's augmentations come back; without a loader, the teacher runs on each batch.
            steps_per_epoch: Optimizer steps in an epoch; needed when ``kd_until`` is given in epochs.
            total_steps: Optimizer steps of the run.
            training_steps: Of the schedule that ``clock`` goes by: that of one training, where the run trains more than
                once, and of the whole one, where it begins inside; default: ``total_steps``.
            clock: Where in one training the step after so many finished ones is; default: there.
            label_smoothing: Of the loss by the label.
            class_names: Of the data, to be compared with the teacher's.
            folder: Run folder, beside which logits are stored; default: they are only held in memory.
            autocast: Context of a forward pass that is made for the store.
            ledger: Where to record; by default an own one, which `Distilling.bill` reads.

        Raises:
            InputError: There is no teacher, it is for other images or classes, or another method decides the loss.
        """
        if (training_steps or total_steps) is None and self.kd_until is not None and self.kd_until.share:
            raise InputError("kd_until is a share of a run whose length is unknown", hint="pass total_steps to attach")
        until = None
        if self.kd_until is not None:
            until = self.kd_until.in_iterations(steps_per_epoch, training_steps or total_steps)
        epochs = math.ceil(total_steps / steps_per_epoch) if total_steps and steps_per_epoch else None
        return Distilling(
            self, model, optimizer, example_inputs, loader, until, epochs, clock, label_smoothing, class_names, folder,
            autocast, ledger,
        )  # fmt: skip


def soft_loss(
    z: Tensor, t: Tensor, temperature: float, reduction: Literal["mean", "batchmean"] = "batchmean"
) -> Tensor:  # fmt: skip
    """Return T^2 KL(softmax(t / T) || softmax(z / T)), shape ().

    Args:
        z: (N, classes), logits of the student.
        t: (N, classes), logits of the teacher; gets no gradient.
        temperature: T.
        reduction: Mean over images, or over images and classes.
    """
    student = functional.log_softmax(z.float() / temperature, 1)
    teacher = functional.log_softmax(t.detach().float() / temperature, 1)
    total = (teacher.exp() * (teacher - student)).sum()
    return temperature**2 * total / (z.numel() if reduction == "mean" else len(z))


class Teacher:
    """A trained network that only says what it thinks of images.

    Args:
        path: Run folder, or weights in it, or an exported network.
        device: Where it runs.
        mean: By which the images that it is shown were normalised; empty: as its own.
        std: The same.

    Attributes:
        blueprint: What it was built from.
        digest: Of its weights.
        cost: Of one image.

    Raises:
        InputError: It cannot be read.
    """

    def __init__(
        self, path: str | Path, device: torch.device, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:  # fmt: skip
        model, self.blueprint = rebuild(path)
        self._model = model.to(device).eval().requires_grad_(False)
        digest = hashlib.sha256(self.blueprint.to_json().encode())
        for name, tensor in self._model.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.digest = digest.hexdigest()
        self.cost = count(self._model, self.blueprint.example(2).to(device))
        self._scale: tuple[Tensor, Tensor] | None = None
        own = (self.blueprint.mean, self.blueprint.std)
        if all(own) and mean and (tuple(mean), tuple(std)) != own:
            theirs, ours = (torch.tensor(both, device=device).view(2, -1, 1, 1) for both in ((mean, std), own))
            self._scale = theirs[1] / ours[1], (theirs[0] - ours[0]) / ours[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of normalised images."""
        if self._scale is not None:
            images = images * self._scale[0] + self._scale[1]
        logits: Tensor = self._model(images)
        return logits.float()


class Distilling:
    """Running distillation, made by `Distillation.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        teacher: It, or None where labels alone count (``soft_share = 0``).
        views: Augmentations of an image whose logits are stored; 0: the teacher runs on each batch.
        store: File of the stored logits, or None.
    """

    def __init__(
        self,
        settings: Distillation,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        loader: Loader | None,
        until: int | None,
        epochs: int | None,
        clock: Callable[[int], int] | None,
        label_smoothing: float,
        class_names: Sequence[str],
        folder: Path | None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        ledger: Ledger | None,
    ) -> None:
        self.settings, self._until, self._clock = settings, until, clock
        self._smoothing = label_smoothing
        self._steps = 0
        model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self.teacher: Teacher | None = None
        if settings.soft_share > 0:
            self.teacher = _fitting_teacher(settings.teacher, model, example_inputs, loader, class_names)
        self._free = claim_loss(model, "distillation")
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger, example_inputs)
        self._handles: list[Any] = [optimizers[0].register_step_post_hook(Hook(self._after_step, self))]
        self.views = 0
        self.store: Path | None = None
        self._loader: Loader | None = None
        if self.teacher is not None and loader is not None and settings.teacher_views:
            self._loader = loader
            # an image is not shown more often than there are epochs
            self.views = settings.teacher_views if epochs is None else min(settings.teacher_views, epochs)
            loader.cycle = self.views
            with self._ledger.during("setup"):
                loader.beside = self._stored(self.teacher, loader, folder, autocast).to(loader.images.device)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape ().

        Args:
            forward: The model, or what wraps it.
            images: (N, C, H, W)
            labels: int64 (N,)
            beside: The teacher's logits of these images (N, classes), if they are known; else it runs.
        """
        settings = self.settings
        z = forward(images).float()
        hard = functional.cross_entropy(z, labels, label_smoothing=self._smoothing)
        if self.teacher is None or not self.teaches:
            return hard
        t = beside[0] if beside else self._say(self.teacher, images)
        soft = soft_loss(z, t, settings.temperature, settings.kd_reduction)
        return settings.soft_share * soft + (1 - settings.soft_share) * hard

    @property
    def teaches(self) -> bool:
        """Whether soft labels count in the next step."""
        now = self._steps if self._clock is None else self._clock(self._steps)
        return self.teacher is not None and (self._until is None or now < self._until)

    def bill(self) -> Any:
        """Return what was spent so far, the teacher's passes included, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: whether soft labels count."""
        return {} if self._until is None else {"soft": "yes" if self.teaches else "no"}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: how many steps were made, and what the own ledger holds."""
        return {"steps": self._steps, "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps = int(state["steps"])
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take the hook off; the loader's augmentations are new ones again, without logits beside them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._free()
        if self._loader is not None:
            self._loader.cycle, self._loader.beside = 0, None
        if self._own_ledger:
            self._ledger.stop()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1

    def _say(self, teacher: Teacher, images: Tensor) -> Tensor:
        with self._ledger.beyond_dense():
            logits = teacher(images)
            self._ledger.passes_of(teacher.cost, len(images))
        return logits

    def _stored(
        self, teacher: Teacher, loader: Loader, folder: Path | None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> Tensor:  # fmt: skip
        """Return the teacher's logits of all views of all images, (views, N, classes), from the file or computed."""
        with autocast():
            narrow = torch.is_autocast_enabled(loader.device.type)
        identity = {
            "teacher": teacher.digest, "images": _digest(loader.images), "seed": loader.seed, "views": self.views,
            "augment": repr(loader.augment), "mean": loader.mean, "std": loader.std, "bf16": narrow,
            "storage": self.settings.kd_storage,
        }  # fmt: skip
        text = json.dumps(identity, sort_keys=True)
        shape = (self.views, len(loader.images), teacher.blueprint.classes)
        dtype = torch.float16 if self.settings.kd_storage == "fp16" else torch.float32
        if folder is not None:
            name = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
            self.store = folder.absolute().parent / "teacher-logits" / name
        first = not is_distributed() or torch.distributed.get_rank() == 0
        found = _read(self.store, text, shape, dtype) if first and self.store is not None else None
        there = bool(ranks.all_texts("there" if found is not None else "")[0])
        logits = torch.zeros(shape, dtype=dtype) if found is None else found
        logits = logits.to(loader.device)
        if there:
            if processes() > 1:
                torch.distributed.broadcast(logits, 0)
            return logits
        part = slice(loader.rank, None, loader.world_size)
        for view in range(self.views):
            for index, images in loader.view(view, _BATCH, part):
                with autocast():
                    logits[view, index.to(logits.device)] = self._say(teacher, images).to(dtype)
        if processes() > 1:
            torch.distributed.all_reduce(logits)  # each rank has zeros but for its own images
        if not bool(logits.isfinite().all()):
            raise InputError(
                f"the teacher's logits are not all finite in {self.settings.kd_storage}",
                hint="check the teacher, or set kd_storage = 'fp32'",
            )
        if first and self.store is not None:
            write_tensors(self.store, {"logits": logits}, {"identity": text, "sha256": _digest(logits)})
        return logits


def _fitting_teacher(
    path: str | None, model: nn.Module, example_inputs: Any, loader: Loader | None, class_names: Sequence[str]
) -> Teacher:
    """Return the teacher, or refuse one that is for other images or classes."""
    path = _named(path)
    if example_inputs is None:
        raise InputError("no inputs to compare the teacher with", hint="pass example_inputs=x to attach")
    call = as_call(first_sample(example_inputs))
    with undisturbed(model), torch.no_grad():
        logits = model(*call.args, **call.kwargs)
    image = call.args[0]
    shown = {} if loader is None else {"mean": loader.mean, "std": loader.std}
    _check_its_head(Path(path))
    teacher = Teacher(path, image.device, **shown)
    known = teacher.blueprint
    wanted, found = tuple(image.shape[1:]), (known.in_channels, known.image_size, known.image_size)
    if found != wanted:
        raise InputError(f"the teacher {path} is for images {found}", needed=f"one for images {wanted}, as the data's")
    if known.classes != logits.shape[1]:
        raise InputError(
            f"the teacher {path} knows {known.classes} classes", needed=f"the {logits.shape[1]} of the model"
        )
    if class_names and known.class_names and tuple(class_names) != known.class_names:
        ours, theirs = next((a, b) for a, b in zip(class_names, known.class_names) if a != b)
        raise InputError(f"the teacher {path} has the class '{theirs}' in the place of '{ours}'",
                         needed="a teacher of the same data")  # fmt: skip
    return teacher


def _named(path: str | None) -> str:
    if path is None:
        raise InputError(
            "no teacher was named", needed="the run folder of a trained network", hint="set teacher = 'runs/NAME'"
        )
    return path


def _check_its_head(path: Path) -> None:
    """Refuse a pre-trained encoder: its last layer is as it was drawn, and says nothing of classes."""
    done = (path if path.is_dir() else path.parent) / "result.json"
    if (path.is_dir() or path.name == "model.safetensors") and done.is_file():
        result = read_json(done)
        if probe := isinstance(result, dict) and result.get("judged_by"):
            raise InputError(
                f"the teacher {path} was pre-trained without labels, and is judged by a {probe} probe",
                needed="a network whose own classifier is trained",
                hint=f"train it with start = '{path}', and take that run",
            )


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _read(path: Path, identity: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return the logits in a file, or None where it is not there or not what was written; then it says so."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        logits = tensors["logits"]
        whole = logits.shape == shape and logits.dtype == dtype and metadata["identity"] == identity
        if whole and metadata["sha256"] == _digest(logits):
            return logits
        wrong = "it does not match its checksum"
    except (InputError, KeyError) as error:
        wrong = f"{error}".splitlines()[0]
    warnings.warn(f"the teacher's logits in {path} are damaged ({wrong}); they are computed anew", stacklevel=2)
    return None
