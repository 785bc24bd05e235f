"""Gates that decide, block by block and sample by sample, how a network is run.

Before each residual block, a small recurrent network looks at the block's input x, of C channels:

    f = project_l(mean of x over its pixels)      own weights for each block l
    h = LSTM(f, h)                                shared by all blocks, begun anew in each pass
    scores = head(h)                              shared; one a sample and choice

(SkipNet, Wang et al., ECCV 2018, https://arxiv.org/abs/1711.09485; with one more layer in the projection and several
choices, FracTrain, Fu et al., NeurIPS 2020, https://arxiv.org/abs/2012.13113.) What a choice costs is held near a
target by a `Price` that all choices pay.

Where they live: beside the model, with an Adam of their own that steps with the model's optimizer, and in the state of
the method. So the model keeps its names, its parameters and its state, and can be exported, averaged, shrunk and
wrapped as if there were no gates; schedulers and optimizers that know nothing of gates go on working; and Adam, whose
step does not depend on the size of the gradient, does not mind how a loop scales its loss (a published penalty of a
fixed size does). Published: the same SGD as for the network. When the model is cut, the projections lose the inputs of
the channels that go (`LearnedGate.follow`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.blocks import Block, channels_of
from earlybird.calls import processes
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError
from earlybird.ledger import Ledger

__all__ = ["LearnedGate", "Multiplier", "Price", "RecurrentGate", "charge", "level_for", "summed"]

_FLOAT32 = Arithmetic.of_floats(32)  # what gates compute in
_FLATTEST = 0.02  # slope of shares, where gates are all decided
_MEMORY = 0.9  # share of the multiplier's sums that stays at each step


class RecurrentGate(nn.Module):
    """Pooled features to scores, block after block.

    Args:
        channels: Of each block's input.
        widths: Of the layers of each projection, with ReLU between them; the last is the LSTM's.
        choices: Scores a sample.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], choices: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(_projection((inputs, *widths)) for inputs in channels)
        self.memory = nn.LSTMCell(widths[-1], widths[-1])
        self.head = nn.Linear(widths[-1], choices)

    def forward(self, index: int, features: Tensor, state: tuple[Tensor, Tensor] | None) -> Any:
        """Return scores (N, choices) and the new state, of features (N, C) before block ``index``."""
        state = self.memory(self.projections[index](features), state)
        return self.head(state[0]), state

    def macs(self, index: int) -> int:
        """Return the multiply-accumulates for one sample before block ``index``."""
        parts = (self.projections[index], self.memory, self.head)
        return sum(weight.numel() for part in parts for weight in part.parameters() if weight.ndim == 2)


