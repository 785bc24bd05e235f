import math
import random
from dataclasses import asdict

import common
import pytest
import scaling
from scaling import QUANTITIES, Point, done, power_law, sweeps, whole


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


@pytest.mark.parametrize(
    "points", [[], [(1, 1)], [(2, 1), (2, 3)], [(0, 1), (1, 1)], [(1, 1), (2, -1)], [(1, 0), (2, 0)]]
)
def test_fewer_than_two_points_with_logarithms_have_no_power_law(points):
    assert power_law(points) is None


def test_points_without_logarithms_are_left_out():
    fit = power_law([(1, 10), (2, 0), (2, 40), (0, 7)])
    assert (fit.exponent, fit.points) == (pytest.approx(2), 2)


def rows_of(sweep, head):
    points = sweeps(2)[sweep]
    return [
        {"sweep": sweep, "point": asdict(point), "points": len(points),
         **dict.fromkeys(QUANTITIES, (index + 1.0) ** 2), **head}
        for index, point in enumerate(points)
    ]  # fmt: skip


def test_a_sweep_counts_when_one_session_has_all_its_points(head):
    old, cut_off = rows_of("width", head()), rows_of("width", head(session="second"))[:-1]
    assert whole([*old, *cut_off]) == {"width": old}
    assert whole([*old[:-1], *cut_off]) == {}
    new = rows_of("width", head(session="third"))
    assert whole([*new[::-1], *old, *new[:0]]) == {"width": old}
    assert whole([*old, *new[::-1]]) == {"width": new}  # in the order of the axis


def test_a_sweep_is_done_on_the_machine_that_did_it(results, head):
    for row in rows_of("width", head()):
        common.append(scaling.NAME, row)
    points = sweeps(2)["width"]
    assert done("width", points, head(session="now"))
    assert not done("batch", sweeps(2)["batch"], head())
    for other in ({"device": "small"}, {"torch": "3"}, {"threads": 1}):
        assert not done("width", points, head(**other))
    assert not done("width", [*points, Point(width=2.0)], head())


def test_a_look_at_the_ends_of_a_sweep_is_a_sweep_of_its_own_but_not_all_of_it(results, head):
    ends = [{**row, "points": 2} for row in rows_of("width", head())[::4]]
    for row in ends:
        common.append(scaling.NAME, row)
    assert whole(ends) == {"width": ends}
    assert not done("width", sweeps(2)["width"], head())


def test_one_core_has_one_point_along_threads():
    assert [point.threads for point in sweeps(1)["threads"]] == [1]
    assert [point.threads for point in sweeps(4)["threads"]] == [1, 4]
    assert {point.threads for point in sweeps(1)["batch"]} == {1}
    assert list(sweeps(1)) == list(scaling.ALONG)


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


def test_a_measured_sweep_has_all_its_quantities_in_every_row(monkeypatch):
    monkeypatch.setattr(scaling, "interleaved", lambda actions, rounds: ({name: [1.0, 3.0] for name in actions}, 0.0))
    for name in ("shrink_seconds", "detector_seconds"):
        monkeypatch.setattr(scaling, name, lambda point, times: 0.5)
    points = [Point(width=0.125, batch=batch, threads=1) for batch in (2, 4)]
    found = scaling.measure("batch", points, 2)
    assert [row["point"] for row in found] == [asdict(point) for point in points]
    assert all(row[key] >= 0 for row in found for key in QUANTITIES)
    assert {row["points"] for row in found} == {2}
    assert found[0]["dense_step_s"] == 2.0
