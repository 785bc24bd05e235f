"""Choose number format, memory layout, kernels and compilation by timed steps, and write down why.

Every candidate runs real training steps (forward, loss, backward, optimizer) of the run's model and batch (on a CPU,
where steps of thousands of images take seconds, of a part of it). They take turns, so that a busy machine slows all of
them alike; the first step of each is warm-up and is not counted; the fastest step of each stands for it. A candidate
must beat plain fp32 by 3 %, so that noise alone changes nothing. The winner then races against itself with kernels of
our own (`earlybird.kernels`), if the run is long enough for what that takes, some twenty steps.
`torch.compile` is tried only on runs that are long enough to pay for compiling twice (before and after the draw).

The time it takes belongs to the bill, phase ``setup``. A resumed run reuses what was written; it never tunes again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.kernels.convolution import Gain
from earlybird.kernels.install import Kernels, choose, install
from earlybird.train.recipe import Recipe

MARGIN = 0.03
"""By how much a candidate must be faster than plain fp32."""
SHARE = 0.01
"""Share of the estimated run that timing may take, once each candidate has had two steps."""
DROPPED = (3.0, 1.3)
"""A candidate this many times slower than the best is not timed further: after one timed step, and after more."""
ENOUGH_IMAGES = 256
"""On a CPU, which a small batch keeps busy, no more images than these are timed; a step is as many times longer."""
KERNELS_FROM_STEPS = 1000
"""Steps of the run, of as many images as are timed, from which kernels of our own are tried: it takes some 2 % then."""
_KERNEL_ROUNDS = 3
COMPILE_FROM_S = 3600.0
"""Estimated length of the run from which compiling is tried: half a minute of a CPU, so that it stays under 1 %."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a run computes.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, or ``bf16`` for autocast over fp32 weights.
        channels_last: Images in memory order NHWC.
        compile: The forward pass goes through `torch.compile`.
        threads: CPU threads; the last bits of sums depend on them.
        kernels: Which kernels of our own compute what PyTorch is slow at.
    """

    device: str
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    threads: int = 1
    kernels: Kernels = Kernels()

    @classmethod
    def read(cls, value: Any) -> Choice | None:
        """Return the choice that was written as a dict, or None if ``value`` is not one."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or {"kernels", *value} != fields:
            return None
        kernels = Kernels.read(value["kernels"]) if "kernels" in value else Kernels()  # before there were any
        if kernels is None:
            return None
        choice = cls(**{**value, "kernels": kernels})
        flags = type(choice.channels_last) is type(choice.compile) is bool
        known = choice.device in ("cpu", "cuda") and choice.precision in ("fp32", "bf16")
        return choice if flags and known and type(choice.threads) is int and choice.threads > 0 else None

    def __str__(self) -> str:
        words = [self.precision, "channels_last" if self.channels_last else "contiguous"]
        words.append("compiled" if self.compile else "eager")
        return " + ".join([*words, "own kernels"] if self.kernels else words)


def untuned(recipe: Recipe, device: torch.device) -> Choice:
    """Return what ``auto`` means without timing: plain on a CPU; bf16 and channels_last on CUDA that has bf16."""
    fast = device.type == "cuda" and not recipe.exact and torch.cuda.is_bf16_supported()
    return Choice(
        device=device.type,
        precision=("bf16" if fast else "fp32") if recipe.precision == "auto" else recipe.precision,
        channels_last=fast if recipe.channels_last == "auto" else recipe.channels_last,
        compile=False if recipe.compile == "auto" else recipe.compile,
        threads=torch.get_num_threads(),
    )


