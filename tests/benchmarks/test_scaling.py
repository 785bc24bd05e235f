import math
import random

import pytest
import scaling
from scaling import QUANTITIES, SWEEPS, Point, complete, power_law, table


def test_a_power_law_without_noise_is_found_exactly():
    fit = power_law([(x, 3 * x**1.7) for x in (0.25, 0.5, 1, 2)])
    assert fit.exponent == pytest.approx(1.7)
    assert fit.factor == pytest.approx(3)
    assert fit.standard_error == pytest.approx(0, abs=1e-7)
    assert str(fit) == "1.70 ± 0.00"


def test_the_standard_error_by_hand():
    """Logarithms (0, 0), (1, 2), (2, 1): slope 1/2, residuals -1/2, 1, -1/2, so sqrt(3/2 / 1 / 2)."""
    fit = power_law([(math.exp(x), math.exp(y)) for x, y in ((0, 0), (1, 2), (2, 1))])
    assert fit.exponent == pytest.approx(0.5)
    assert fit.standard_error == pytest.approx(math.sqrt(0.75))
    assert fit.factor == pytest.approx(math.exp(0.5))


def test_the_standard_error_says_how_far_the_exponent_strays():
    """Over many noisy samples the exponents scatter about the true one by as much as their standard errors say."""
    noise = random.Random(0)
    xs = [2.0**power for power in range(6)]
    fits = [power_law([(x, x**1.5 * math.exp(noise.gauss(0, 0.1))) for x in xs]) for _ in range(400)]
    mean = sum(fit.exponent for fit in fits) / len(fits)
    scatter = math.sqrt(sum((fit.exponent - mean) ** 2 for fit in fits) / len(fits))
    said = math.sqrt(sum(fit.standard_error**2 for fit in fits) / len(fits))
    assert mean == pytest.approx(1.5, abs=0.01)
    assert said == pytest.approx(scatter, rel=0.15)


def test_two_points_give_an_exponent_without_an_error():
    fit = power_law([(1, 10), (2, 40)])
    assert (fit.exponent, fit.standard_error) == (pytest.approx(2), None)
    assert str(fit) == "2.00"


@pytest.mark.parametrize("points", [[(1, 1)], [(2, 1), (2, 3)], [(0, 1), (1, 1)], [(1, 1), (2, -1)]])
def test_what_has_no_power_law_is_refused(points):
    with pytest.raises(ValueError, match="needs"):
        power_law(points)


def rows_of(sweep):
    return [
        {"sweep": sweep, **vars(point), **dict.fromkeys(QUANTITIES, (index + 1.0) ** 2)}
        for index, point in enumerate(SWEEPS[sweep])
    ]


def test_a_sweep_is_done_only_when_every_point_has_a_row():
    found = rows_of("width")
    assert complete("width", found)
    assert not complete("width", found[:-1])
    assert not complete("batch", found)


def test_the_table_has_one_line_a_sweep_that_was_measured():
    lines = table([*rows_of("batch"), *rows_of("width")[:1]]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| batch (32, 64, 128, 256, 512) | 1.")


def test_shrinking_takes_channels_away():
    point = Point(width=0.125, batch=2, threads=1)
    dense, shrunk = (sum(p.numel() for p in point.build(shrunk=cut)[0].parameters()) for cut in (False, True))
    assert shrunk < 0.6 * dense


def test_the_detector_and_the_peak_of_a_small_network_are_measured():
    point = Point(width=0.125, batch=8, threads=1)
    assert scaling.detector_seconds(point, 1) > 0
    assert scaling.shrink_seconds(point, 1) > 0
    parameters = sum(p.numel() for p in point.build(shrunk=False)[0].parameters())
    assert scaling.peak_bytes(point, shrunk=False) > 4 * 2 * parameters  # weights and momentum at least
