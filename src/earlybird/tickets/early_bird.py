"""Early-Bird: train dense just until the ticket stops changing, then shrink and train only the small network.

You et al., Drawing Early-Bird Tickets: Toward More Efficient Training of Deep Networks, ICLR 2020, arXiv 1909.11957;
reference code github.com/RICE-EIC/Early-Bird-Tickets.

Every ``look_every`` a mask ``m_t`` is drawn from the channel scores and pushed into a queue of ``window`` masks. The
ticket is drawn as soon as the newest mask agrees with all others in the queue:

    max over i in queue of  ||m_t - m_i||_1 / N  <=  tolerance

What it saves: seconds, MACs, bytes and energy of every step after the draw, and of inference, because the shrink is
real. It does *not* pay when training ends soon after the draw, when layers are already so narrow that the device is
idle, or when ``keep`` is so large that little goes.

With ``stages`` that is repeated: the network is cut to the first share of its channels, searched again with new masks
and new scores, cut to the next share, and at last to ``keep``. Shares and masks are over the channels of the dense
network, so that the ticket is one cut of it, however many it took.

N counts the channels that are ranked: those that residual sums keep whole could never differ.

Deviations of the default, each with the published behaviour under ``EarlyBird(**EarlyBird.PRESETS['published'])``:

- ``score``: a running mean of the first-order Taylor term, each layer's over its own norm, instead of ``|gamma|`` (in
  the first epochs of a short run masks of ``|gamma|`` keep changing, by 0.3 and more), without the L1 term
  (``sparsity``) that ``|gamma|`` needs;
- ``look_every``, ``skip``, ``window``, ``deadline``: eight looks an epoch after a quarter of the first, three masks
  that agree, a draw after one epoch at the latest; published: one look an epoch, from the untrained network on, five;
- ``coupled``: channels of residual sums go as groups instead of staying whole;
- ``refit``: batch-norm statistics are estimated anew after the cut, and momentum stays (``optimizer_state``) instead of
  starting empty;
- ``round_to``, ``strict``: widths that suit the device, and exactly ``keep``, instead of the threshold alone.

The reference code's networks also start with batch-norm scales of 0.5, ours with 1; that is the model's matter, not
the preset's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from earlybird.calls import call_from_state, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.settings import check_share, option
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch, after
from earlybird.tickets.draw import Coupled, Scope, draw
from earlybird.tickets.scores import SCORES
from earlybird.tickets.search import Search, cut_as_saved
from earlybird.tickets.shrink import shrink


@dataclass(frozen=True, kw_only=True)
class EarlyBird:
    """Hyper-parameters of the search for an early-bird ticket; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    keep: float | tuple[float, ...] = option(
        0.5,
        "Share of the channels that stay, in (0, 1]; of several, the first one is trained, the others are only drawn.",
    )
    stages: tuple[float, ...] = option(
        (),
        "Shares of the channels to cut to on the way to keep, falling, such as 0.75; after each cut, what is left is "
        "searched anew.",
    )
    score: Literal["taylor", "bn_scale", "magnitude"] = option("taylor", "What a channel is worth.")
    score_memory: float = option(0.998, "Decay a step of the running mean of Taylor scores, in [0, 1).")
    macs_share: float | None = option(
        None,
        "Upper bound on the ticket's MACs as a share of dense; the ranking then knows what a channel costs. Stages are "
        "not bound.",
    )
    look_every: Step = option(Step.parse("0.125ep"), "How often a mask is drawn and compared.")
    skip: Step = option(Step.parse("0.25ep"), "Warm-up: looks before this point are left out.")
    window: int = option(3, "How many masks must agree, the newest included.")
    tolerance: float = option(0.1, "Largest mask distance that counts as agreement, 0 to 1.")
    deadline: Step | None = option(
        Step.parse("1ep"),
        "When to draw the best ticket so far, agreed or not; 'none' waits. Stages share the time from skip on equally.",
    )
    sparsity: float = option(0.0, "L1 subgradient added to batch-norm scales during the search.")
    sparsity_after: bool = option(False, "Keep the L1 term on after the draw.")
    scope: Scope = option("network", "Rank the whole 'network' together, or each 'layer' by itself.")
    coupled: Coupled = option(
        "group", "Channels of residual sums: 'whole' never cuts them, 'group' cuts them together."
    )
    weights: Literal["continue", "reinitialise"] = option("continue", "Go on with the dense weights, or start anew.")
    optimizer_state: Literal["keep", "reset"] = option("keep", "Go on with the optimizer's state, or start empty.")
    refit: Literal["none", "batch_norm", "least_squares"] = option("batch_norm", "What is mended right after the cut.")
    round_to: int | None = option(None, "Multiple that widths are rounded up to; 'none' takes what suits the device.")
    shuffle: bool = option(
        False, "Control experiment: as many channels a layer as the ticket keeps, but chosen at random."
    )
    strict: bool = option(False, "Compare scores with the published 'score > threshold'.")

    KEEP_KEY: ClassVar[str] = "keep"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {
            "score": "bn_scale", "look_every": Step.parse("1ep"), "skip": Step.parse("0it"), "window": 5,
            "tolerance": 0.1, "deadline": None, "sparsity": 1e-4, "sparsity_after": True, "coupled": "whole",
            "weights": "continue", "optimizer_state": "reset", "refit": "none", "round_to": 1, "strict": True,
        },
        "fast": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        several = isinstance(self.keep, (tuple, list))
        ratios = tuple(check_share("keep", k) for k in (self.keep if several else (self.keep,)))  # type: ignore[union-attr]
        if not ratios:
            raise InputError("keep names no ratio", needed="a share greater than 0 and at most 1")
        if len(set(ratios)) != len(ratios):
            raise InputError(f"keep names a ratio twice: {self.keep!r}")
        object.__setattr__(self, "keep", ratios if several else ratios[0])
        self._check_stages()
        if str(self.deadline) == "none":
            object.__setattr__(self, "deadline", None)
        for name in ("look_every", "skip", "deadline"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Step.parse(value))
        if self.look_every == Step():
            raise InputError("look_every is zero", needed="a positive step such as '0.25ep' or '50it'")
        for name, allowed in (
            ("score", SCORES), ("scope", ("network", "layer")), ("coupled", ("whole", "group")),
            ("weights", ("continue", "reinitialise")), ("optimizer_state", ("keep", "reset")),
            ("refit", ("none", "batch_norm", "least_squares")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}", needed=f"one of {', '.join(allowed)}")
        for name, low, high in (("score_memory", 0.0, 1.0), ("tolerance", 0.0, 1.0), ("sparsity", 0.0, math.inf)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or (value == high and name != "tolerance"):
                raise InputError(f"{name} is {value!r}", needed=f"a number from {low:g} to {high:g}")
        for name, least, optional in (("window", 2, False), ("round_to", 1, True)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and not (optional and value is None):
                raise InputError(f"{name} is {value!r}", needed=f"a whole number of at least {least}")
        for name in ("sparsity_after", "shuffle", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}", needed="true or false")
        if self.strict and self.scope == "layer":
            raise InputError("strict is the published threshold over the whole network", hint="use scope='network'")
        if self.macs_share is not None:
            object.__setattr__(self, "macs_share", check_share("macs_share", self.macs_share))

    def _check_stages(self) -> None:
        if not isinstance(self.stages, (tuple, list)):
            raise InputError(f"stages is {self.stages!r}", needed="several shares, such as (0.75,)")
        object.__setattr__(self, "stages", tuple(check_share("stages", share) for share in self.stages))
        falling = (1.0, *self.targets)
        if self.stages and any(later >= earlier for earlier, later in pairwise(falling)):
            raise InputError(
                f"stages is {self.stages!r}", needed=f"falling shares, below 1 and above keep ({self.ratios[0]:g})"
            )
        if self.stages and len(self.ratios) > 1:
            raise InputError(
                f"stages on the way to several ratios, keep={self.keep!r}: what the first cut removes, none can keep",
                hint="name one ratio, or leave stages out",
            )
        if self.stages and self.weights == "reinitialise":
            raise InputError(
                "stages with weights='reinitialise': each cut would throw away what the next search has to rank",
                hint="use weights='continue', or leave stages out",
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> EarlyBird:
        """Return the preset called ``name`` (see ``PRESETS``), with ``changes`` on top."""
        if name not in cls.PRESETS:
            raise InputError(f"unknown preset '{name}'", needed=f"one of {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    @property
    def ratios(self) -> tuple[float, ...]:
        """All keep ratios that are watched; the first one is trained."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    @property
    def targets(self) -> tuple[float, ...]:
        """The shares of the channels that the network is cut to, one after another; the last one is trained."""
        return (*self.stages, self.ratios[0])

    def deadlines(self, steps_per_epoch: int | None, total_steps: int | None) -> list[int] | None:
        """Return the optimizer steps at which each of `targets` is cut to at the latest, or None without a deadline.

        The last one is the deadline itself; the time before it, without the warm-up (``skip``), is shared equally.

        Raises:
            InputError: There is not a step for each.
        """
        if self.deadline is None:
            return None
        count = len(self.targets)
        last = max(self.deadline.in_iterations(steps_per_epoch, total_steps), 1)
        first = min(self.skip.in_iterations(steps_per_epoch, total_steps), last)
        if count > 1 and last - first < count:
            raise InputError(
                f"{count} cuts between step {first} (skip) and step {last} (deadline)",
                needed="at least one step for each",
                hint="raise deadline, lower skip, or name fewer stages",
            )
        return [first + (last - first) * number // count for number in range(1, count + 1)]

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run that shrinks, for `earlybird.forecast`.

        A ticket is drawn at its deadline (without one, at the end of a full window) and keeps the same share of each
        layer's channels, since the scores of a network that was not trained rank nothing.
        """
        total = round(sum(stretch.steps for stretch in stretches))
        per_epoch = round(plan.steps_per_epoch * total / plan.total_steps)
        full = self.window * self.look_every.in_iterations(per_epoch, total)
        skip = self.skip.in_iterations(per_epoch, total)
        draws = self.deadlines(per_epoch, total) or [skip + full * (at + 1) for at in range(len(self.targets))]
        whole: dict[int, nn.Module] = {}  # by a shrunk model, the dense one that it was
        small: dict[tuple[int, float], nn.Module] = {}

        def shrunk(stretch: Stretch, keep: float) -> Stretch:
            dense = whole.get(id(stretch.model), stretch.model)
            if (id(dense), keep) not in small:
                model, images = copy.deepcopy(dense), plan.images()
                ticket = draw(
                    model, keep, score="magnitude", example_inputs=images, coupled=self.coupled, scope="layer",
                    macs_share=self.macs_share if keep == self.ratios[0] else None,
                )  # fmt: skip
                shrink(model, ticket, images, round_to=self.round_to or 8)
                small[id(dense), keep], whole[id(model)] = model, dense
            return replace(stretch, model=small[id(dense), keep])

        for keep, step in zip(self.targets, draws):
            stretches = after(stretches, step, partial(shrunk, keep=keep))
        return stretches

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        calibration: Callable[[], Iterable[Any]] | None = None,
        fresh: Callable[[], nn.Module] | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
        averaged: nn.Module | Iterable[nn.Module] = (),
    ) -> Search:
        """Start the search; from here on an ordinary training loop does the rest.

        Args:
            model: The module that is trained; wrappers of torch.compile, DistributedDataParallel and Lightning Fabric
                are seen through. Parameters may be sharded (``fully_shard``). In a distributed run all ranks attach
                with the same settings, and all draw the same ticket at the same step.
            optimizer: The optimizer over its parameters; the draw happens inside its ``step()``. Of several, all are
                sliced, and the first one keeps the clock.
            example_inputs: A tensor, tuple or dict the model runs on; a batch of one is enough. Default: the training
                batch at hand when the graph is first needed.
            steps_per_epoch: Optimizer steps in an epoch; needed when a step is given in epochs.
            total_steps: Optimizer steps of the whole training; needed when a step is a share of it ('10%').
            calibration: Returns batches of training inputs for the refit, the same ones at each call. Default: the
                inputs of the step at which the ticket is drawn.
            fresh: Builds the dense model with new weights, for ``weights='reinitialise'``. Default: each layer's
                ``reset_parameters``, which may draw from another distribution than the model's own definition.
            ledger: Where to record; by default an own one, which `Search.bill` reads.
            seed: For weights that are drawn anew.
            averaged: A copy of the model that holds a moving average of its weights, such as
                `torch.optim.swa_utils.AveragedModel`, or several: cut together with it.

        Returns:
            The running search.

        Raises:
            InputError: The model has nothing to rank or is searched already, no optimizer holds its parameters, there
                is no time for all stages, or ranks of a distributed run differ in model or settings.
            ShrinkError: The graph of the model cannot be followed (with ``example_inputs``; else at the first look).
        """
        return Search(
            self, model, optimizer, example_inputs, steps_per_epoch, total_steps, calibration, fresh, ledger, seed,
            averaged,
        )  # fmt: skip

    def cut(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        example_inputs: Any = None,
        averaged: Iterable[nn.Module] = (),
    ) -> None:
        """Shrink a dense ``model`` to the ticket of a saved search, without an optimizer.

        For loops that load weights before there is one: cut, load the weights, make the optimizer, `attach`, and let
        `Search.load_state_dict` take over the state. What is shrunk already, and a search that has not drawn, change
        nothing.

        Args:
            model: The module that is trained.
            state: What `Search.state_dict` returned.
            example_inputs: As for `attach`; by default one row of a batch that the search had saved.
            averaged: As for `attach`.

        Raises:
            InputError: The state belongs to another model, or is from before the draw and the model is shrunk.
        """
        if example_inputs is None and state["example"] is not None:
            example_inputs = call_from_state(state["example"], next(model.parameters()).device)
        cut_as_saved(unwrapped(model), self, state, example_inputs, averaged=averaged)