def tune(
    recipe: Recipe, build: Callable[[], nn.Module], images: Tensor, labels: Tensor, *, steps: int
) -> tuple[Choice, dict[str, Any]]:
    """Choose by timing.

    Args:
        recipe: Keys other than ``auto`` are taken as given.
        build: Makes the model, afresh each time; it is moved to the images' device here.
        images: One training batch, (n, channels, height, width), on the device of the run.
        labels: (n,)
        steps: Optimizer steps of the whole run.

    Returns:
        The choice and its record: candidates with seconds a step, the reason, seconds spent.
    """
    start = time.perf_counter()
    device = images.device
    batch = len(images)
    if device.type == "cpu":
        images, labels = images[:ENOUGH_IMAGES], labels[:ENOUGH_IMAGES]
    base = untuned(recipe, device)
    if recipe.exact or not recipe.tune:
        return base, _record(base, [], "exact" if recipe.exact else "tune is off", start)
    precisions = ["fp32", "bf16"] if recipe.precision == "auto" else [recipe.precision]
    layouts = [False, True] if recipe.channels_last == "auto" else [bool(recipe.channels_last)]
    candidates = [
        _Candidate(dataclasses.replace(base, precision=precision, channels_last=layout), batch / len(images))
        for precision in precisions
        for layout in layouts
    ]
    timed_steps = round(steps * batch / len(images))
    wants_kernels = recipe.kernels is True or (recipe.kernels == "auto" and timed_steps >= KERNELS_FROM_STEPS)
    wants_kernels = wants_kernels and device.type == "cpu"
    if len(candidates) == 1 and recipe.compile != "auto" and not wants_kernels:
        return candidates[0].choice, _record(candidates[0].choice, [], "every key was given", start)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        best, reason = _race(candidates, build, images, labels, steps)
        timed: list[Gain] = []
        if wants_kernels:
            best, timed, why = _try_kernels(best, candidates, build, images, labels)
            reason += f"; {why}"
        elif recipe.kernels == "auto" and device.type == "cpu":
            reason += f"; own kernels not tried: {timed_steps} steps, fewer than {KERNELS_FROM_STEPS}"
        if recipe.compile == "auto":
            length_s = best.seconds * steps
            if length_s < COMPILE_FROM_S:
                reason += f"; compile not tried: the run takes about {length_s:.0f} s, under {COMPILE_FROM_S:.0f} s"
            else:
                uncompiled = dataclasses.replace(best.choice, kernels=Kernels())  # the compiler has its own
                compiled = _Candidate(dataclasses.replace(uncompiled, compile=True), batch / len(images))
                candidates.append(compiled)
                best, why = _try_compile(compiled, best, build, images, labels, steps)
                reason += f"; {why}"
    return best.choice, _record(best.choice, candidates, reason, start, timed)


