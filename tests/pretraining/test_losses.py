"""The pure functions of pre-training, against loops written by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from earlybird.errors import InputError
from earlybird.pretraining.moco import info_nce, momentum_update
from earlybird.pretraining.probe import knn_accuracy, knn_votes
from earlybird.pretraining.simclr import nt_xent


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nt_xent_by_hand():
    z1, z2, t = randn(4, 6), randn(4, 6, seed=1), 0.3
    z = [row / row.norm() for row in torch.cat((z1, z2))]
    total = 0.0
    for i in range(8):
        j = (i + 4) % 8
        others = sum(math.exp(float(z[i] @ z[k]) / t) for k in range(8) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[j]) / t) / others)
    assert float(nt_xent(z1, z2, t)) == pytest.approx(total / 8, rel=1e-5)


def test_nt_xent_of_one_image_is_refused_and_of_equal_images_the_logarithm_of_their_number():
    z = randn(1, 5)
    with pytest.raises(InputError, match="no others to be told from"):
        nt_xent(z, randn(1, 5, seed=1), 0.5)
    assert float(nt_xent(z.expand(4, 5), z.expand(4, 5), 0.5)) == pytest.approx(math.log(7))


def test_nt_xent_does_not_hang_on_lengths_and_is_computed_in_fp32_under_autocast():
    z1, z2 = randn(8, 16), randn(8, 16, seed=1)
    plain = nt_xent(z1, z2, 0.1)
    assert float(nt_xent(3 * z1, 0.2 * z2, 0.1)) == pytest.approx(float(plain), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(z1, z2, 0.1), plain)


def test_nt_xent_pulls_views_together_and_pushes_others_away():
    z = randn(4, 6).requires_grad_()
    before = functional.cosine_similarity(z[:2], z[2:]).mean()
    nt_xent(z[:2], z[2:], 0.5).backward()
    after = functional.cosine_similarity(*(z - 0.5 * z.grad).chunk(2)).mean()
    assert after > before


def test_info_nce_by_hand_and_without_gradients_for_keys():
    q, k, t = randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_(), 0.2
    queue = functional.normalize(randn(7, 5, seed=2), dim=1)
    total = 0.0
    for one, other in zip(q.detach(), k.detach()):
        one, other = one / one.norm(), other / other.norm()
        right = math.exp(float(one @ other) / t)
        total -= math.log(right / (right + sum(math.exp(float(one @ n) / t) for n in queue)))
    loss = info_nce(q, k, queue, t)
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-5)
    loss.backward()
    assert k.grad is None
    assert q.grad is not None


def test_a_momentum_update_by_hand_keeps_zeros_that_both_have():
    keys, queries = [torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 0.0])]
    momentum_update(keys, queries, 0.75)
    assert keys[0].tolist() == [1.5, 0.0]
    momentum_update([], [], 0.5)


def test_votes_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    votes = knn_votes(bank, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), k=2, temperature=0.5, classes=3)
    first, second = math.exp(1 / 0.5), math.exp(math.sqrt(0.5) / 0.5)
    assert votes[0].tolist() == pytest.approx([first / (first + second), second / (first + second), 0])


def test_neighbours_recognise_what_lies_near_and_guess_where_nothing_does():
    centres = 5 * randn(4, 10)
    labels = torch.arange(4).repeat(30)
    bank, queries = centres[labels] + randn(120, 10, seed=1), centres[labels] + randn(120, 10, seed=2)
    assert knn_accuracy(bank, labels, queries, labels, k=20) > 0.95
    assert knn_accuracy(bank, labels, queries, (labels + 1) % 4, k=20) < 0.05
    assert knn_accuracy(bank, labels, queries, labels, k=10_000) > 0.95  # all of the bank, the near ones by weight
