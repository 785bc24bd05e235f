"""Muon against the singular value decomposition, against its equations by hand, and against PyTorch's SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from earlybird.errors import InputError
from earlybird.models import build
from earlybird.optimizers.muon import COEFFICIENTS, Muon, by_role, orthogonalise


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynomial(value: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    return a * value + b * value**3 + c * value**5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.integers(0, 100))
def test_each_step_applies_the_polynomial_to_the_singular_values(
    rows: int, columns: int, steps: int, seed: int
) -> None:
    x = matrix(rows, columns, seed)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(steps):
        values = polynomial(values)
    torch.testing.assert_close(orthogonalise(x, steps), u * values @ v)


@pytest.mark.parametrize("shape", [(64, 216), (64, 576), (256, 96)])
def test_singular_values_of_a_gradient_come_near_1(shape: tuple[int, int]) -> None:
    before = torch.linalg.svdvals(matrix(*shape))
    after = torch.linalg.svdvals(orthogonalise(matrix(*shape).float()))
    assert before.max() > 1.5 * before.min()
    assert 0.65 < after.min() <= after.max() < 1.25


def test_bfloat16_comes_as_near() -> None:
    after = torch.linalg.svdvals(orthogonalise(matrix(64, 216).bfloat16()).double())
    assert 0.6 < after.min() <= after.max() < 1.3
    filters = nn.Parameter(matrix(4, 18).float())
    before = filters.detach() * 2 / filters.detach().norm()
    filters.grad = matrix(4, 18, 1).float()
    optimizer = copy.deepcopy(Muon([filters], lr=0.2, momentum=0.0, nesterov=False, dtype=torch.bfloat16))
    (filters,) = optimizer.param_groups[0]["params"]
    filters.grad = matrix(4, 18, 1).float()
    optimizer.step()
    assert filters.dtype == torch.float32
    torch.testing.assert_close(filters.detach(), before - 0.2 * orthogonalise(matrix(4, 18, 1).bfloat16()).float())


def test_the_size_of_the_gradient_does_not_matter() -> None:
    x = matrix(6, 20).float()
    torch.testing.assert_close(orthogonalise(1e-6 * x), orthogonalise(x))
    assert torch.equal(orthogonalise(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_by_hand(nesterov: bool) -> None:
    filters = nn.Parameter(matrix(4, 18).view(4, 2, 3, 3).clone())
    gradients = [matrix(4, 18, seed).view(4, 2, 3, 3) for seed in (1, 2)]
    optimizer = Muon([filters], lr=0.2, momentum=0.6, nesterov=nesterov)
    weight, momentum = filters.detach().flatten(1).clone(), torch.zeros(4, 18, dtype=torch.float64)
    for gradient in gradients:
        filters.grad = gradient.clone()
        optimizer.step()
        momentum = 0.6 * momentum + gradient.flatten(1)
        u, values, v = torch.linalg.svd(gradient.flatten(1) + 0.6 * momentum if nesterov else momentum)
        values = values / values.norm()
        for _ in range(3):
            values = polynomial(values)
        weight = weight * 2 / weight.norm()  # the square root of four rows
        weight = weight - 0.2 * (u * values) @ v[:4]
        torch.testing.assert_close(filters.detach().flatten(1), weight)
        assert torch.equal(filters.grad, gradient)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_the_other_groups_are_stepped_as_by_sgd_to_the_bit(nesterov: bool, weight_decay: float) -> None:
    ours = [nn.Parameter(matrix(5, 3).float()), nn.Parameter(matrix(1, 7)[0].float())]
    theirs = copy.deepcopy(ours)
    optimizer = Muon(
        [{"params": ours, "orthogonal": False}], lr=0.1, momentum=0.85, nesterov=nesterov, weight_decay=weight_decay
    )
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.85, nesterov=nesterov, weight_decay=weight_decay, foreach=False)
    for step in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        optimizer.step()
        sgd.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))


def test_a_rate_of_0_leaves_weights_and_momentum_alone() -> None:
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Muon([{"params": [still], "lr": 0.0}, {"params": [moving]}], lr=0.1, orthogonal=False)
    for parameter in (still, moving):
        parameter.grad = torch.full((3,), torch.inf if parameter is still else 1.0)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))
    assert still not in optimizer.state
    assert not torch.equal(moving, torch.ones(3))


def test_a_filter_of_zeros_or_without_gradient_survives() -> None:
    zero, idle = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([zero, idle])
    zero.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(zero, torch.zeros(4, 6))
    assert torch.equal(idle, torch.ones(4, 6))


def test_a_closure_computes_the_gradients() -> None:
    filters = nn.Parameter(matrix(3, 4).float())
    optimizer = Muon([filters])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = filters.square().sum()
        loss.backward()
        return loss

    before = filters.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(filters, before)


def test_vectors_cannot_be_orthogonal() -> None:
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        Muon([torch.ones(2, 2), torch.ones(3)])
    optimizer = Muon([torch.ones(2, 2)])
    with pytest.raises(InputError):
        optimizer.add_param_group({"params": [torch.ones(3)]})
    assert len(optimizer.param_groups) == 1  # as if it had not been asked


def test_memory_format_stays() -> None:
    filters = nn.Parameter(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last))
    optimizer = Muon([filters])
    filters.grad = torch.randn_like(filters)
    optimizer.step()
    assert filters.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[filters]["momentum_buffer"].stride() == filters.stride()


def names_by_role(model: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {role: [names[id(parameter)] for parameter in found] for role, found in by_role(model).items()}


def test_roles_in_the_speed_run_network() -> None:
    assert names_by_role(build("speedrun", classes=10)) == {
        "filters": [f"blocks.{block}.conv{conv}.weight" for block in range(3) for conv in (1, 2)],
        "head": ["head.weight"],
        "biases": [f"blocks.{block}.norm{norm}.bias" for block in range(3) for norm in (1, 2)],
        "stem": ["whiten.bias"],
        "scales": [f"blocks.{block}.norm{norm}.weight" for block in range(3) for norm in (1, 2)],
    }


def test_roles_are_decided_by_shape_and_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 2))
    assert names_by_role(model) == {
        "filters": ["0.weight", "2.weight"],
        "head": ["4.weight"],
        "biases": ["1.bias", "2.bias", "3.weight", "4.bias"],
        "stem": ["0.bias"],
        "scales": ["1.weight"],
    }


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "mobilenet_v2", "speedrun"])
def test_every_parameter_that_learns_has_one_role(name: str) -> None:
    model = build(name, classes=10, width=0.25)
    found = [id(parameter) for parameters in by_role(model).values() for parameter in parameters]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_tables_and_tokens_are_not_filters() -> None:
    """Muon is for the weights of hidden layers; a token (1, N, D) flattened to one row would keep a norm of 1."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 3, 4)))
    roles = names_by_role(model)
    assert roles["filters"] == ["1.weight"]
    assert {"0.weight", "token"} <= set(roles["biases"])


def test_depthwise_convolutions_are_filters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Linear(4, 2))
    assert names_by_role(model)["filters"] == ["0.weight", "1.weight", "2.weight"]