class _Candidate:
    """One choice with the steps that were timed for it, on one of ``parts`` equal parts of a batch."""

    def __init__(self, choice: Choice, parts: float) -> None:
        self.choice = choice
        self._parts = parts
        self.times_s: list[float] = []
        self.first_s = 0.0
        self.failure = ""
        self._step: Callable[[], None] | None = None

    @property
    def seconds(self) -> float:
        return min(self.times_s, default=float("inf"))

    @property
    def compile_s(self) -> float:
        """What the first step took longer than the others."""
        return self.first_s - self.seconds / self._parts

    def attempt(self, action: Callable[[], None]) -> bool:
        """Do ``action``; where it fails (an operator without bf16, a view of channels_last), keep why and return False.

        A missing kernel, compiler or gigabyte shows in many ways, and the run can go on without this candidate.
        """
        try:
            action()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            self.times_s.clear()
            self.release()
        return not self.failure

    def prepare(self, build: Callable[[], nn.Module], images: Tensor, labels: Tensor) -> None:
        layout = torch.channels_last if self.choice.channels_last else torch.contiguous_format
        # memory_format alone: Module.to takes it together with a device as well, but types do not say so
        model = build().to(images.device).train()
        model.to(memory_format=layout)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=layout)
        install(model, self.choice.kernels, images[:2])
        forward = torch.compile(model) if self.choice.compile else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        bf16 = self.choice.precision == "bf16"

        def step() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(forward(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        self._step = step
        self.first_s = self._time()

    def with_kernels(self, kernels: Kernels) -> _Candidate:
        """Return a candidate that differs in its kernels alone."""
        return _Candidate(dataclasses.replace(self.choice, kernels=kernels), self._parts)

    def time_once(self) -> None:
        self.times_s.append(self._time() * self._parts)

    def release(self) -> None:
        self._step = None

    def _time(self) -> float:
        assert self._step is not None
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start


def _race(
    candidates: list[_Candidate], build: Callable[[], nn.Module], images: Tensor, labels: Tensor, steps: int
) -> tuple[_Candidate, str]:
    racing = [
        candidate for candidate in candidates if candidate.attempt(partial(candidate.prepare, build, images, labels))
    ]
    start = time.perf_counter()
    for turn in range(20):
        racing = [candidate for candidate in racing if candidate.attempt(candidate.time_once)]
        if not racing and all(candidate.failure for candidate in candidates):
            raise InputError(
                f"the model cannot take a training step ({candidates[0].failure})",
                needed="a model that trains on one of: " + ", ".join(str(candidate.choice) for candidate in candidates),
            )
        best = min(candidate.seconds for candidate in candidates)
        spent = time.perf_counter() - start
        if turn >= 1 and spent > SHARE * best * steps:
            break
        for candidate in [c for c in racing if c.seconds > DROPPED[min(turn, 1)] * best]:
            racing.remove(candidate)
            candidate.release()
    for candidate in candidates:
        candidate.release()
    ran = [candidate for candidate in candidates if not candidate.failure]
    plain, best_of_all = ran[0], min(ran, key=lambda candidate: candidate.seconds)
    ratio = plain.seconds / best_of_all.seconds
    if best_of_all is plain:
        return plain, f"{plain.choice} is fastest: {_ms(plain)} a step"
    if ratio < 1 + MARGIN:
        return plain, f"{best_of_all.choice} gains only {ratio - 1:.1%} over {plain.choice} ({_ms(plain)} a step)"
    return best_of_all, (
        f"{best_of_all.choice} takes {_ms(best_of_all)} a step, {plain.choice} {_ms(plain)}: {ratio:.2f} times faster"
    )


def _try_kernels(
    plain: _Candidate,
    candidates: list[_Candidate],
    build: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
) -> tuple[_Candidate, list[Gain], str]:
    """Time single layers, then whole steps with what gained there; the candidate that is tried joins the others."""
    layout = torch.channels_last if plain.choice.channels_last else torch.contiguous_format
    model = build()
    model.to(memory_format=layout)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if plain.choice.precision == "bf16" else torch.float32
    kernels, timed = choose(model, images.contiguous(memory_format=layout), dtype)
    if not kernels:
        return plain, timed, "own kernels would not be faster"
    candidates.append(own := plain.with_kernels(kernels))
    rivals = (plain.with_kernels(Kernels()), own)
    for candidate in rivals:  # the winner's model was given back after the first race
        candidate.attempt(partial(candidate.prepare, build, images, labels))
    for _ in range(_KERNEL_ROUNDS):
        for candidate in rivals:
            if not candidate.failure:
                candidate.attempt(candidate.time_once)
    for candidate in rivals:
        candidate.release()
    if own.failure:
        return plain, timed, f"own kernels failed ({own.failure})"
    ratio = rivals[0].seconds / own.seconds
    text = f"own kernels ({kernels}) make a step {ratio:.2f} times as fast: {_ms(own)}"
    return (own if ratio > 1 + MARGIN else plain), timed, text


def _try_compile(
    compiled: _Candidate,
    eager: _Candidate,
    build: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    steps: int,
) -> tuple[_Candidate, str]:
    prepared = compiled.attempt(partial(compiled.prepare, build, images, labels))
    if not (prepared and all(compiled.attempt(compiled.time_once) for _ in range(3))):
        return eager, f"compile failed ({compiled.failure})"
    compiled.release()
    cost_s = compiled.compile_s
    gain_s = (eager.seconds - compiled.seconds) * steps
    text = f"compiled takes {_ms(compiled)} a step after {cost_s:.0f} s of compiling"
    if gain_s > 2 * cost_s:
        return compiled, f"{text}, and the run repays that with {gain_s:.0f} s"
    return eager, f"{text}, which the run would not repay"


def _ms(candidate: _Candidate) -> str:
    return f"{candidate.seconds * 1e3:.3g} ms"


def _record(
    choice: Choice, candidates: list[_Candidate], reason: str, start: float, timed: Sequence[Gain] = ()
) -> dict[str, Any]:
    rows = [
        {
            "precision": candidate.choice.precision,
            "channels_last": candidate.choice.channels_last,
            "compile": candidate.choice.compile,
            "kernels": bool(candidate.choice.kernels),
            "step_s": candidate.seconds if candidate.times_s else None,
            "steps_timed": len(candidate.times_s),
            "first_step_s": candidate.first_s,
            **({"failure": candidate.failure} if candidate.failure else {}),
        }
        for candidate in candidates
    ]
    return {
        "choice": dataclasses.asdict(choice),
        "reason": reason,
        "candidates": rows,
        "convolutions": [gain._asdict() for gain in timed],
        "seconds": time.perf_counter() - start,
    }
