import pytest

from earlybird.cost import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.42, "420 ms"),
        (0.9999, "1 s"),
        (38.12, "38.1 s"),
        (99.96, "1 min 40 s"),
        (725, "12 min 05 s"),
        (3599.7, "1 h 00 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.26e12, "1.26 TMAC"), (999.0, "999 MAC"), (1e3, "1 kMAC")])
def test_counts_have_a_prefix(value, text):
    assert units.count(value, "MAC") == text


def test_bytes_are_binary_and_energy_is_decimal():
    assert units.size(1.5 * 2**30) == "1.5 GiB"
    assert units.joules(4200) == "4.2 kJ"
    assert units.joules(0.0163) == "16.3 mJ"
    assert units.joules(16.3e-6) == "16.3 uJ"


def test_a_difference_of_accuracies_is_in_points():
    assert units.points(0.002) == "+0.20 points"
    assert units.points(-0.0131) == "\N{MINUS SIGN}1.31 points"
