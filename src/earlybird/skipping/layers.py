"""Layer skipping: gates that choose, for each sample, which residual blocks it passes, forward and backward.

The part of E2-Train called SLU, input-dependent selective layer update (Wang et al., E2-Train: Training
State-of-the-art CNNs with Over 80% Energy Savings, NeurIPS 2019, https://arxiv.org/abs/1910.13349; reference code
github.com/RICE-EIC/E2Train), with the recurrent gate of SkipNet (`earlybird.skipping.gates`). Sample i runs block l
with probability

    p = sigmoid(score_l(x_i) - price * cost_l)        else its input goes on in the place of the output

where cost_l is the block's MACs, relative to the mean block's. The price is moved after each step so that the share of
the residual blocks' MACs that is run comes to ``layer_share``; where they are worth the most is what the gates learn
(`Multiplier`). With ``layer_cost='seconds'``, both are measured seconds in the place of MACs: all blocks of a ResNet
for small images have as many MACs, and the first ones take four times as long as the last on a CPU, so that gates
which spare MACs need not spare time. They are taken in the first training pass, again whenever a batch of larger
samples comes (progressive resizing), and after a cut.

What it saves: measured seconds, counted MACs and modelled joules of the samples that pass by a block, in both passes of
training and in inference, since samples are gathered (`earlybird.skipping.gather`). It does *not* pay in shallow
networks, whose every block is needed; where blocks are so cheap that copying samples out and in takes as long; on a
GPU, which has to wait for each gate's decision before it knows how much to compute.

Deviations of the default, each with the published behaviour under ``PRESETS['published']``:

- ``layer_execution``: the published code computes every block for every sample and multiplies by 0 or 1. Then nothing
  is saved, batch norms see all samples, and the gradient of a gate's choice is known for all of them, straight
  through; it also flows into the features that the gate sees. Where samples are gathered, those that run show what
  running is worth as seen with the block. That alone is no guide: once a block's scale is trained, it is near 0
  however much the block is needed. So a few of those that do not run, ``layer_probe``, are run forward as well, and
  show it as seen without; the mean of both views is right to second order (`run_on`);
- ``layer_control``: published, a penalty in the loss whose sign flips with the share of the batch.

And without an option: every block that keeps its shape has a gate, the first one, too, and those that change it have
none (`earlybird.blocks`); the gates have an Adam of their own, since they live outside of the model; of a batch, as
many samples run as their probabilities sum to (`Passes.choose`; published: one coin for each).

``layer_evaluate='decided'`` lets those run, in evaluation, whose score is above a level at which the target share of
the last steps' choices would have been. Published: chance, as in training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from earlybird.blocks import (
    TIMED_PASSES,
    Block,
    block_seconds,
    check_free,
    counted,
    find_blocks,
    forward_macs,
    found_again,
    patterns_from,
)
from earlybird.calls import (
    Call,
    Hook,
    after_gradients,
    around,
    batch_size,
    first_sample,
    given_optimizers,
    processes,
    tensors_in,
    unwrapped,
)
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.settings import check_choice, check_count, check_number, check_share, option
from earlybird.skipping.gates import LearnedGate, Multiplier, Price, charge, level_for, summed
from earlybird.skipping.gather import Choice, check_norms, run_on
from earlybird.skipping.passes import Passes
from earlybird.stretches import BLOCKS, Plan, Stretch
from earlybird.tickets.shrink import Change
from earlybird.traces import Trace

__all__ = ["LayerGates", "LayerSkipping"]

_WIDTHS = (10,)  # of the gate: its projection and LSTM, as published
_RECORDS = 100  # entries of the history in a run whose length is known
_RECORD_EVERY = 50  # steps, where it is not
_MEMORY = 0.9  # share of the level that stays at each step
_LEAST = 0.02  # share of the gated blocks that is aimed at where the others leave less


@dataclass(frozen=True, kw_only=True)
class LayerSkipping:
    """Hyper-parameters of layer skipping; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    layer_share: float = option(0.6, "Share of the residual blocks' cost to run, on average, in (0, 1].")
    layer_cost: Literal["macs", "seconds"] = option(
        "macs", "What a block costs, for share and gates: its MACs, or its seconds here, timed in training."
    )
    layer_blocks: tuple[str, ...] = option((), "Names of the blocks, such as 'layers.*.blocks.*'; default: found.")
    layer_control: Literal["price", "penalty"] = option(
        "price", "What holds the share: a price that moves smoothly, or a penalty whose sign flips."
    )
    layer_penalty: float = option(1e-5, "Size of that penalty in the loss, for each block that a sample runs.")
    layer_execution: Literal["gathered", "masked"] = option(
        "gathered", "Run each block on the samples that chose it, or on all and multiply by 0 or 1."
    )
    layer_evaluate: Literal["sampled", "decided"] = option(
        "sampled", "Gates in evaluation: by chance as in training, or the higher scores run, as many as there."
    )
    layer_probe: float = option(
        0.1, "Share of the samples that skip a block which run it forward all the same, to tell its gate; in [0, 1)."
    )
    layer_gate_rate: float = option(1e-2, "Learning rate of the gates.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"layer_control": "penalty", "layer_execution": "masked"},
        "fast": {},
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_share", check_share("layer_share", self.layer_share))
        object.__setattr__(self, "layer_blocks", patterns_from("layer_blocks", self.layer_blocks))
        check_choice("layer_cost", self.layer_cost, ("macs", "seconds"))
        check_choice("layer_control", self.layer_control, ("price", "penalty"))
        check_choice("layer_execution", self.layer_execution, ("gathered", "masked"))
        check_choice("layer_evaluate", self.layer_evaluate, ("sampled", "decided"))
        for name in ("layer_penalty", "layer_gate_rate"):
            check_number(name, getattr(self, name), lambda value: 0 < value < math.inf, "a number above 0")
        check_number("layer_probe", self.layer_probe, lambda share: 0 <= share < 1, "a share from 0 to below 1")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run whose share is at its target, for `earlybird.forecast`; without the gates."""
        if self.layer_share == 1:
            return stretches
        if self.layer_cost == "seconds":
            raise InputError(
                "layer_cost is 'seconds': how many MACs a share of the time is, only training can tell",
                hint="ask for the bill with layer_cost=macs",
            )
        found = []
        for stretch in (one.decided("layer_skipping", BLOCKS) for one in stretches):
            blocks = find_blocks(stretch.model, plan.images(), self.layer_blocks)
            macs = forward_macs(blocks, count(stretch.model, plan.images()))
            gated = sum(m for m, block in zip(macs, blocks) if block.skippable)
            skipped = min((1 - self.layer_share) * sum(macs) / gated, 1.0)
            routes = tuple((block.layers, skipped, None) for block in blocks if block.skippable)
            found.append(replace(stretch, routes=(*stretch.routes, *routes)))
        return found

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> LayerGates:
        """Put gates before the residual blocks; from now on, samples that are not to run a block go around it.

        Args:
            model: The module that is trained, on the device where it will be. With ``layer_share=1`` it is left alone.
            optimizer: Its ``step`` is the clock, and when the gates learn; of several, the first one's.
            example_inputs: A batch that the model runs on; blocks are found and counted on one sample of it.
            total_steps: Optimizer steps of the training: how often the history gets an entry.
            ledger: Where to record; by default an own one, which `LayerGates.bill` reads.
            seed: Of the gates' first weights and of their choices.

        Returns:
            The running method.

        Raises:
            InputError: The model has no residual blocks that keep their shape, those that do not take more than
                ``layer_share`` of the MACs already, or another method decides how blocks are run.
        """
        return LayerGates(self, model, optimizer, example_inputs, total_steps, ledger, seed)


class _Timing(NamedTuple):
    """What blocks took, and of what blocks and inputs that is."""

    macs: list[int]  # of each block
    size: float  # numbers in a sample of the model's inputs
    seconds: list[float]  # of each block, for one sample


class LayerGates:
    """Running layer skipping, made by `LayerSkipping.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        blocks: The residual blocks, in the order in which they run.
        history: One entry every few steps: ``{'step', 'share', 'blocks'}``, the share of the blocks' cost that was run
            in training since the entry before, and the share of samples that ran each block.
    """

    def __init__(
        self,
        settings: LayerSkipping,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        total_steps: int | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self._model = model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self._steps = 0
        self._record_every = _RECORD_EVERY if total_steps is None else max(total_steps // _RECORDS, 1)
        self._price, self._multiplier = Price(), Multiplier()
        self._offset: float | None = None  # score with which all samples and blocks begin
        self._level: float | None = None  # score, a unit of cost, above which a decided gate lets samples run
        self._executed: list[Tensor] = []  # blocks that each input ran, by batch of the last evaluation
        self._evaluated = False  # it is over: training has gone on
        self._tells = False  # the pass under way is one of an evaluation
        self.blocks: list[Block] = []
        self._gated: list[Block] = []
        self._all_macs: list[int] = []  # of all blocks, for one sample
        self._timing = _Timing([], 0.0, [])
        if settings.layer_share < 1:
            self._find(example_inputs, seed)
        self._begin_step()
        self._begin_record()
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger, example_inputs)
        self._passes = Passes(model, self._ledger, seed)
        # before the step, whose gradients have come: what runs the model in its course, such as the refit after a cut,
        # shall find the same gates in whatever order methods were attached
        before = optimizers[0].register_step_pre_hook(Hook(self._before_step, self))
        self._handles: list[Any] = [before, self._passes]
        self._looked = False  # at the blocks: all methods are attached by the next call, whatever their order
        if self._gated:
            on_call = Hook(self._on_call, self)
            self._handles.append(model.register_forward_pre_hook(on_call, with_kwargs=True))
        for index, block in enumerate(self._gated):
            call = lambda forward, x, index=index: self._run(index, forward, x)  # noqa: E731
            self._handles.append(around(block.module, call, self))

    def _find(self, example_inputs: Any, seed: int) -> None:
        if example_inputs is None:
            raise InputError("no inputs to find the blocks with", hint="pass example_inputs=x to attach")
        self._sample = first_sample(example_inputs)
        self.blocks = find_blocks(self._model, self._sample, self.settings.layer_blocks)
        self._gated = [block for block in self.blocks if block.skippable]
        check_free(self._gated)
        check_norms(self._gated)
        self._count()
        self._check_target()
        device = next(self._model.parameters()).device
        self._gate = LearnedGate(
            self._gated, _WIDTHS, 1, rate=self.settings.layer_gate_rate, seed=seed, device=device,
        )  # fmt: skip

    def _count(self) -> None:
        """Count the blocks as they are now: what they cost, and which share of it is always run."""
        macs = forward_macs(self.blocks, counted(self._model, self._sample))
        self._all_macs = macs
        spent = self.seconds or macs
        self._macs, self._spent = (
            [amount for amount, block in zip(amounts, self.blocks) if block.skippable] for amounts in (macs, spent)
        )
        mean = sum(self._spent) / len(self._spent)
        self._costs = [amount / mean for amount in self._spent]
        self._gated_share = sum(self._spent) / sum(spent)
        self._always = (sum(spent) - sum(self._spent)) / sum(spent)
        self._target = (self.settings.layer_share - self._always) / self._gated_share

    def _check_target(self) -> None:
        """Raise an `InputError` where the blocks that always run leave nothing to choose."""
        floor, target = self._always, self.settings.layer_share
        if target <= floor:
            timed = self.settings.layer_cost == "seconds" and self.seconds is not None
            raise InputError(
                f"layer_share is {target:g}, but {len(self.blocks) - len(self._gated)} of {len(self.blocks)} residual "
                f"blocks change the shape and always run: {floor:.3g} of the blocks' {'time' if timed else 'MACs'}",
                needed=f"a share above {floor:.3g}, and at most 1",
            )

    # ---- what users ask ----

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the share of the blocks' cost that was run lately."""
        return {"layers": f"{self.history[-1]['share']:.0%}"} if self.history else {}

    @property
    def seconds(self) -> list[float] | None:
        """What each block takes for one sample of a batch, forward and backward, with ``layer_cost='seconds'``.

        Measured in the first training pass, and again for larger samples and after a cut; None before.
        """
        timing = self._timing
        return timing.seconds if timing.seconds and timing.macs == self._all_macs else None

    def executed_per_input(self) -> Tensor | None:
        """Return how many residual blocks each input of the last evaluation ran, in its order, shape (N,), int64.

        An evaluation is the passes in eval mode between two in training; None where there was none.
        """
        return torch.cat(self._executed) if self._executed else None

    def traces(self) -> list[Trace]:
        """Return what the report shows: the share of samples that ran each block, over the steps."""
        by_block = {
            block.name: [(entry["step"], entry["blocks"][index]) for entry in self.history]
            for index, block in enumerate(self.blocks)
        }
        cost = "MACs" if self.settings.layer_cost == "macs" else "time"
        note = f"{self.settings.layer_share:.0%} of the blocks' {cost} {'were' if cost == 'MACs' else 'was'} to be run."
        return [Trace(title="samples that ran a block", unit="share", series=by_block, note=note)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state: steps, prices, gates and their optimizer, the history, and what the own ledger holds."""
        return {
            "steps": self._steps,
            "price": self._price.value,
            "offset": self._offset,
            "multiplier": self._multiplier.state_dict(),
            "level": self._level,
            "gate": self._gate.state_dict() if self._gated else {},
            "history": [dict(entry) for entry in self.history],
            "timing": [list(self._timing.macs), self._timing.size, list(self._timing.seconds)],
            "record": [list(self._run_cost), list(self._ran), self._seen],
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps = int(state["steps"])
        self._price.value, self._offset, self._level = state["price"], state["offset"], state["level"]
        self._multiplier.load_state_dict(state["multiplier"])
        if self._gated:
            self._gate.load_state_dict(state["gate"])
        self._passes.after_step(self._steps)
        self.history = [dict(entry) for entry in state["history"]]
        cost, ran, self._seen = state["record"]
        self._run_cost, self._ran = list(cost), list(ran)
        macs, size, seconds = state["timing"]
        self._timing = _Timing(list(macs), size, list(seconds))
        self._looked = False
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take gates and hooks off model and optimizer; every sample runs every block from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()

    def follow(self, change: Change) -> None:
        """Go on with a model that `earlybird.shrink` has just cut; it calls this."""
        for index, block in enumerate(self._gated):
            if block.reader in change.read:
                self._gate.follow(index, change.read[block.reader])
        if self._gated:
            self._look_again()

    # ---- what hooks call ----

    def _on_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._looked:
            self._look_again()
        if self.settings.layer_cost == "seconds" and module.training and torch.is_grad_enabled():
            self._time_if_due(Call(args, kwargs))
        if self._offset is None:
            self._offset = math.log(self._target / (1 - self._target))

    def _time_if_due(self, call: Call) -> None:
        """Time the blocks on this batch if they, or blocks on samples as large as these, have not been timed yet."""
        device = next(self._model.parameters()).device
        count = batch_size(call)
        first = next(iter(tensors_in(call)), None)
        size = 0.0 if first is None or not count else first.numel() / count
        due = bool(count) and (self.seconds is None or size > self._timing.size)
        # one for all: several processes time together, of which those with an empty batch have no say
        anyone = summed([float(due), float(bool(count))], device)
        if not anyone[0]:
            return
        mine = block_seconds(self._model, self.blocks, call) if count else [0.0] * len(self.blocks)
        seconds = [taken / anyone[1] for taken in summed(mine, device)]
        largest = size if self.seconds is None else max(size, self._timing.size)
        self._timing = _Timing(self._all_macs, largest, seconds)
        for ledger in ledgers_on(self._model, self._ledger):
            for block in self.blocks:
                ledger.reroute(block.layers, -TIMED_PASSES * count, None, training=True)  # passes more
        self._count()
        if not self._steps:
            self._check_target()
            self._offset = None
        self._aim()

    def _look_again(self) -> None:
        """Find and count the blocks as they are now."""
        self.blocks = found_again(self.blocks, self._model, self._sample, self.settings.layer_blocks)
        self._gated = [block for block in self.blocks if block.skippable]
        self._count()
        self._aim()
        self._looked = True

    def _aim(self) -> None:
        """Aim at a little where blocks that always run have come to take nearly all, or more than all, of the share."""
        if self._target < _LEAST:
            warnings.warn(
                f"blocks that always run take {self._always:.3g} of the blocks' {self.settings.layer_cost} by now: "
                f"layer_share = {self.settings.layer_share:g} leaves less than {_LEAST:.0%} of the others, which is "
                "aimed at",
                stacklevel=2,
            )
            self._target = _LEAST

    def _begin_step(self) -> None:
        self._excess, self._possible = 0.0, 0.0  # cost that was run above the target, and could have been run
        self._scores: list[tuple[int, Tensor, Tensor]] = []  # of each block and pass: number, scores and chances

    def _begin_record(self) -> None:
        self._ran, self._seen = [0.0] * len(self._gated), 0.0  # samples, by block, and of all
        self._run_cost = [0.0, 0.0]  # of the gated blocks, and what it would have been

    def _begin_pass(self, count: int, *, training: bool) -> None:
        # batch norms that train while all else evaluates have their statistics estimated: nobody looks at the outputs
        self._tells = not any(module.training for module in self._gated[0].module.modules())
        if training:
            self._evaluated = True
        elif self._tells:
            if self._evaluated:
                self._executed, self._evaluated = [], False
            self._executed.append(torch.full((count,), len(self.blocks) - len(self._gated)))

    def _run(self, index: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        block, settings = self._gated[index], self.settings
        training = block.module.training
        learns = training and torch.is_grad_enabled()
        self._passes.enter(index, block, training=training)
        if index == 0:
            self._begin_pass(len(x), training=training)
        masked = settings.layer_execution == "masked"
        score = self._gate.scores(index, x, into_features=masked)[:, 0]
        cost = self._costs[index]
        chance = torch.sigmoid((self._offset or 0.0) + score - self._price.value * cost)
        if training or settings.layer_evaluate == "sampled":
            runs = self._passes.choose(chance)
        else:
            runs = (chance > 0.5 if self._level is None else score > self._level * cost).cpu()
        probed = torch.zeros_like(runs)
        if learns and not masked and settings.layer_probe:
            probed = self._passes.choose(settings.layer_probe * (~runs).float())
        rows, probes = (which.nonzero().flatten().to(x.device) for which in (runs, probed))
        self._record(index, runs, len(rows), len(probes), learns=learns)
        if learns:
            seen = chance.detach()  # a hook that held on to its own tensor would keep all graphs of the run
            self._scores.append((index, score.detach(), seen))
            chance.register_hook(lambda gradient: self._less_cost(gradient, seen, cost))
        if not masked:
            choice = Choice(chance, probes, settings.layer_probe) if learns else None
            return run_on(block.module, lambda inputs, _: forward(inputs), x, rows, choice)
        mask = runs.to(x.device, torch.float32)
        if learns:  # straight through
            mask = mask - chance.detach() + chance
        return torch.lerp(x, forward(x).to(x.dtype), mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))

    def _less_cost(self, gradient: Tensor, chance: Tensor, cost: float) -> Tensor:
        """Return the gradient of the chances to run a block, shape (N,), less that of what running costs."""
        if self.settings.layer_control == "penalty":  # by the batches of this step, known by the time gradients come
            return gradient + self.settings.layer_penalty * (1.0 if self._excess > 0 else -1.0)
        slope = chance * (1 - chance)  # of the chance, by the score
        self._multiplier.see(gradient * slope, cost * slope)
        return gradient - self._multiplier.value * cost

    def _record(self, index: int, runs: Tensor, ran: int, probes: int, *, learns: bool) -> None:
        """Count a batch: samples that run a block, ``runs`` (N,) and how many that is, and probes."""
        block, count, cost = self._gated[index], len(runs), self._spent[index]
        gate = count * self._gate.macs(index) / self._macs[index]  # in samples of the block
        for ledger in self._passes.ledgers if self.settings.layer_execution == "gathered" else ():
            ledger.reroute(block.layers, count - ran, None, training=learns)
            ledger.reroute(block.layers, -probes, None, training=False)  # forward passes more
        charge(self._passes.ledgers, block.layers, gate, training=learns)
        if self._tells:
            self._executed[-1] += runs
        if learns:
            self._excess += cost * (ran - self._target * count)
            self._possible += cost * count
            self._ran[index] += ran
            self._seen += count / len(self._gated)
            self._run_cost[0] += cost * ran
            self._run_cost[1] += cost * count

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, self._on_gradients)

    def _on_gradients(self) -> None:
        self._steps += 1
        if not self._gated:
            return
        device = next(self._model.parameters()).device
        # by how much the mean falls with the price
        slopes = [self._spent[at] * self._costs[at] * (p * (1 - p)).sum() for at, _, p in self._scores]
        slope = float(torch.stack(slopes).sum()) if slopes else 0.0
        excess, possible, slope = summed([self._excess, self._possible, slope], device)
        if possible:
            if self.settings.layer_evaluate == "decided":
                self._follow_level(device)
            if self.settings.layer_control == "price":
                self._price.move(excess / possible, slope / possible)
                self._multiplier.after_step(device)
        self._begin_step()
        self._gate.step()
        self._passes.after_step(self._steps)
        if self._steps % self._record_every == 0:
            self._add_to_history(device)

    def _follow_level(self, device: torch.device) -> None:
        """Let the level follow that at which the target share of this step's blocks would have been decided to run."""
        scores = torch.cat([scores / self._costs[at] for at, scores, _ in self._scores])
        costs = torch.cat([torch.full_like(scores, self._spent[at]) for at, scores, _ in self._scores])
        seen = summed([level_for(scores, costs, self._target)], device)[0] / processes()
        self._level = seen if self._level is None else _MEMORY * self._level + (1 - _MEMORY) * seen

    def _add_to_history(self, device: torch.device) -> None:
        run, possible, seen, *ran = summed([*self._run_cost, self._seen, *self._ran], device)
        self._begin_record()
        if not seen:
            return
        by_block = iter(ran)
        self.history.append(
            {
                "step": self._steps,
                "share": 1 - self._gated_share * (1 - run / possible),
                "blocks": [next(by_block) / seen if block.skippable else 1.0 for block in self.blocks],
            }
        )
