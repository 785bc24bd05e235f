"""A running search for an early-bird ticket: it scores, looks, draws and shrinks from inside the optimizer's step.

`earlybird.tickets.early_bird` has the method and its source; here is its state, and how it hangs on a training loop.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from earlybird import data_parallel, ranks
from earlybird.calls import (
    Call,
    Hook,
    after_gradients,
    as_call,
    batch_size,
    call_from_state,
    first_sample,
    given_optimizers,
    hook_owners,
    is_distributed,
    processes,
    to_state,
    unwrapped,
)
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_of
from earlybird.objective import check_may_cut
from earlybird.settings import check_count
from earlybird.sharded import gathered, is_sharded, local
from earlybird.step import Step
from earlybird.tickets.claim import check_unclaimed
from earlybird.tickets.coupling import Group, find_groups, groups_from_state, groups_to_state
from earlybird.tickets.draw import ABSENT, draw_coupled, ranked, shuffle
from earlybird.tickets.layers import fitting_multiple, width
from earlybird.tickets.refit import dense_outputs, estimate_batch_norms, least_squares, share_statistics
from earlybird.tickets.scores import TaylorMean, batch_norms, score_channels
from earlybird.tickets.shrink import Change, check_supported, shrink, with_rounded
from earlybird.tickets.ticket import Ticket

if TYPE_CHECKING:
    from earlybird.tickets.early_bird import EarlyBird


class Search:
    """A running search, made by `EarlyBird.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        drawn: Whether the ticket has been drawn and the model shrunk; with stages, the last one.
        ticket: The drawn ticket, over the units of the dense model, or None; with stages, the newest.
        tickets: Keep ratio to ticket, for every ratio (and stage) that has been drawn.
        change: What the shrink changed, or None; with stages, all of them together.
        drawn_at: Optimizer step after which the ticket was drawn, or None; with stages, the newest.
        history: One entry a look and ratio: ``{'step', 'epoch', 'keep', 'distances', 'kept'}``; ``distances`` are
            those of the newest mask to the others in the window, 0 to 1. ``keep`` of a stage is its share.
    """

    def __init__(
        self,
        settings: EarlyBird,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        steps_per_epoch: int | None,
        total_steps: int | None,
        calibration: Callable[[], Iterable[Any]] | None,
        fresh: Callable[[], nn.Module] | None,
        ledger: Ledger | None,
        seed: int,
        averaged: nn.Module | Iterable[nn.Module],
    ) -> None:
        self.settings = settings
        self.ticket: Ticket | None = None
        self.tickets: dict[float, Ticket] = {}
        self.change: Change | None = None
        self.drawn_at: int | None = None
        self.history: list[dict[str, Any]] = []
        self._wrapper = data_parallel.wrapper_of(model)  # of several processes, as far as it is known
        self._wrapper_is_stale = False  # the model was cut, and the wrapper that its loop calls is not known yet
        self._model = model = unwrapped(model)
        self._optimizers = given_optimizers(optimizer)
        check_supported(model, self._optimizers, self._wrapper)
        self._example_inputs, self._calibration, self._seed = example_inputs, calibration, seed
        self._fresh = fresh
        self._steps_per_epoch = check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self._look_every = max(settings.look_every.in_iterations(steps_per_epoch, total_steps), 1)
        self._skip = settings.skip.in_iterations(steps_per_epoch, total_steps)
        self._deadlines = settings.deadlines(steps_per_epoch, total_steps)
        self._steps = 0
        self._cuts = 0  # of the settings' targets, those that the model has been cut to
        # over the channels of the dense model, like all masks here
        self._masks: dict[float, list[Tensor]] = {ratio: [] for ratio in (*settings.stages, *settings.ratios)}
        self._looked_at: list[int] = []
        self._groups: list[Group] | None = None  # of the dense model
        self._ranked: Tensor | None = None  # which of all channels may go: distances are over these
        self._last_call: Call | None = None
        self._sample: Call | None = None  # one of its rows, for those who resume
        self._autocast: tuple[str, torch.dtype] | None = None
        averages = [averaged] if isinstance(averaged, nn.Module) else averaged
        self._averaged = [_averaged(one, model) for one in averages]
        _check_partners(model, self._optimizers)
        self._check_ranks(total_steps, calibration)
        if settings.weights == "reinitialise" and fresh is None:
            _check_initialisers(model)
        norms = batch_norms(model) if settings.score != "magnitude" or settings.sparsity else {}
        trained = {name: norm for name, norm in norms.items() if norm.weight.requires_grad}
        if settings.score == "taylor" and not trained:
            raise InputError("all batch norms are frozen", hint="use score='bn_scale', which needs no gradient")
        self._norms = list(trained.values())
        self._taylor = TaylorMean(trained, settings.score_memory) if settings.score == "taylor" else None
        # The names and sizes of the dense layers: what a saved mask vector is read with.
        self._sizes = {name: value.numel() for name, value in self._scores_now().items()}
        if example_inputs is not None:  # what cannot work is said now, not after an epoch
            self._groups = find_groups(model, first_sample(example_inputs))
        self._own_ledger = ledger is None
        self._ledger = ledger_of(model) if ledger is None else ledger
        if self._own_ledger:
            self._ledger.watch(model, self._optimizers, example_inputs)
        self._ledger.enter("search")
        clock = self._optimizers[0]
        self._handles: list[Any] = [
            clock.register_step_pre_hook(Hook(self._before_step, self)),
            clock.register_step_post_hook(Hook(self._after_step, self)),
            # before FSDP2's, which may cast the inputs for the layers it shards
            model.register_forward_pre_hook(
                Hook(self._remember_call, self), with_kwargs=True, prepend=is_sharded(model)
            ),
        ]

    @property
    def drawn(self) -> bool:
        """Whether the ticket has been drawn and the model shrunk; with stages, the last one."""
        return self._cuts == len(self.settings.targets)

    @property
    def _watched(self) -> tuple[float, ...]:
        """The ratios that a look draws masks for; the first one is cut to next, or was at last."""
        stages = self.settings.stages
        return (stages[self._cuts],) if self._cuts < len(stages) else self.settings.ratios

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the last look's largest mask distance, or that the ticket is drawn."""
        if self.drawn:
            return {"ticket": f"drawn at step {self.drawn_at}"}
        distances: list[float] = next(
            (entry["distances"] for entry in reversed(self.history) if entry["keep"] == self._watched[0]), []
        )
        return {"distance": max(distances)} if distances else {}

    def distance_matrix(self, keep: float | None = None) -> tuple[list[int], Tensor]:
        """Return the distances of all looks to all looks: steps, and a matrix of shape (looks, looks), 0 to 1.

        They are over the channels that might have gone at the earlier of two looks: after a stage, there are fewer.

        Args:
            keep: One ratio, or one stage; by default the ratio that is trained, with all stages on the way to it.
        """
        ratios = self.settings.targets if keep is None else (keep,)
        masks = [mask for ratio in ratios for mask in self._masks[ratio]]
        if not masks:
            return [], torch.zeros(0, 0)
        stacked = torch.stack(masks).float()
        totals = torch.tensor([max(int(self._free(r).sum()), 1) for r in ratios for _ in self._masks[r]])
        steps = [entry["step"] for entry in self.history if entry["keep"] in ratios]
        return steps, torch.cdist(stacked, stacked, p=1) / torch.maximum(totals[:, None], totals)

    def detach(self) -> None:
        """Take all hooks off model and optimizer and stop the own ledger's clock; the run goes on as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()

    def retrace(self) -> None:
        """Follow the model's graph anew before the next look: some of its layers were replaced.

        Raises:
            InputError: A look was made, whose masks are of other layers.
        """
        if self._looked_at:
            raise InputError("the search has begun", hint="replace layers before the first step")
        self._groups = self._ranked = None
        self._sizes = {name: value.numel() for name, value in self._scores_now().items()}

    def __repr__(self) -> str:
        state = f"drawn at step {self.drawn_at}: {self.ticket}" if self.drawn else f"searching, step {self._steps}"
        return f"Search({state}, {len(self.history)} looks)"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers, strings and lists."""
        return {
            "steps": self._steps,
            "drawn_at": self.drawn_at,
            "score": self.settings.score,
            "stages": list(self.settings.stages),
            "sizes": dict(self._sizes),
            "history": [dict(entry) for entry in self.history],
            "looked_at": list(self._looked_at),
            "ranked": [] if self._ranked is None else self._ranked.nonzero().flatten().tolist(),
            "masks": {str(ratio): torch.stack(masks) for ratio, masks in self._masks.items() if masks},
            "taylor": {} if self._taylor is None else self._taylor.state_dict(),
            "change": None if self.change is None else self.change.to_json(),
            "groups": groups_to_state(self._groups or ()) if self._cuts else [],  # a model that was cut has others
            "example": self._saved_example(),
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
            "tickets": {
                str(ratio): {
                    "mask": torch.cat(list(ticket.masks.values())), "provenance": dict(ticket.provenance),
                } for ratio, ticket in self.tickets.items()
            },
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. When its ticket was drawn, a model and optimizer still dense are shrunk to it.

        In a distributed run, all ranks save, and all take over, at the same point. Load the weights and the optimizer's
        state after this, into the shapes that it leaves. Where weights are loaded before there is an optimizer, let
        `EarlyBird.cut` shrink the model before; it is left as it is then.

        Raises:
            InputError: The state belongs to another model or other keep ratios, or is from before the draw and the
                model is shrunk already. Nothing was changed.
        """
        if state["stages"] != list(self.settings.stages):
            raise InputError(f"the saved search has stages={state['stages']}", needed=f"{list(self.settings.stages)}")
        if {float(ratio) for ratio in state["masks"]} - set(self._masks):
            raise InputError(
                f"the saved search watched keep={list(state['masks'])}", needed=f"keep={self.settings.keep}"
            )
        if state["score"] != self.settings.score:
            raise InputError(f"the saved search has score '{state['score']}'", needed=f"'{self.settings.score}'")
        drawn = _drawn(self.settings, state)
        if self._cuts > len(drawn):
            raise _from_before(state)
        example = None if state["example"] is None else call_from_state(state["example"], self._device())
        inputs = next((x for x in (self._example_inputs, self._last_call, self._sample) if x is not None), example)
        cut = cut_as_saved(self._model, self.settings, state, inputs, self._optimizers, self._averaged)
        cuts = len(drawn) - self._cuts
        if cuts and self._taylor is not None:
            self._taylor.reset()  # it was made for a model that was whole
        if state["taylor"] and (self._taylor is None or not self._taylor.fits(state["taylor"])):
            raise _another_model()
        self._sizes = {name: int(size) for name, size in state["sizes"].items()}
        self._sample = self._sample or example
        self._steps = int(state["steps"])
        self.history = [dict(entry) for entry in state["history"]]
        self._looked_at = [int(step) for step in state["looked_at"]]
        if state["looked_at"]:
            self._ranked = torch.zeros(sum(self._sizes.values()), dtype=torch.bool)
            self._ranked[state["ranked"]] = True
        self._masks = {ratio: list(state["masks"].get(str(ratio), torch.zeros(0, 0)).bool()) for ratio in self._masks}
        self.tickets = {float(ratio): _saved_ticket(state, ratio) for ratio in state["tickets"]}
        if drawn and not self.drawn:
            self.drawn_at = int(state["drawn_at"])
            self.change = Change.from_json(state["change"])
            self._groups = groups_from_state(state["groups"])
            self._finish(self.tickets[drawn[-1]], cuts)
            if cut:
                self._refresh_wrapper(self.change)
            self._recount()
            if len(drawn) == len(self.settings.targets) and self._ledger.phase == "search":
                self._ledger.enter("train")
        if self._taylor is not None:
            self._taylor.load_state_dict(state["taylor"])
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def _scores_now(self) -> dict[str, Tensor]:
        """Return the current scores; those of Taylor are zeros before the first step."""
        if self._taylor is not None:
            return self._taylor.scores()
        return score_channels(self._model, self.settings.score)

    def _remember_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or (self.drawn and not self._wrapper_is_stale):
            return
        active = data_parallel.active_wrapper()
        if active is not None:
            self._wrapper = active
            if self._wrapper_is_stale and self.change is not None:
                self._refresh_wrapper(self.change)
        if self.drawn:
            return
        self._last_call = Call(args, kwargs)
        device = next(self._model.parameters()).device.type
        enabled = torch.is_autocast_enabled(device)
        self._autocast = (device, torch.get_autocast_dtype(device)) if enabled else None

    def _inputs(self) -> Any:
        found = self._last_call if self._example_inputs is None else self._example_inputs
        if found is None:
            raise InputError("no inputs to follow the model's graph with", hint="pass example_inputs=x to attach")
        return found

    def _saved_example(self) -> Any:
        """Return one row of what the model runs on: a loop that resumes may have no batch yet."""
        found = next((x for x in (self._example_inputs, self._last_call, self._sample) if x is not None), None)
        try:
            return None if found is None else to_state(first_sample(as_call(found)))
        except TypeError:  # they have to give one
            return None

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._steps and not self.drawn:
            _check_partners(self._model, self._optimizers, again=True)
        if not self._looked_at and not self._steps and self._skip == 0 and self.settings.score != "taylor":
            self._look()  # the published first look is at the untrained network
        if self.drawn and not self._norms:
            return None
        return after_gradients(args, kwargs, lambda: self._on_gradients(optimizer))

    def _on_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Score the channels, and add the L1 term."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under GradScaler unscales in its own kernel
        if self._taylor is not None and not self.drawn:
            self._taylor.move(scale)
        if self.settings.sparsity and (not self.drawn or self.settings.sparsity_after):
            norms = [norm for norm in self._norms if norm.weight.grad is not None]
            if norms:
                signs = torch._foreach_sign([local(norm.weight.detach()) for norm in norms])
                gradients = [local(norm.weight.grad) for norm in norms]  # type: ignore[arg-type]
                torch._foreach_add_(
                    gradients, signs, alpha=self.settings.sparsity * (1.0 if scale is None else float(scale))
                )

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._steps += 1
        if self.drawn:
            return
        if self._steps >= max(self._skip, 1) and self._steps % self._look_every == 0:
            self._look()
        if not self.drawn and self._deadlines is not None and self._steps >= self._deadlines[self._cuts]:
            self._draw_at_deadline()

    def _look(self) -> None:
        """Draw one mask a ratio and compare it with the last ones of its kind; draw the ticket when they agree."""
        if self._wrapper is not None:
            data_parallel.check(self._wrapper)
        scores = ranks.share(self._scores_now())
        everything = torch.cat([score.float() for score in scores.values()])
        if not torch.isfinite(everything).all():
            raise InputError(
                "the scores of the channels are not finite", hint="the training has diverged: lower the rate"
            )
        # of layers with one channel each, which is what small shares leave, all scores are 1
        alike = not self._cuts and len(everything) > 1 and bool((everything == everything[0]).all())
        if self._steps and alike and everything[0] != 0:
            raise InputError(
                f"all channels have the same score, {float(everything[0]):g}: there is nothing to choose by",
                hint="scales that do not learn (frozen, or optimizer = 'muon') cannot be ranked: use score='taylor' or "
                "'magnitude'",
            )
        if self._steps and self.settings.score == "taylor" and not everything.any():
            raise InputError(
                "no batch norm has had a gradient when the optimizer stepped",
                hint="step after backward and before zero_grad, or use score='bn_scale'",
            )
        if self._groups is None:
            self._groups = find_groups(self._model, first_sample(self._inputs()))
        if self._ranked is None:
            masks = ranked(self._sizes, self._groups, coupled=self.settings.coupled)
            self._ranked = torch.cat(list(masks.values()))
        watched, scores = self._watched, self._of_dense(scores)
        drawn = {ratio: torch.cat(list(self._draw_masks(scores, ratio).values())) for ratio in watched}
        self._looked_at.append(self._steps)
        for ratio, flat in drawn.items():
            free = self._free(ratio)
            queue = self._masks[ratio][-(self.settings.window - 1) :]
            distances = [float((flat ^ other)[free].float().mean()) for other in queue]
            self._masks[ratio].append(flat)
            epoch = self._steps / self._steps_per_epoch if self._steps_per_epoch else None
            entry = {
                "step": self._steps,
                "epoch": epoch,
                "keep": ratio,
                "distances": distances,
                "kept": int(flat.sum()),
            }
            self.history.append(entry)
            full = len(distances) == self.settings.window - 1
            if ratio not in self.tickets and full and max(distances) <= self.settings.tolerance:
                self.tickets[ratio] = self._ticket(flat, ratio, "agreement")
        primary = self.tickets.get(watched[0])
        if primary is not None:
            for ratio in watched:
                if ratio not in self.tickets:  # nothing is looked at after the cut
                    best, _ = self._best_look(ratio)
                    self.tickets[ratio] = self._ticket(self._masks[ratio][best], ratio, "the first ratio was drawn")
            self._draw(primary)

    def _draw_masks(self, scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
        assert self._groups is not None
        s = self.settings
        masks = draw_coupled(
            scores, self._groups, ratio, coupled=s.coupled, scope=s.scope,
            macs_share=None if ratio in s.stages else s.macs_share, round_to=self._round_to(), strict=s.strict,
        )  # fmt: skip
        if self.ticket is None:
            return masks
        # a bound on MACs sets a floor to each layer's width, which an earlier stage may have gone below
        return {name: masks[name] & stays for name, stays in self.ticket.masks.items()}

    def _of_dense(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of the model as it is as those of the dense one's channels; what has gone ranks last."""
        if self.ticket is None or self.change is None:
            return scores
        spread = {}
        for name, stays in self.ticket.masks.items():
            score = torch.full((len(stays),), ABSENT)
            score[self.change.kept.get(name, slice(None))] = scores[name].detach().float().cpu()
            spread[name] = score.masked_fill(~stays, ABSENT)  # what could not be cut was silenced
        return spread

    def _free(self, ratio: float) -> Tensor:
        """Return which of the dense model's channels might go in the search for ``ratio``: shape (channels,)."""
        assert self._ranked is not None
        before = [stage for stage in self.settings.stages if stage > ratio]
        if not before:
            return self._ranked
        return self._ranked & torch.cat(list(self.tickets[before[-1]].masks.values()))

    def _round_to(self) -> int:
        if self.settings.round_to is not None:
            return self.settings.round_to
        return fitting_multiple(max(self._sizes.values()), next(self._model.parameters()).device)

    def _ticket(self, flat: Tensor, ratio: float, reason: str) -> Ticket:
        masks = dict(zip(self._sizes, flat.split(list(self._sizes.values()))))
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        before = [
            {key: self.tickets[stage].provenance[key] for key in ("keep", "step", "reason")}
            for stage in self.settings.stages[: self._cuts]
        ]
        return Ticket(
            masks,
            provenance={
                "method": "early_bird", "keep": ratio, "step": self._steps, "reason": reason,
                **({"after": before} if before else {}),
                "settings": {k: str(v) if isinstance(v, Step) else v for k, v in settings.items()},
            },
        )  # fmt: skip

    def _draw_at_deadline(self) -> None:
        watched = self._watched
        if not self._masks[watched[0]]:
            self._look()
        for ratio in watched:
            if ratio in self.tickets:
                continue
            best, worst = self._best_look(ratio)
            self.tickets[ratio] = self._ticket(self._masks[ratio][best], ratio, "deadline")
            looks = [entry["step"] for entry in self.history if entry["keep"] == ratio]
            deadline = f"step {self._steps}" if ratio in self.settings.stages else self.settings.deadline
            warnings.warn(
                f"no agreement by the deadline ({deadline}): keep={ratio} draws the mask of step "
                f"{looks[best]}, distance {worst:.3f} (tolerance {self.settings.tolerance})",
                stacklevel=2,
            )
        self._draw(self.tickets[watched[0]])

    def _best_look(self, ratio: float) -> tuple[int, float]:
        """Return the look that agreed best with those before it (the latest of equals), and its largest distance.

        Looks with a full window go first, since an early one has fewer masks to disagree with; without any, the last.
        """
        worst = [
            (max(entry["distances"], default=1.0), len(entry["distances"]) == self.settings.window - 1)
            for entry in self.history if entry["keep"] == ratio
        ]  # fmt: skip
        full = [i for i, (_, is_full) in enumerate(worst) if is_full]
        best = min(full, key=lambda i: (worst[i][0], -i)) if full else len(worst) - 1
        return best, worst[best][0]

    def _draw(self, ticket: Ticket) -> None:
        """Shrink model and optimizer to the ticket, and mend what the settings ask for."""
        settings, before = self.settings, self.change
        if self._wrapper is not None:
            data_parallel.check(self._wrapper)
        ranks.check_alike(ranks.of_masks(ticket.masks), "all ranks need the same model, settings and seed")
        with self._ledger.during("draw"):
            batches: Iterable[Any] = ()
            if settings.refit != "none":
                last = [] if self._last_call is None else [self._last_call]
                batches = last if self._calibration is None else self._calibration()
            solve = settings.refit == "least_squares" and settings.weights == "continue"
            joined, batches = _joined(batches) if solve else (None, batches)
            targets: dict[str, Tensor] = {}
            if joined is not None:
                with self._as_in_training(), gathered(self._model):
                    targets = dense_outputs(self._model, joined)
                self._ledger.passes(batch_size(joined), inputs=joined)
            inputs = first_sample(self._inputs())
            scores = ranks.share(self._scores_now())
            if settings.shuffle:
                assert self._groups is not None
                generator = torch.Generator().manual_seed(self._seed + self._cuts)
                among = None if self.ticket is None else self.ticket.masks
                masks, drawn = shuffle(ticket.masks, self._groups, generator, among)
                ticket = Ticket(masks, ticket.kinds, ticket.provenance)
                scores = drawn if before is None else before.left(drawn)
            with ranks.all_or_none():
                change = shrink(
                    self._model, _left(ticket, before), inputs, optimizer=self._optimizers,
                    groups=self._groups if before is None else None, round_to=self._round_to(), scores=scores,
                )  # fmt: skip
            self._refresh_wrapper(change)
            self.change = change if before is None else before.then(change)
            ticket = with_rounded(ticket, self.change.rounded)
            self.tickets[self._watched[0]] = ticket
            # From here on the model is the small one, whatever else may fail.
            self.drawn_at = self._steps
            self._finish(ticket)
            for averaged in self._averaged:
                shrink(averaged, _left(ticket, before), inputs)
            if settings.weights == "reinitialise":
                with gathered(self._model):
                    if self._fresh is None:
                        _reinitialise(self._model, self._seed)
                    else:
                        _copy_fresh(self._model, self._fresh(), ticket, inputs)
            if settings.optimizer_state == "reset" or settings.weights == "reinitialise":
                for optimizer in self._optimizers:
                    optimizer.state.clear()
            self._recount(inputs)
            if change.layers or change.silenced:  # an identity ticket leaves nothing to mend
                with gathered(self._model):
                    self._refit(joined, targets, batches, change)
                if settings.refit != "none":
                    share_statistics(self._model)
        if self.drawn:
            self._ledger.enter("train")

    def _refresh_wrapper(self, change: Change) -> None:
        """Let the wrapper that the loop calls know of the cut, as soon as it is known."""
        cut = bool(change.layers)
        self._wrapper_is_stale = cut and self._wrapper is None and is_distributed()
        if cut and self._wrapper is not None:
            data_parallel.refresh(self._wrapper)
        self._wrapper = None  # it may be replaced by another; nobody should keep it

    def _check_ranks(self, total_steps: int | None, calibration: Any) -> None:
        """Refuse ranks that would draw different tickets, or not at the same step."""
        if processes() > 1 and self.settings.refit == "least_squares" and calibration is None:
            raise InputError(
                "refit='least_squares' would solve for another batch on each rank",
                hint="pass calibration, a function that returns the same batches on all ranks",
            )
        ranks.check_alike(ranks.of_model(self._model), "build the same model on all ranks")
        told = ranks.of_settings(
            self.settings, steps_per_epoch=self._steps_per_epoch, total_steps=total_steps, seed=self._seed
        )
        ranks.check_alike(told, "attach with the same on all ranks")

    def _recount(self, inputs: Any = None) -> None:
        """Let every ledger on the model know what it costs now: this search's, other methods', the user's own."""
        for ledger in {self._ledger, *hook_owners(self._model, Ledger)}:
            ledger.recount(self._model, inputs)

    def _refit(self, joined: Any, targets: Mapping[str, Tensor], batches: Iterable[Any], change: Change) -> None:
        try:
            with self._as_in_training():
                if targets:
                    least_squares(self._model, joined, targets, change.kept)
                    self._ledger.passes(batch_size(joined), inputs=joined)
                estimate_batch_norms(self._model, self._ledger.passing(batches))
        except (RuntimeError, ValueError) as error:  # the cut stands, and training mends what the refit would have
            warnings.warn(f"the refit after the cut failed, training goes on without: {error}", stacklevel=2)

    def _as_in_training(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._autocast[0], self._autocast[1])

    def _finish(self, ticket: Ticket, cuts: int = 1) -> None:
        """Go on with a model that was cut: with the next search, of which nothing is there yet, or without."""
        self.ticket = ticket
        self._cuts += cuts
        if not self.drawn:
            if self._taylor is not None:
                self._taylor.reset()
            return
        if self._example_inputs is None and self._last_call is not None:
            self._sample = first_sample(self._last_call)
        self._taylor = self._last_call = self._groups = None
        if not self.settings.sparsity_after:
            self._norms = []


def cut_as_saved(
    model: nn.Module,
    settings: EarlyBird,
    state: Mapping[str, Any],
    example_inputs: Any,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    averaged: Iterable[nn.Module] = (),
) -> bool:
    """Shrink what is still dense to the ticket of a saved search (see `EarlyBird.cut`); tell whether the model was."""
    sizes = {name: int(size) for name, size in state["sizes"].items()}
    drawn = _drawn(settings, state)
    lengths = {masks.shape[1] for masks in state["masks"].values()} | {sum(sizes.values())}
    modules = dict(model.named_modules())
    if len(lengths) > 1 or any(name not in modules for name in sizes):
        raise _another_model()
    widths = {name: width(modules[name]) or 0 for name in sizes}
    dense = widths == sizes
    shrunk = not dense and all(widths[name] <= size for name, size in sizes.items())
    if not drawn:
        if not dense:
            raise _from_before(state) if shrunk else _another_model()
        return False
    change, ticket = Change.from_json(state["change"]), _saved_ticket(state, str(drawn[-1]))
    cut = False
    for one, own in ((model, optimizers), *((copy, ()) for copy in averaged)):
        if _is_cut(one, change):
            continue
        if not dense:
            raise _cut_otherwise(state) if shrunk else _another_model()
        if example_inputs is None:
            raise InputError("no inputs to follow the model's graph with", hint="pass example_inputs=x")
        shrink(one, ticket, first_sample(example_inputs), optimizer=own)  # at once, in however many stages it was
        cut = cut or one is model
    return cut


def _drawn(settings: EarlyBird, state: Mapping[str, Any]) -> list[float]:
    """Return which of the targets a saved search had cut its model to."""
    return [] if state["change"] is None else [ratio for ratio in settings.targets if str(ratio) in state["tickets"]]


def _left(ticket: Ticket, change: Change | None) -> Ticket:
    """Return a ticket over the dense model's units as one over those that the cuts before have left."""
    return ticket if change is None else Ticket(change.left(ticket.masks), ticket.kinds, ticket.provenance)


def _is_cut(model: nn.Module, change: Change) -> bool:
    """Tell whether ``model`` has the widths that ``change`` left."""
    modules = dict(model.named_modules())
    written = {name: sides["out"][1] for name, sides in change.layers.items() if "out" in sides and name in modules}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters == change.parameters_after and all(
        width(modules[name]) == channels for name, channels in written.items()
    )


def _saved_ticket(state: Mapping[str, Any], ratio: str) -> Ticket:
    saved, sizes = state["tickets"][ratio], state["sizes"]
    parts = saved["mask"].bool().cpu().split(list(sizes.values()))
    return Ticket(dict(zip(sizes, parts)), provenance=saved["provenance"])


def _another_model() -> InputError:
    return InputError("the saved search belongs to another model", needed="the model it was drawn from")


def _from_before(state: Mapping[str, Any]) -> InputError:
    return InputError(
        f"the saved search (step {state['steps']}) is from before its ticket was drawn, but this model is shrunk",
        hint="build model and optimizer anew, and load into them",
    )


def _cut_otherwise(state: Mapping[str, Any]) -> InputError:
    return InputError(
        f"the saved search (step {state['steps']}) had cut its model otherwise than this one is, or had another",
        hint="build model and optimizer anew, and load into them",
    )


def _averaged(copy: nn.Module, model: nn.Module) -> nn.Module:
    """Return what a moving average keeps, if it has the shapes of ``model``."""
    found = unwrapped(copy.module if isinstance(copy, AveragedModel) else copy)
    if {n: p.shape for n, p in found.named_parameters()} != {n: p.shape for n, p in model.named_parameters()}:
        raise InputError(
            f"the averaged {type(found).__name__} has other parameters than the model that is trained",
            needed="a copy of it, such as torch.optim.swa_utils.AveragedModel(model)",
        )
    return found


def _check_partners(model: nn.Module, optimizers: list[torch.optim.Optimizer], *, again: bool = False) -> None:
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise InputError(
            "LBFGS keeps directions over all weights at once, which cannot be cut",
            hint="use another optimizer, or draw and shrink before its first step (earlybird.draw, earlybird.shrink)",
        )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if trainable and len(missing) == len(trainable):
        if again:
            raise InputError(
                "the model's parameters were replaced after the search was attached",
                hint="wrap, shard and move the model first, make its optimizer, then attach",
            )
        raise InputError("the optimizer holds no parameter of the model", hint="pass the optimizer that trains it")
    if again:
        return
    if missing:
        warnings.warn(
            f"no given optimizer holds {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: if another one "
            "does, pass it too, or its state will not follow the cut",
            stacklevel=4,
        )
    check_unclaimed(model, "early_bird")
    check_may_cut(model, "early_bird")
    if not all(search.drawn for search in hook_owners(model, Search)):
        raise InputError("a search is attached to this model already", hint="call its detach() first")


def _check_initialisers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) and not callable(getattr(module, "reset_parameters", None)):
            raise InputError(
                f"layer '{name}' ({type(module).__name__}) has no reset_parameters()",
                needed="one for weights='reinitialise'",
                hint="add it, pass fresh, a function that builds the model anew, or use weights='continue'",
            )


def _joined(batches: Iterable[Any]) -> tuple[Any, list[Any]]:
    """Return inputs for the least squares (512 samples of plain tensors, else the first batch), and all batches."""
    found = list(batches)
    tensors = [b.args[0] if isinstance(b, Call) and len(b.args) == 1 and not b.kwargs else b for b in found]
    if found and all(isinstance(tensor, Tensor) for tensor in tensors):
        return torch.cat(tensors)[:512], found
    return (found[0] if found else None), found


def _copy_fresh(model: nn.Module, fresh: nn.Module, ticket: Ticket, inputs: Any) -> None:
    """Give the shrunk ``model`` the weights and buffers of a new dense model, cut to the same ticket."""
    fresh.to(next(model.parameters()).device)
    shrink(fresh, ticket, inputs)
    with torch.no_grad():
        for own, new in zip((*model.parameters(), *model.buffers()), (*fresh.parameters(), *fresh.buffers())):
            own.copy_(new)


def _reinitialise(model: nn.Module, seed: int) -> None:
    """Draw all weights anew with each module's own ``reset_parameters``; the global generators stay untouched."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(seed)
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.reset_parameters()  # type: ignore[operator]
