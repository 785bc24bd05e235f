"""Stochastic depth: residual blocks are left out by chance in training, the later the likelier.

Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, https://arxiv.org/abs/1603.09382. Of L residual blocks,
the l-th runs with probability (equation 4, linear decay)

    p_l = 1 - l / L * (1 - p_L)        else its input goes on in the place of its output

anew for each batch, as published, or for each sample, which is then gathered (`earlybird.skipping.gather`). What runs
is scaled, out = x + f(x) / p_l, so that the network can be evaluated and exported as it is.

What it saves: measured seconds, counted MACs and modelled joules of training; nothing in evaluation. It is the baseline
that gates (`earlybird.skipping.layers`) have to beat at equal MACs. It does *not* pay in shallow networks and in short
runs, where every block is needed.

Deviations:

- ``depth_scale``: published, f is not scaled in training and multiplied by p_l in evaluation. Under
  ``PRESETS['published']`` all blocks run in evaluation and out = x + p_l (block(x) - x): the mean over the coin, which
  equals the published activation(x + p_l f(x)) but where the activation function cuts x + f(x) off. Copies and exports
  of the network know nothing of it;
- blocks that change the shape always run (`earlybird.blocks`), and are counted in l and L; published code leaves their
  layers out, too, but for a pooling in the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from earlybird.blocks import Block, check_free, counted, find_blocks, forward_macs, found_again, patterns_from
from earlybird.calls import Hook, around, first_sample, given_optimizers, unwrapped
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for
from earlybird.settings import check_choice, check_share, option
from earlybird.skipping.gather import check_norms, run_on
from earlybird.skipping.passes import Passes
from earlybird.stretches import BLOCKS, Plan, Stretch

__all__ = ["RandomDepth", "StochasticDepth", "survival_for", "survivals"]


@dataclass(frozen=True, kw_only=True)
class StochasticDepth:
    """Hyper-parameters of stochastic depth; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    depth_survival: float = option(0.5, "Probability with which the last block runs, in (0, 1].")
    depth_share: float | None = option(
        None, "Share of the residual blocks' MACs to run on average, from which depth_survival then follows."
    )
    depth_by: Literal["batch", "sample"] = option("batch", "One coin a block for the whole batch, or for each sample.")
    depth_scale: Literal["training", "evaluation"] = option(
        "training", "Where a block's branch is scaled: divided by its probability in training, or multiplied later."
    )
    depth_blocks: tuple[str, ...] = option((), "Names of the blocks, such as 'layers.*.blocks.*'; default: found.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"depth_by": "batch", "depth_scale": "evaluation"},
        "fast": {},
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth_survival", check_share("depth_survival", self.depth_survival))
        if self.depth_share is not None:
            object.__setattr__(self, "depth_share", check_share("depth_share", self.depth_share))
        object.__setattr__(self, "depth_blocks", patterns_from("depth_blocks", self.depth_blocks))
        check_choice("depth_by", self.depth_by, ("batch", "sample"))
        check_choice("depth_scale", self.depth_scale, ("training", "evaluation"))

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run whose coins fall as often as they should, for `earlybird.forecast`."""
        found = []
        for stretch in (one.decided("stochastic_depth", BLOCKS) for one in stretches):
            blocks = find_blocks(stretch.model, plan.images(), self.depth_blocks)
            macs = forward_macs(blocks, count(stretch.model, plan.images()))
            share = self.depth_share
            last = self.depth_survival if share is None else survival_for(blocks, macs, share)
            routes = tuple((block.layers, 1 - p, None) for block, p in zip(blocks, survivals(blocks, last)) if p < 1)
            found.append(replace(stretch, training_routes=(*stretch.training_routes, *routes)))
        return found

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> RandomDepth:
        """Leave blocks out by chance from now on, in training.

        Args:
            model: The module that is trained, on the device where it will be. If all blocks always run
                (``depth_survival=1``), it is left alone.
            optimizer: Its ``step`` is the clock; of several, the first one's.
            example_inputs: A batch that the model runs on; blocks are found and counted on one sample of it.
            ledger: Where to record; by default an own one, which `RandomDepth.bill` reads.
            seed: Of the coins.

        Returns:
            The running method.

        Raises:
            InputError: The model has no residual blocks that keep their shape, those that do not take more than
                ``depth_share`` already, or another method decides how blocks are run.
        """
        return RandomDepth(self, model, optimizer, example_inputs, ledger, seed)


def survivals(blocks: Sequence[Block], last: float) -> list[float]:
    """Return the probability of each block to run: falling linearly to that of the last one; 1 for what always runs."""
    return [
        1 - number / len(blocks) * (1 - last) if block.skippable else 1.0
        for number, block in enumerate(blocks, start=1)
    ]


def survival_for(blocks: Sequence[Block], macs: Sequence[int], share: float) -> float:
    """Return the probability of the last block for which a share of all blocks' MACs is run on average.

    Args:
        blocks: In the order in which they run.
        macs: Of each.
        share: In (0, 1].

    Raises:
        InputError: The last block would never run, or less than that; the message names the floor.
    """
    falling = sum(
        number / len(blocks) * m for number, (block, m) in enumerate(zip(blocks, macs), start=1) if block.skippable
    )
    last = 1 - (1 - share) * sum(macs) / falling
    if last <= 0:
        floor = 1 - falling / sum(macs)
        raise InputError(
            f"depth_share is {share:g}, but with the last block never run, the others take {floor:.3g} on average",
            needed=f"a share above {floor:.3g}, and at most 1",
        )
    return last


class RandomDepth:
    """Running stochastic depth, made by `StochasticDepth.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        blocks: The residual blocks, in the order in which they run.
        survivals: The probability of each of them to run.
        share: Of the blocks' MACs, what is run in training on average.
    """

    def __init__(
        self,
        settings: StochasticDepth,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self.settings = settings
        self._model = model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self.blocks: list[Block] = []
        self.survivals: list[float] = []
        self.share = 1.0
        if (settings.depth_survival if settings.depth_share is None else settings.depth_share) < 1:
            self._find(example_inputs)
        self._steps = 0
        dropped = [index for index, chance in enumerate(self.survivals) if chance < 1]
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger, example_inputs)
        self._passes = Passes(model, self._ledger, seed, alike=settings.depth_by == "batch")
        after = optimizers[0].register_step_post_hook(Hook(self._after_step, self))
        self._handles: list[Any] = [after, self._passes]
        modules = dict(model.named_modules())
        if dropped:
            self._first_call = model.register_forward_pre_hook(Hook(self._on_first_call, self))
            self._handles.append(self._first_call)
        for number, index in enumerate(dropped):
            block, chance = self.blocks[index], self.survivals[index]
            run = lambda forward, x, number=number, index=index: self._run(number, index, forward, x)  # noqa: E731
            self._handles.append(around(block.module, run, self))
            if settings.depth_scale == "training":
                scale = lambda module, args, branch, block=block, chance=chance: _scaled(block, chance, branch)  # noqa: E731
                self._handles.append(modules[block.branch].register_forward_hook(Hook(scale, self)))

    def _find(self, example_inputs: Any) -> None:
        if example_inputs is None:
            raise InputError("no inputs to find the blocks with", hint="pass example_inputs=x to attach")
        settings, self._sample = self.settings, first_sample(example_inputs)
        self.blocks = find_blocks(self._model, self._sample, settings.depth_blocks)
        dropped = [block for block in self.blocks if block.skippable]
        check_free(dropped)
        if settings.depth_by == "sample":
            check_norms(dropped)
        for block in dropped if settings.depth_scale == "training" else ():
            if not block.branch:
                raise InputError(
                    f"what block '{block.name}' adds to its input is not the output of a module",
                    hint="use depth_scale='evaluation', which needs no look into the block",
                )
        macs = forward_macs(self.blocks, counted(self._model, self._sample))
        last = settings.depth_survival
        if settings.depth_share is not None:
            last = survival_for(self.blocks, macs, settings.depth_share)
        self.survivals = survivals(self.blocks, last)
        self.share = sum(m * chance for m, chance in zip(macs, self.survivals)) / sum(macs)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the share of the blocks' MACs that is run on average."""
        return {"layers": f"{self.share:.0%}"} if self.blocks else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: how many steps were made, and what the own ledger holds."""
        return {"steps": self._steps, "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps = int(state["steps"])
        self._passes.after_step(self._steps)
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off model and optimizer; every block runs from here on, unscaled."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()

    def _on_first_call(self, module: nn.Module, args: Any) -> None:
        """Ask for the layers of the blocks when all methods are attached, so that their order does not matter."""
        self._first_call.remove()
        self.blocks = found_again(self.blocks, self._model, self._sample, self.settings.depth_blocks)

    def _run(self, number: int, index: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        block, chance = self.blocks[index], self.survivals[index]
        if not block.module.training:
            if self.settings.depth_scale == "training":
                return forward(x)
            return torch.lerp(x, forward(x).to(x.dtype), chance)
        self._passes.enter(number, block, training=True)
        chances = torch.full((1 if self.settings.depth_by == "batch" else len(x),), chance)
        rows = self._passes.choose(chances).expand(len(x)).nonzero().flatten().to(x.device)
        for ledger in self._passes.ledgers:
            ledger.reroute(block.layers, len(x) - len(rows), None, training=torch.is_grad_enabled())
        return run_on(block.module, lambda inputs, _: forward(inputs), x, rows)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        self._passes.after_step(self._steps)


def _scaled(block: Block, chance: float, branch: Tensor) -> Tensor:
    return branch / chance if block.module.training else branch
