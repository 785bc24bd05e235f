import pytest
import torch

from earlybird.errors import InputError
from earlybird.precision.turning_points import TurningPoints, turns


def looks(indicator, losses):
    turned = []
    for number, loss in enumerate(losses):
        indicator.observe(torch.tensor(loss))
        if indicator.look():
            turned.append(number)
    return turned


def test_all_older_losses_must_be_near_the_newest():
    assert turns([1.04, 1.05, 1.0], 1.0, 0.0501)
    assert not turns([1.2, 1.0, 1.0], 1.0, 0.05)
    assert turns([0.9, 1.0], 2.0, 0.05)  # a rise is as near as a fall


def test_turning_points_of_a_made_up_loss_by_hand():
    # scale: mean of the looks so far, up to ten; 2.0 at the first plateau
    falling, plateau = [3.0, 2.5, 2.0], [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    indicator = TurningPoints(window=3, threshold=0.05, decay=0.5)
    # three equal losses at 5; the window begins anew, three more at 8; two are left
    assert looks(indicator, falling + plateau) == [5, 8]
    assert indicator.losses == [1.5, 1.5]


def test_the_threshold_shrinks_at_each_turning_point():
    # differences of 0.04 / 1 are a standstill once, not twice
    indicator = TurningPoints(window=2, threshold=0.05, decay=0.5)
    assert looks(indicator, [1.0, 0.96, 1.0, 0.96, 1.0, 0.96]) == [1]
    wide = TurningPoints(window=2, threshold=0.05, decay=1.0)
    assert looks(wide, [1.0, 0.96, 1.0, 0.96, 1.0, 0.96]) == [1, 3, 5]


def test_differences_are_measured_in_the_early_loss():
    assert looks(TurningPoints(2, 0.05, 1.0), [100.0, 50.0, 48.0]) == [2]  # 2 / 66
    assert looks(TurningPoints(2, 0.05, 1.0), [10.0, 5.0, 3.0]) == []  # 2 / 6
    long = TurningPoints(2, 0.05, 1.0)
    looks(long, [10.0 - number for number in range(10)] + [50.0, 70.0])
    assert long.early == [10.0 - number for number in range(10)]  # the first ten of the run, whatever comes


def test_a_look_is_at_the_mean_of_what_was_observed():
    indicator = TurningPoints(2, 0.0, 1.0)
    for loss in (1.0, torch.tensor(3.0, requires_grad=True)):
        indicator.observe(loss)
    indicator.look()
    assert indicator.losses == [2.0]


def test_the_state_goes_on_between_looks():
    losses = [3.0, 2.0, 1.9, 1.88, 1.7, 1.69, 1.69, 1.69]
    whole, first, second = (TurningPoints(2, 0.05, 0.3) for _ in range(3))
    turned = looks(whole, losses)
    begun = looks(first, losses[:3])
    first.observe(torch.tensor(1.88))
    second.load_state_dict(first.state_dict())
    begun += [3] * second.look()
    assert begun + [4 + number for number in looks(second, losses[4:])] == turned != []
    assert second.state_dict() == whole.state_dict()


def test_without_losses_the_error_says_what_to_call():
    with pytest.raises(InputError, match=r"call observe\(loss\)"):
        TurningPoints(2, 0.05, 0.3).look()