def _projection(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


class LearnedGate:
    """A `RecurrentGate` beside a model, what it remembers of the pass that is under way, and what trains it.

    Args:
        blocks: That it decides on, in the order in which they run.
        widths: As of `RecurrentGate`.
        choices: Scores a sample.
        rate: Learning rate of Adam.
        seed: Of the first weights.
        device: Where the model is.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        widths: Sequence[int],
        choices: int,
        *,
        rate: float,
        seed: int,
        device: torch.device,
    ) -> None:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            self.network = RecurrentGate([block.channels for block in blocks], widths, choices)
        nn.init.zeros_(self.network.head.bias)
        self.network.to(device)
        self._adam = torch.optim.Adam(self.network.parameters(), lr=rate)
        self._names = [block.name for block in blocks]
        self._state: tuple[Tensor, Tensor] | None = None

    def scores(self, index: int, x: Tensor, *, into_features: bool = False) -> Tensor:
        """Return the scores of the samples before block ``index``, float32, shape (N, choices).

        Blocks come in their order; the first one begins a pass.

        Args:
            index: Of the block.
            x: Its input.
            into_features: Let the gradient flow on into ``x``.

        Raises:
            InputError: ``x`` has another number of channels than it used to have.
        """
        if channels_of(x) != self.channels(index):
            raise InputError(
                f"block '{self._names[index]}' gets {channels_of(x)} channels, its gate expects {self.channels(index)}",
                hint="cut the model by earlybird.shrink, which tells the gates, or before they are attached",
            )
        if index == 0:
            self._state = None
        x = x if into_features else x.detach()
        with torch.autocast(x.device.type, enabled=False):
            scores, self._state = self.network(index, _pooled(x), self._state)
        return scores  # type: ignore[no-any-return]

    def channels(self, index: int) -> int:
        """Return how many channels block ``index`` is expected to read."""
        return int(self.network.projections[index][0].in_features)  # type: ignore[index]

    def macs(self, index: int) -> int:
        """Return the multiply-accumulates of the decision on block ``index`` for one sample."""
        return self.network.macs(index)

    def step(self) -> None:
        """Move the weights by the gradients that have come since the last step."""
        self._state = None
        parameters = [p for p in self.network.parameters() if p.grad is not None or processes() > 1]
        if not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if processes() > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= processes()
            gradients = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)]
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
        # a loop that scales its loss leaves a step out where gradients overflow; those of the gates go with it
        if bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()):
            self._adam.step()
        self._adam.zero_grad()

    def follow(self, index: int, stayed: Tensor) -> None:
        """Go on with some channels of the input of block ``index``, boolean, since the model was cut.

        A gate of another number of channels stays as it is: its state, from after the cut, was loaded before.
        """
        if self.channels(index) != len(stayed):
            return
        layer: nn.Linear = self.network.projections[index][0]  # type: ignore[index]
        old = layer.weight
        kept = stayed.nonzero().flatten().to(old.device)
        new = nn.Parameter(old.detach().index_select(1, kept))
        if old.grad is not None:
            new.grad = old.grad.index_select(1, kept)
        layer.weight, layer.in_features = new, len(kept)
        state = self._adam.state.pop(old, {})
        if state:
            self._adam.state[new] = {
                key: value.index_select(1, kept) if value.shape == old.shape else value for key, value in state.items()
            }
        for group in self._adam.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return weights and the state of Adam by name."""
        named = dict(self.network.named_parameters())
        return {
            "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
            "adam": {name: dict(self._adam.state[p]) for name, p in named.items() if p in self._adam.state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, from before or after a cut."""
        for name, parameter in self.network.named_parameters():
            weight = state["weights"][name].to(parameter.device)
            parameter.data, parameter.grad = weight.clone(), None
            saved = state["adam"].get(name, {})
            self._adam.state[parameter] = {
                key: value.to(parameter.device).clone() if value.ndim else value.clone() for key, value in saved.items()
            }
        for projection in self.network.projections:
            first: nn.Linear = projection[0]  # type: ignore[index]
            first.in_features = first.weight.shape[1]


def _pooled(x: Tensor) -> Tensor:
    """Return the mean of each channel, float32, shape (N, C)."""
    if x.ndim == 2:
        return x.float()
    return x.mean(tuple(range(2, x.ndim)) if x.ndim > 3 else 1, dtype=torch.float32)


class Price:
    """What makes a target come true: all choices pay it, by their cost, out of their scores.

    After each step it moves by a quarter of what would have met the target in that step, as far as the slope tells:

        price += excess / (4 slope)        by no more than 1

    so that errors of either sign cancel over a run, however decided the gates are.

    Attributes:
        value: The price.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def move(self, excess: float, slope: float) -> None:
        """Move the price.

        Args:
            excess: Share that was spent above (below: negative) the target.
            slope: By how much the mean share falls with the price.
        """
        self.value += min(max(excess / (4 * max(slope, _FLATTEST)), -1.0), 1.0)


class Multiplier:
    """What cost is worth to the loss, as the gradients of all choices tell: the least-squares Lagrange multiplier

        mu = sum <dL/ds, dC/ds> / sum <dC/ds, dC/ds>

    over the scores s of the last steps. Gates learn from dL/ds - mu dC/ds, so that they move cost to where it is worth
    the most, and do not on the whole ask for more or less of it: that is decided by the target, and `Price` need not
    run after scores that all rise.

    Attributes:
        value: mu.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._sums = (0.0, 0.0)  # of both inner products, the older steps' with less weight
        self._now: list[Tensor] = []  # both, by block and pass of this step, shape (2,)

    def see(self, loss_by_score: Tensor, cost_by_score: Tensor) -> None:
        """Take note of the gradients of loss and cost by the scores before one block, of equal shapes."""
        products = [(loss_by_score * cost_by_score).sum(), cost_by_score.square().sum()]
        self._now.append(torch.stack(products).double())

    def after_step(self, device: torch.device) -> None:
        """Estimate it anew; called on all processes."""
        now = torch.stack(self._now).sum(0).tolist() if self._now else [0.0, 0.0]
        self._now = []
        both, square = summed(now, device)
        if math.isfinite(both) and square:
            self._sums = (_MEMORY * self._sums[0] + both, _MEMORY * self._sums[1] + square)
            self.value = self._sums[0] / self._sums[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"sums": list(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        both, square = state["sums"]
        self._sums, self.value = (both, square), both / square if square else 0.0


def charge(ledgers: Iterable[Ledger], layers: Sequence[str], images: float, *, training: bool) -> None:
    """Charge a gate: to layers of a block, as many samples more as have the gate's MACs, whatever they compute in."""
    for ledger in ledgers:
        ledger.reroute(layers, -images, None, training=training)
        ledger.reroute(layers, images, _FLOAT32, training=training)


def level_for(scores: Tensor, costs: Tensor, share: float) -> float:
    """Return the score above which the choices make up a share of all costs, as nearly as they can.

    Args:
        scores: Of all choices, shape (n,).
        costs: Of each, shape (n,).
        share: 0 to 1.
    """
    ordered, by_score = scores.sort(descending=True)
    spent = costs[by_score].cumsum(0)
    count = int((spent <= share * spent[-1]).sum())
    return float(ordered[max(count - 1, 0)] + ordered[min(count, len(ordered) - 1)]) / 2


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of ``values`` over all processes of a distributed run."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()
