"""The bill: kinds of numbers stay apart, a loss is a loss, and what is missing says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from earlybird.cost.bill import Bill, Counted, Estimated, Measured, Modelled, Ratio, Spending
from earlybird.errors import InputError


def spending(
    seconds: float,
    *,
    gmacs: float = 1.0,
    bits: int = 32,
    peak: float | None = 100 << 20,
    joules: float | None = None,
    modelled: tuple[float, float] = (2.0, 3.0),
    basis: str = "",
) -> Spending:
    return Spending(
        seconds=Estimated(seconds, "s", basis) if basis else Measured(seconds, "s", "clock"),
        steps=Counted(10, "steps"),
        images=Counted(1280, "images"),
        macs=Counted(gmacs * 1e9, "MAC"),
        bit_macs=Counted(gmacs * 1e9 * (bits / 32) ** 2, "MAC"),
        moved_bytes=Counted(1e6, "B"),
        peak_bytes=None if peak is None else Measured(peak, "B", "VmHWM"),
        joules=None if joules is None else Measured(joules, "J", "RAPL"),
        modelled_joules=Modelled(*modelled, "J", "Horowitz"),
    )


def bill(row: Spending, dense: Spending | None = None) -> Bill:
    return Bill(phases={"train": row}, dense=None if dense is None else Bill(phases={"train": dense}))


def test_the_four_kinds_print_differently() -> None:
    kinds = [
        Measured(12.3, "s", "clock"),
        Estimated(12.3, "s", "a guess"),
        Counted(12.3, "s"),
        Modelled(12.3, 12.3, "s", "table"),
    ]
    assert [str(kind) for kind in kinds] == ["12.3 s", "~12.3 s", "#12.3 s", "[12.3 .. 12.3 s]"]
    assert len({type(kind) for kind in kinds}) == 4
    assert Measured(1, "J", "x") != Counted(1, "J")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (0.0123, "s", "12.3 ms"),
        (1.234, "s", "1.23 s"),
        (45.67, "s", "45.7 s"),
        (12_345.6, "s", "3 h 26 min"),
        (0, "MAC", "0 MAC"),
        (999.4, "MAC", "999 MAC"),
        (999.6, "MAC", "1 kMAC"),
        (1.259e18, "MAC", "1.26 EMAC"),
        (2e22, "MAC", "20000 EMAC"),
        (1023, "B", "1023 B"),
        (1024, "B", "1 KiB"),
        (296 << 20, "B", "296 MiB"),
        (3.5 * 2**30, "B", "3.5 GiB"),
        (16.3e-6, "J", "16.3 uJ"),
        (0.25, "J", "250 mJ"),
        (0.0, "J", "0 J"),
        (1e-12, "J", "0.001 nJ"),
    ],
)
def test_numbers_have_units_one_can_read(value: float, unit: str, text: str) -> None:
    assert str(Measured(value, unit, "x")) == text


def test_ranges_write_a_shared_unit_once() -> None:
    assert str(Modelled(0.25, 0.5, "J", "x")) == "[250 .. 500 mJ]"
    assert str(Modelled(0.5, 1.5, "J", "x")) == "[500 mJ .. 1.5 J]"


def test_total_adds_up_and_keeps_the_highest_peak() -> None:
    total = Bill(
        phases={"search": spending(10, gmacs=4, peak=200, joules=5), "train": spending(20, gmacs=1, peak=100, joules=7)}
    ).total
    assert total.seconds == Measured(30, "s", "clock")
    assert total.macs == Counted(5e9, "MAC")
    assert total.steps.value == 20
    assert total.peak_bytes == Measured(200, "B", "VmHWM")
    assert total.joules == Measured(12, "J", "RAPL")
    assert total.modelled_joules == Modelled(4, 6, "J", "Horowitz, ISSCC 2014, 45 nm")


def test_what_one_phase_lacks_the_total_lacks() -> None:
    phases = {"search": spending(10, joules=5), "train": spending(20, peak=None, joules=None)}
    total = Bill(phases=phases).total
    assert total.peak_bytes is None
    assert total.joules is None
    phases["train"] = replace(spending(0), joules=None)  # a phase without any time has nothing to measure
    assert Bill(phases=phases).total.joules == Measured(5, "J", "RAPL")
    phases["train"] = replace(spending(1), macs=None, bit_macs=None, modelled_joules=None)
    assert Bill(phases=phases).total.macs is None
    assert Bill(phases=phases).total.modelled_joules is None


def test_time_lost_to_a_kill_hides_no_peak() -> None:
    nothing = {"steps": Counted(0, "steps"), "images": Counted(0, "images")}
    phases = {"train": spending(20, peak=100), "lost": replace(spending(5, peak=None), **nothing)}
    total = Bill(phases=phases).total
    assert total.peak_bytes == Measured(100, "B", "VmHWM")
    assert total.seconds.value == 25
    phases["lost"] = spending(5, peak=None)  # something ran, so its memory counts
    assert Bill(phases=phases).total.peak_bytes is None


def test_columns_of_the_table_have_titles_of_their_own() -> None:
    head = str(bill(spending(10, joules=5))).splitlines()[2]
    titles = [title.strip() for title in head.split("  ") if title.strip()]
    assert len(titles) == len(set(titles)) == 8
    assert {"measured energy", "modelled energy"} <= set(titles)


def test_absent_numbers_say_so() -> None:
    text = str(bill(replace(spending(10, peak=None), macs=None, bit_macs=None, modelled_joules=None)))
    assert text.count("not measured") == 4  # peak and energy, in the phase and in the total
    assert text.count("not counted") == 6


def test_a_gain_is_a_gain() -> None:
    done = bill(spending(10, gmacs=1, modelled=(1, 2)), spending(25, gmacs=4, modelled=(3, 5)))
    assert str(done.ratios["seconds"]) == "x2.50 less"
    assert done.ratios["seconds"].kind == "measured"
    assert done.ratios["macs"] == Ratio(4, 4, "counted")
    assert str(done.ratios["modelled_joules"]) == "x2.50 .. x3.00 less"
    assert str(done.ratios["peak_bytes"]) == "the same"
    assert done.remarks == []


def test_a_loss_is_printed_as_a_loss() -> None:
    done = bill(spending(12), spending(10))
    assert done.ratios["seconds"].loss
    assert str(done.ratios["seconds"]) == "x1.20 MORE than dense"
    assert "A loss: time x1.20 MORE than dense (measured)." in done.remarks
    assert "x1.20 MORE" in str(done)


def test_when_only_counted_and_modelled_numbers_improve_the_bill_says_so() -> None:
    done = bill(spending(10, gmacs=1, modelled=(1, 1)), spending(10, gmacs=4, modelled=(3, 3)))
    (remark,) = done.remarks
    assert remark.startswith("Only counted or modelled numbers improved: MACs x4.00 less (counted)")
    assert "modelled energy x3.00 less (modelled)" in remark
    assert remark.endswith("nothing that was measured did.")
    assert remark in str(done)


def test_memory_gained_but_no_time_is_said_too() -> None:
    done = bill(spending(11, gmacs=1, peak=50), spending(10, gmacs=4, peak=100))
    assert any(remark.startswith("Time did not improve, although MACs x4.00 less") for remark in done.remarks)


def test_an_estimate_of_dense_is_labelled_everywhere() -> None:
    basis = "the search phase's own 300 ms a step"
    done = bill(spending(10), spending(30, basis=basis))
    assert done.ratios["seconds"].kind == "estimated"
    text = str(done)
    assert "dense (estimate)" in text
    assert "~30 s" in text
    assert f"Dense was not run: its time is an estimate from {basis}." in text
    measured = done.against(bill(spending(30)))
    assert measured.ratios["seconds"].kind == "measured"
    assert "estimate)" not in str(measured)


def test_a_conclusion_that_hangs_on_the_price_of_memory_is_reported() -> None:
    done = bill(spending(10, gmacs=1, modelled=(1.0, 3.0)), spending(20, gmacs=1, modelled=(1.2, 2.4)))
    assert any("depends on the price of a DRAM access" in remark for remark in done.remarks)
    assert str(done.ratios["modelled_joules"]) == "x0.80 .. x1.20: less or MORE"


def test_without_dense_nothing_is_compared() -> None:
    alone = bill(spending(10))
    assert alone.ratios == {}
    assert alone.remarks == []
    assert "dense" not in str(alone)


def test_ratio_needs_both_sides_and_no_division_by_zero() -> None:
    assert "joules" not in bill(spending(1, joules=5), spending(1)).ratios
    assert "seconds" not in bill(spending(0), spending(1)).ratios


def test_against_compares_two_bills_and_drops_the_other_ones_own_comparison() -> None:
    dense = bill(spending(40, joules=8), spending(1))
    done = bill(spending(10, joules=2)).against(dense)
    assert done.dense is not None
    assert done.dense.dense is None
    assert done.ratios["joules"] == Ratio(4, 4, "measured")


def test_json_round_trip_keeps_kinds() -> None:
    done = replace(bill(spending(10, joules=None), spending(30, basis="x", peak=None)), parameters=7, device="cuda:0")
    state = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert Bill.from_json(state) == done
    assert str(Bill.from_json(state)) == str(done)
    assert state["phases"]["train"]["seconds"]["kind"] == "measured"
    assert state["dense"]["phases"]["train"]["seconds"] == {
        "kind": "estimated",
        "value": 30,
        "unit": "s",
        "basis": "x",
    }
    assert state["phases"]["train"]["joules"] is None


@pytest.mark.parametrize("state", [{}, [], {"phases": {"train": {}}}, {"phases": {"a": {"seconds": {"kind": "felt"}}}}])
def test_what_is_no_bill_is_refused(state: object) -> None:
    with pytest.raises(InputError, match="not a bill"):
        Bill.from_json(state)  # type: ignore[arg-type]


def test_lines_of_the_table_align() -> None:
    lines = str(bill(spending(10), spending(30))).splitlines()
    table = lines[2 : lines.index("", 3)]
    assert len({len(line) for line in table if set(line) == {"-"}}) == 1
    assert max(len(line) for line in table) <= 140
