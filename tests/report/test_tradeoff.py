import json
import math
import re

import pytest
import torch

from earlybird.report import write
from earlybird.report.charts import Place, tradeoff
from earlybird.report.page import compose
from earlybird.report.read import read, read_points
from earlybird.report.tradeoff import headline, tiles
from earlybird.tickets.ticket import Ticket
from earlybird.train.points import points_of
from tests.report.folders import write_run

PARAMETERS = 1000


def row(contender, *, seed=0, accuracy=0.9, density=1.0, seconds=100.0, joules=50.0, rounds=(), jobs=1, share_of=None):
    method, _, keep = contender.partition("-")
    return {
        "contender": contender, "method": method if keep else "", "keep": float(keep) if keep else None, "seed": seed,
        "accuracy": accuracy, "nonzero": round(density * PARAMETERS), "parameters": PARAMETERS, "seconds": seconds,
        "macs": 1e12, "bit_macs": 1e12, "modelled_joules": joules, "peak_bytes": 5e8, "side_by_side": jobs,
        "share_of": share_of or ("weights" if keep else None), "kept": density if keep else None,
        "rounds": list(rounds),
    }  # fmt: skip


def rounds(*accuracies):
    """Rounds of 100 s each that halve the weights."""
    return [
        {"round": k, "accuracy": accuracy, "seconds": 100.0 * (k + 1), "macs": 1e12 * (k + 1), "bit_macs": 1e12,
         "peak_bytes": 5e8, "nonzero": PARAMETERS / 2**k, "modelled_joules": 50.0 + 10 * k, "kept": 0.5**k}
        for k, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def comparison(tmp_path, rows):
    for one in rows:
        write_run(
            tmp_path / f"{one['contender']}-seed{one['seed']}", dense=not one["method"], seed=one["seed"],
            seconds=one["seconds"], accuracy=one["accuracy"], keep=one["keep"] or 0.5,
        )  # fmt: skip
    names = dict.fromkeys((one["contender"] for one in rows), "")
    record = {"contenders": names, "points": points_of(rows, "dense")}
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    return compose(read([tmp_path]), read_points([tmp_path]))


def test_each_method_is_a_line_and_dense_a_rule_with_its_spread(tmp_path):
    rows = [row("dense", seed=seed, accuracy=0.90 + seed / 100) for seed in range(3)]
    rows += [row("snip-0.5", seed=seed, accuracy=0.89 + seed / 100, density=0.5) for seed in range(3)]
    rows += [row("snip-0.1", seed=seed, accuracy=0.80, density=0.1) for seed in range(3)]
    rows += [row("rigl-0.1", seed=seed, accuracy=0.85, density=0.1, seconds=120) for seed in range(3)]
    page, figures = comparison(tmp_path, rows)
    (section,) = page["tradeoffs"]
    assert [chart["kind"] for chart in section["charts"]] == ["counted", "measured", "modelled"]
    chart = figures["tradeoff-density-0"]
    snip, rigl, dense = chart["data"]
    assert (snip["name"], rigl["name"], dense["name"]) == ("snip", "rigl", "dense")
    assert snip["x"] == pytest.approx([50, 10])
    assert snip["y"] == pytest.approx([90, 80])
    assert snip["error_y"]["array"] == pytest.approx([1, 0])
    assert snip["marker"]["symbol"] != rigl["marker"]["symbol"]
    band, rule = chart["layout"]["shapes"]
    assert (band["y0"], band["y1"]) == pytest.approx((90, 92))
    assert rule["y0"] == pytest.approx(91)
    assert chart["layout"]["xaxis"]["type"] == "log"
    assert chart["layout"]["xaxis"]["range"][0] > 2 > 1 > chart["layout"]["xaxis"]["range"][1]  # from the whole down
    assert "standard deviation" in " ".join(section["notes"])
    # one colour a method, in all charts of the page
    assert page["accuracy"]["legend"] == [("dense", "var(--dense)"), *section["legend"]]
    assert [cells.cells[0] for cells in section["table"].rows] == ["dense", "snip-0.5", "snip-0.1", "rigl-0.1"]
    assert "of the round" not in section["table"].head


def test_a_run_in_rounds_has_a_point_for_each_at_what_it_had_cost_by_then(tmp_path):
    page, figures = comparison(
        tmp_path, [row("dense"), row("imp-0.25", density=0.25, seconds=300, rounds=rounds(0.9, 0.91, 0.88))]
    )
    imp = figures["tradeoff-seconds-0"]["data"][0]
    assert imp["x"] == pytest.approx([100 / 60, 200 / 60, 300 / 60])
    assert figures["tradeoff-density-0"]["data"][0]["x"] == pytest.approx([100, 50, 25])
    (section,) = page["tradeoffs"]
    table = [dict(zip(section["table"].head[:7], cells.cells)) for cells in section["table"].rows]
    assert [line[""] for line in table] == ["dense", "imp-0.25, round 0", "imp-0.25, round 1", "imp-0.25, round 2"]
    assert [line["time"] for line in table[1:]] == ["1 min 40 s", "3 min 20 s", "5 min 00 s"]
    assert [line["of the round"] for line in table] == ["", *["1 min 40 s"] * 3]
    assert page["headline"] == "imp-0.25, round 1 keeps 50.00% of the network, 1.00 points above dense"
    assert "no time is saved" in " ".join(section["notes"])
    assert [(tile.name, tile.value) for tile in page["tiles"][1:]] == [
        ("Smallest", "50.0% of dense"),
        ("Fastest", "2.00\N{MULTIPLICATION SIGN} MORE"),
        ("Least energy", "1.20\N{MULTIPLICATION SIGN} MORE"),
    ]
    assert [tile.loss for tile in page["tiles"]] == [False, False, True, True]


def test_when_nothing_is_as_accurate_the_page_says_so():
    points = points_of([row("dense"), row("snip-0.1", accuracy=0.8, density=0.1)], "dense")
    sentence, loss, lead = headline(points)
    assert sentence == "No smaller network stays within 0.5 points of dense"
    assert loss
    assert "snip-0.1, at \N{MINUS SIGN}10.00 points" in lead[0]
    assert tiles(points) == []


def test_of_equally_small_ones_the_more_accurate_is_named():
    rows = [row("dense"), row("imp-0.1", density=0.1, accuracy=0.896), row("rigl-0.1", density=0.1, accuracy=0.905)]
    assert headline(points_of(rows, "dense"))[0] == "rigl-0.1 keeps 10.00% of the network, 0.50 points above dense"


def test_runs_side_by_side_have_no_fastest(tmp_path):
    page, _ = comparison(tmp_path, [row("dense", jobs=2), row("snip-0.5", density=0.5, jobs=2)])
    assert "Fastest" not in [tile.name for tile in page["tiles"]]
    assert "Up to 2 runs went side by side" in " ".join(page["tradeoffs"][0]["notes"])


def test_a_ticket_that_ran_beside_others_is_not_called_faster(tmp_path):
    write_run(tmp_path / "dense-seed0", dense=True, accuracy=0.9)
    write_run(tmp_path / "ticket-seed0", seconds=40, accuracy=0.9)
    (tmp_path / "side-by-side.json").write_text(json.dumps({"ticket-seed0": 3}))
    page, _ = compose(read([tmp_path]))
    assert page["headline"] == "The ticket reached 90.00 %; its time is not judged"
    assert page["lead"] == ["Up to 3 runs went side by side: their seconds do not compare with those of a lone run."]
    assert page["lead"][0] in page["bill_note"]
    cells = dict(zip(page["contenders"].head, page["contenders"].rows[1].cells))
    assert "less" not in page["contenders"].rows[1].cells[4]
    assert "less" in cells["MACs"]


def test_tickets_of_rounds_are_compared_with_each_other(tmp_path):
    run = write_run(tmp_path / "imp")
    masks = {"features.0": torch.tensor([[True, False], [True, False]])}
    Ticket(masks, {"features.0": "weight"}, {"method": "iterative", "round": 2}).save(run / "ticket.safetensors")
    page, figures = compose(read([run]))
    (card,) = page["distances"]  # nothing has to settle
    assert card["note"] == "The tickets of 6 rounds, each a part of the one before."
    assert page["distances_rounds"]
    assert figures["channels-0"]["layout"]["yaxis"]["title"]["text"] == "weights"
    assert page["channels"][0]["note"].startswith("50.00% of the weights stayed")


def test_a_comparison_without_methods_has_no_such_section(tmp_path):
    write_run(tmp_path / "dense-seed0", dense=True)
    write_run(tmp_path / "ticket-seed0", seconds=40)
    (tmp_path / "comparison.json").write_text(json.dumps({"contenders": {"dense": "", "ticket": ""}, "points": []}))
    assert read_points([tmp_path]) == []
    page, _ = compose(read([tmp_path]), read_points([tmp_path]))
    assert page["tradeoffs"] == []
    assert page["headline"].startswith("The ticket trained")


@pytest.mark.parametrize(("costs", "log"), [([1.0, 3.0], False), ([1.0, 30.0], True), ([0.0, 30.0], False)])
def test_an_axis_of_costs_is_logarithmic_where_they_differ_much(costs, log):
    places = [Place("x", cost, 90.0, 0.0, 0.0, 1) for cost in costs]
    axis = tradeoff({"a": places}, {"a": "red"}, None, unit="s", title="time", shares=False)["layout"]["xaxis"]
    assert (axis.get("type") == "log") == log
    if log:
        assert all(10 ** axis["range"][0] <= tick <= 10 ** axis["range"][1] for tick in axis["tickvals"])
        assert min(costs) > 10 ** axis["range"][0]
        assert math.isclose(axis["tickvals"][0], 1.0)


def test_the_page_is_written_with_the_figures_in_their_places(tmp_path):
    comparison(tmp_path, [row("dense"), row("imp-0.25", density=0.25, rounds=rounds(0.9, 0.91)), row("snip-0.5")])
    html = write([tmp_path], tmp_path / "report.html").read_text("utf-8")
    ids = set(re.findall(r'class="chart" id="([^"]+)"', html))
    drawn = json.loads(re.search(r'id="charts">(.*?)</script>', html, re.DOTALL)[1])
    assert {"tradeoff-density-0", "tradeoff-seconds-0", "tradeoff-modelled-joules-0"} <= ids == set(drawn)


def test_masked_weights_are_not_the_fastest_by_chance():
    rows = [row("dense"), row("rigl-0.5", density=0.5, seconds=90)]
    found = {tile.name: tile for tile in tiles(points_of(rows, "dense"))}
    assert found["Fastest"].value == "the same"
    channels = row("early_bird-0.5", density=0.5, seconds=95, share_of="channels")
    found = {tile.name: tile for tile in tiles(points_of([*rows, channels], "dense"))}
    assert found["Fastest"].note.startswith("early_bird-0.5")
