"""The bill of a run that was not run: what it would count, and what its energy would be by the tables.

A run is a list of stretches: steps that all cost the same. A method that has a method ``forecast`` changes the list as
it would change the run: fewer steps, a smaller network from some step on, layers in another arithmetic, samples that
skip layers. What only the run itself could tell is taken from the settings and said in the method's docstring: a ticket
that keeps the same share of each layer, drawn at the deadline; a share that is exactly at its target.

    early_bird   FLOPs = 2 * 3 * forward MACs, as You et al. (ICLR 2020) count
    e2_train     images times the executed share of the gated blocks, as Wang et al. (NeurIPS 2019) count
    fractrain    effective MACs, 3 passes, each operand's share of 32 bits, as Fu et al. (NeurIPS 2020) count
    shiftaddnet  energy of the operations by the FPGA's table, as You et al. (NeurIPS 2020) count

Nothing here is measured, and nothing says anything about time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from earlybird.cost import units
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.cost.bill import Bill
from earlybird.cost.count import ModelCost, count
from earlybird.cost.energy import FPGA, joules
from earlybird.errors import DataError, InputError
from earlybird.ledger import PhaseRecord, Route, Work
from earlybird.methods import METHODS
from earlybird.models import build
from earlybird.stretches import Forecasting, Plan, Stretch
from earlybird.train.recipe import Recipe

__all__ = ["RULES", "Forecast", "Rule", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """A run on paper.

    Attributes:
        name: Of the run.
        stretches: Its own.
        dense: Those of a dense run of as many epochs.
        channels: Of an image.
        batch: Images in a step.
        bits: Of the run's floating point.
        test_images: Of an evaluation.
        evaluate_every: Steps of a dense run between two evaluations.
        notes: What the forecast leaves out, in whole sentences.
    """

    name: str
    stretches: tuple[Stretch, ...]
    dense: tuple[Stretch, ...]
    channels: int
    batch: int
    bits: int
    test_images: int
    evaluate_every: float
    notes: tuple[str, ...] = ()
    _costs: dict[tuple[int, int], ModelCost] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def bill(self) -> Bill:
        """What it counts, against the dense run; seconds are not known."""
        return self._bill(self.stretches).against(self._bill(self.dense))

    def by_rule(self, rule: str) -> tuple[float | None, float | None]:
        """Return what one of `RULES` counts, of this run and of a dense one; None where its table has no price."""
        return self._apply(rule, self.stretches), self._apply(rule, self.dense)

    def cost(self, stretch: Stretch) -> ModelCost:
        """Return the cost of one image of a stretch."""
        key = (id(stretch.model), stretch.side)
        if key not in self._costs:
            images = torch.zeros(2, self.channels, stretch.side, stretch.side)
            self._costs[key] = count(stretch.model, images)
        return self._costs[key]

    def _bill(self, stretches: Sequence[Stretch]) -> Bill:
        train, evaluate = PhaseRecord(), PhaseRecord()
        total, done, looked = round(sum(stretch.steps for stretch in stretches)), 0.0, 0
        # as many evaluations as dense has, however few steps lie between two of them
        every = self.evaluate_every * total / sum(stretch.steps for stretch in self.dense)
        for stretch in stretches:
            done += stretch.steps
            cost, images = self.cost(stretch), stretch.steps * self.batch
            work = Work(train_images=round(images), train_batches=round(stretch.steps), updates=round(stretch.steps))
            routes = {
                Route(layers, arithmetic, True): share * images
                for layers, share, arithmetic in (*stretch.routes, *stretch.training_routes)
            }
            work = work.priced(cost, self.bits, routes)
            for model, share in stretch.beside:
                amount = self.cost(replace(stretch, model=model)).amount(
                    share * images, share * stretch.steps, self.bits, training=False
                )
                work.add(Work.of(amount))
            train.add(PhaseRecord(steps=round(stretch.steps), work={self.bits: work}))
            until = math.ceil(total / every) if round(done) >= total else int(done / every + 1e-9)  # and one at the end
            seen, batches, looked = (until - looked) * self.test_images, until - looked, until
            whole = self.cost(replace(stretch, side=self.dense[0].side))
            forward = {
                Route(layers, arithmetic, False): share * seen for layers, share, arithmetic in stretch.routes
            }  # fmt: skip
            work = Work(forward_images=seen, forward_batches=batches)
            evaluate.add(PhaseRecord(work={self.bits: work.priced(whole, self.bits, forward)}))
        parameters = self.cost(stretches[-1]).parameters
        return Bill(
            phases={"train": train.spending(), "evaluate": evaluate.spending()}, device="on paper",
            parameters=parameters,
        )  # fmt: skip

    def _apply(self, rule: str, stretches: Sequence[Stretch]) -> float | None:
        if rule not in RULES:
            raise InputError(f"no rule '{rule}'", needed=f"one of {', '.join(RULES)}")
        total = 0.0
        for stretch in stretches:
            amount = RULES[rule].count(self.cost(stretch), stretch, self.bits)
            if amount is None:
                return None
            total += stretch.steps * self.batch * amount
        return total

    def __str__(self) -> str:
        lines = [f"{self.name}: on paper, nothing was run", "", str(self.bill), "", "As the papers count:"]
        width = max(map(len, RULES))
        for name, rule in RULES.items():
            ours, dense = self.by_rule(name)
            if ours is None or dense is None:
                lines.append(f"  {name.ljust(width)}  no price for this run's floating point")
                continue
            ratio = (
                f"x{dense / ours:.2f} less" if ours < dense else f"x{ours / dense:.2f} MORE" if ours > dense else "="
            )
            shown, reference = (units.text(value, rule.unit) for value in (ours, dense))
            lines.append(f"  {name.ljust(width)}  {shown}, dense {reference}: {ratio}  ({rule.what})")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Rule:
    """How a paper counts.

    Attributes:
        what: What is counted, in words.
        unit: Of the sum.
        count: Amount of one image in a training step; None where something has no price.
    """

    what: str
    unit: str
    count: Callable[[ModelCost, Stretch, int], float | None]


def _flops(cost: ModelCost, stretch: Stretch, bits: int) -> float:
    return 2 * 3 * cost.forward_macs


def _executed(cost: ModelCost, stretch: Stretch, bits: int) -> float:
    routes = (*stretch.routes, *stretch.training_routes)
    skipped = [share for _, share, arithmetic in routes if arithmetic is None]
    return 1 - sum(skipped) / len(skipped) if skipped else 1.0


def _shares(cost: ModelCost, stretch: Stretch) -> dict[Arithmetic | None, dict[str, float]]:
    """Return by arithmetic (None: the run's own) how large a share of each layer's samples it computes."""
    found: dict[Arithmetic | None, dict[str, float]] = {}
    for name in cost.layers:
        rest, own = 1.0, cost.arithmetics.get(name)
        for layers, share, arithmetic in (*stretch.routes, *stretch.training_routes):
            if name in layers:
                rest -= share
                if arithmetic is not None:
                    found.setdefault(arithmetic, {})[name] = found.get(arithmetic, {}).get(name, 0.0) + share
        found.setdefault(own, {})[name] = found.get(own, {}).get(name, 0.0) + rest
    return found


def _effective_macs(cost: ModelCost, stretch: Stretch, bits: int) -> float:
    total = 0.0
    for arithmetic, layers in _shares(cost, stretch).items():
        weight = sum((arithmetic or Arithmetic.of_floats(bits)).bit_macs(pass_) for pass_ in PASSES)
        total += weight * sum(share * cost.layers[name].macs for name, share in layers.items())
    return total


def _fpga_joules(cost: ModelCost, stretch: Stretch, bits: int) -> float | None:
    operations: dict[str, float] = {}
    for arithmetic, layers in _shares(cost, stretch).items():
        own = arithmetic or Arithmetic.of_floats(bits)
        for name, share in layers.items():
            layer = cost.layers[name]
            for pass_, macs in zip(PASSES, (layer.macs, layer.error_macs, layer.weight_macs)):
                for operation, times in own.operations(pass_).items():
                    operations[operation] = operations.get(operation, 0.0) + share * macs * times
    try:
        return joules(operations, 0, FPGA).compute_joules
    except InputError:
        return None


RULES: Mapping[str, Rule] = {
    "early_bird": Rule("FLOPs, 2 a MAC, 3 times the forward pass", "FLOP", _flops),
    "e2_train": Rule("images times the executed share of the gated blocks", "images", _executed),
    "fractrain": Rule("MACs times the share of 32 bits of both operands, 3 equal passes", "MAC", _effective_macs),
    "shiftaddnet": Rule("energy of the operations by the FPGA's table", "J", _fpga_joules),
}
"""How papers count, by their first system."""


def forecast(recipe: Recipe) -> Forecast:
    """Return the bill of ``recipe`` without running it.

    Data sets of the catalogue are not loaded; others are, for their number and size of images.

    Raises:
        InputError: The recipe does not fit its data or model.
    """
    train_images, test_images, classes, shape = _extent(recipe)
    plan = Plan(train_images // recipe.batch_size // recipe.accumulate, 0, recipe.seed, shape)
    if not plan.steps_per_epoch:
        raise InputError(f"{train_images} images give no batch of {recipe.batch_size}", hint="lower batch_size")
    plan = replace(plan, total_steps=recipe.steps(plan.steps_per_epoch))
    model = build(
        recipe.model, classes=classes, in_channels=shape[0], image_size=shape[1], width=recipe.width, seed=recipe.seed
    )
    dense = [Stretch(float(plan.total_steps), model, shape[1])]
    stretches, notes = list(dense), []
    # what replaces layers, or makes the run shorter, comes before what goes by them; what ends with the draw after it
    order = ["shift_add", "batch_dropping", *METHODS]
    for name, method in sorted(recipe.build_methods().items(), key=lambda item: order.index(item[0])):
        if isinstance(method, Forecasting):
            stretches = method.forecast(stretches, plan)
        else:
            notes.append(f"{name} is left out: what it saves or costs, its run's own bill will tell.")
    return Forecast(
        name=recipe.name,
        stretches=tuple(stretches),
        dense=tuple(dense),
        channels=shape[0],
        batch=recipe.batch_size * recipe.accumulate,
        bits=16 if recipe.precision == "bf16" else 32,
        test_images=test_images,
        evaluate_every=max(recipe.evaluate_every.in_iterations(plan.steps_per_epoch, plan.total_steps), 1),
        notes=tuple(notes),
    )


def _extent(recipe: Recipe) -> tuple[int, int, int, tuple[int, int, int]]:
    """Return training images, test images, classes and shape of the recipe's data."""
    from earlybird.data import CATALOGUE
    from earlybird.train.parts import read_data

    if recipe.data in CATALOGUE:
        info = CATALOGUE[recipe.data]
        channels, height, width = info.shape
        side = recipe.image_size or height
        if (recipe.train_images or 0) > info.train_images:
            raise DataError(f"{recipe.data} has {info.train_images} training images, fewer than {recipe.train_images}")
        return (
            recipe.train_images or info.train_images,
            info.test_images,
            info.classes,
            (channels, side, recipe.image_size or width),
        )
    data: Any = read_data(recipe)
    channels, height, width = data.train_images.shape[1:]
    return len(data.train_images), len(data.test_images), len(data.classes), (channels, height, width)
