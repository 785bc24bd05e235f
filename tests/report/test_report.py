import json
import re

import pytest

from earlybird.cost.bill import Ratio
from earlybird.cost.verdict import judge
from earlybird.errors import InputError
from earlybird.report import write
from earlybird.report.against import times_less
from earlybird.report.page import compose
from earlybird.report.read import read
from tests.report.folders import write_run


def page_of(*folders):
    return compose(read(list(folders)))


def tiles(page):
    return {tile.name: tile for tile in page["tiles"]}


def test_a_win_says_by_how_much_in_time_and_accuracy(tmp_path):
    page, figures = page_of(
        write_run(tmp_path / "dense", dense=True, accuracy=0.9),
        write_run(tmp_path / "ticket", seconds=40, accuracy=0.91),
    )
    assert page["headline"] == (
        "The ticket trained in 2.50\N{MULTIPLICATION SIGN} less time than dense "
        "and ended 1.00 points above it in accuracy"
    )
    assert not page["loss"]
    assert tiles(page)["Time"].kind == "measured"
    assert tiles(page)["MACs"].kind == "counted"
    assert tiles(page)["Energy"].kind == "modelled"
    assert not page["has_estimate"]
    assert {"bill-seconds", "bill-macs", "accuracy-curves", "matrix-0", "settling-0", "channels-0"} <= set(figures)


def test_a_loss_is_called_a_loss(tmp_path):
    page, _ = page_of(
        write_run(tmp_path / "dense", dense=True), write_run(tmp_path / "ticket", seconds=120, accuracy=0.85)
    )
    assert page["headline"].startswith("The ticket lost: it took 1.20\N{MULTIPLICATION SIGN} MORE time than dense")
    assert "5.00 points below" in page["headline"]
    assert page["loss"]
    assert tiles(page)["Time"].loss
    assert tiles(page)["Accuracy"].loss
    assert "MORE" in page["contenders"].rows[1].cells[4]


@pytest.mark.parametrize(
    ("seconds", "accuracy", "verdict", "loss"),
    [
        (40, 0.88, "Less time, but a loss of accuracy", True),
        (40, 0.895, "A win: less time, accuracy within 0.5 points", False),
        (100.2, 0.85, "A loss: less accurate in the same time", True),
        (120, 0.92, "More accurate, but a loss of time", True),
    ],
)
def test_the_verdict_is_the_one_of_compare(tmp_path, seconds, accuracy, verdict, loss):
    page, _ = page_of(
        write_run(tmp_path / "dense", dense=True, accuracy=0.9),
        write_run(tmp_path / "ticket", seconds=seconds, accuracy=accuracy),
    )
    said = str(judge(seconds / 100, 100 * (accuracy - 0.9), runs=1))
    assert said[1:] in page["lead"][0]
    assert page["lead"][0].startswith(verdict)
    assert page["loss"] == loss
    assert tiles(page)["Accuracy"].loss == ("loss of accuracy" in said or "less accurate" in said)


def test_without_a_dense_run_the_comparison_is_labelled_an_estimate(tmp_path):
    page, figures = page_of(write_run(tmp_path / "ticket", seconds=50))
    assert "an estimated 2.00" in page["headline"]
    assert tiles(page)["Time"].kind == "estimated"
    assert page["has_estimate"]
    assert figures["bill-seconds"]["data"][0]["y"] == ["dense (estimate)", "ticket, keep 0.5"]
    assert page["contenders"] is None


def test_seeds_of_one_recipe_are_one_contender_compared_seed_by_seed(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"dense-{seed}", dense=True, seed=seed, seconds=100 + seed)
        write_run(tmp_path / f"ticket-{seed}", seed=seed, seconds=50 + seed, accuracy=0.9 + seed / 100)
    contenders = read([tmp_path])
    assert [(c.label, len(c.runs)) for c in contenders] == [("dense", 3), ("ticket, keep 0.5", 3)]
    page, figures = compose(contenders)
    ticket = page["contenders"].rows[1].cells
    assert ticket[1] == "91.00 % (90.00 % to 92.00 %)"
    assert ticket[3] == "51 s (50 s to 52 s)"
    assert len([line for line in figures["accuracy-curves"]["data"] if line["mode"] == "lines+markers"]) == 6
    # each seed against its own dense run, as compare does it
    mean = sum((50 + seed) / (100 + seed) for seed in range(3)) / 3
    assert ticket[4].startswith(f"{1 / mean:.2f}")


def test_a_comparison_keeps_its_contenders_names_and_order(tmp_path):
    for seed in range(2):  # what these two train may differ from seed to seed
        write_run(tmp_path / f"dense-equal-time-seed{seed}", dense=True, seed=seed, seconds=40 + seed)
        write_run(tmp_path / f"dense-seed{seed}", dense=True, seed=seed)
        write_run(tmp_path / f"ticket-seed{seed}", seed=seed, seconds=40)
    names = dict.fromkeys(("dense", "ticket", "dense-equal-time"), "")
    (tmp_path / "comparison.json").write_text(json.dumps({"contenders": names}))
    contenders = read([tmp_path])
    assert [(c.label, len(c.runs)) for c in contenders] == [(name, 2) for name in names]
    page, _ = compose(contenders)
    assert page["headline"].startswith("The ticket trained in 2.50")
    assert next(row.cells[4] for row in page["contenders"].rows) == ""
    assert page["contenders"].rows[2].cells[4].startswith("2.47")


def test_bars_add_up_to_the_bill(tmp_path):
    _, figures = page_of(write_run(tmp_path / "dense", dense=True), write_run(tmp_path / "ticket", seconds=40))
    bars = [trace for trace in figures["bill-seconds"]["data"] if trace["type"] == "bar"]
    assert [sum(trace["x"][i] for trace in bars) for i in (0, 1)] == pytest.approx([100, 40])
    assert figures["bill-seconds"]["layout"]["xaxis"]["title"]["text"] == "s"


def test_the_draw_is_marked_on_the_curve_and_its_window_in_the_matrix(tmp_path):
    _, figures = page_of(write_run(tmp_path / "ticket", seconds=40))
    (mark,) = [trace for trace in figures["accuracy-curves"]["data"] if trace["mode"] == "markers"]
    assert mark["x"] == pytest.approx([24.0])  # step 12 of 20 in 40 s
    (frame,) = figures["matrix-0"]["layout"]["shapes"]
    assert (frame["x0"], frame["x1"]) == (0.5, 5.5)  # the last five of six looks


def test_channels_before_and_after(tmp_path):
    page, figures = page_of(write_run(tmp_path / "ticket", keep=0.25))
    before, after = figures["channels-0"]["data"]
    assert (before["y"], after["y"]) == ([16, 32, 32, 64], [4, 8, 8, 16])
    assert "500 k weights became 140 k (28%)" in page["channels"][0]["note"]
    assert ", 2 of them only because widths were rounded;" in page["channels"][0]["note"]


def test_the_chosen_candidate_is_marked(tmp_path):
    page, _ = page_of(write_run(tmp_path / "ticket"))
    assert [row.style for row in page["tuned"][0]["table"].rows] == ["", "chosen"]


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path):
    run = write_run(tmp_path / "ticket")
    for name in ("bill.json", "ticket.safetensors", "history.json", "change.json", "tune.json"):
        (run / name).unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')  # killed while writing
    out = write([run], tmp_path / "report.html")
    assert "accuracy-curves" in out.read_text(encoding="utf-8")
    page, _ = page_of(run)
    assert page["headline"] == "The run is under way, at 90.00 %"
    assert page["lead"] == ["When last seen it was still searching."]
    (run / "metrics.jsonl").unlink()
    page, _ = page_of(run)
    assert page["headline"] == "Nothing was evaluated yet"


def test_a_run_that_never_drew_says_so(tmp_path):
    run = write_run(tmp_path / "ticket")
    for name in ("ticket.safetensors", "change.json"):
        (run / name).unlink()
    page, _ = page_of(run)
    assert page["headline"] == "No ticket was drawn"


def test_runs_of_other_tasks_are_not_compared(tmp_path):
    dense = write_run(tmp_path / "dense", dense=True, seconds=10)
    recipe = dense / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("small_cnn", "vgg16"))
    page, _ = page_of(dense, write_run(tmp_path / "ticket", seconds=40))
    assert page["headline"].startswith("The ticket trained in an estimated 2.50")
    assert "Of another model or other data, and so not compared: dense." in page["lead"]


def test_a_half_done_comparison_compares_what_is_paired(tmp_path):
    page, _ = page_of(
        write_run(tmp_path / "dense0", dense=True, seed=0, seconds=100, accuracy=0.9),
        write_run(tmp_path / "ticket0", seed=0, seconds=50, accuracy=0.9),
        write_run(tmp_path / "ticket1", seed=1, seconds=500, accuracy=0.5),
    )
    assert (
        page["headline"]
        == "The ticket trained in 2.00\N{MULTIPLICATION SIGN} less time than dense and ended at the same accuracy"
    )


def test_contenders_of_two_comparisons_keep_apart(tmp_path):
    page, _ = page_of(
        *(write_run(tmp_path / name / "dense-seed0", dense=True, seconds=100 + i) for i, name in enumerate("ab")),
        *(
            write_run(tmp_path / name / "ticket-seed0", seconds=50 + i, keep=0.5 + 0.1 * i)
            for i, name in enumerate("ab")
        ),
    )
    labels = [row.cells[0] for row in page["contenders"].rows]
    assert len(labels) == len(set(labels)) == 3


def test_a_dense_run_alone(tmp_path):
    page, figures = page_of(write_run(tmp_path / "dense", dense=True))
    assert page["headline"] == "Dense training reached 90.00 %"
    assert "bill-seconds" in figures
    assert not page["channels"]


def test_runs_of_different_machines_are_not_compared_silently(tmp_path):
    dense, ticket = write_run(tmp_path / "dense", dense=True), write_run(tmp_path / "ticket")
    (ticket / "environment.json").write_text(json.dumps({"torch": "2.13.0", "processor": "another", "cores": 64}))
    page, _ = page_of(dense, ticket)
    assert page["environment_notes"] == ["Other runs were made elsewhere: ticket. Their times do not compare."]


def test_names_from_outside_are_escaped(tmp_path):
    run = write_run(tmp_path / "ticket")
    text = (run / "recipe.toml").read_text().replace('"digits"', "'</script><b>digits'")
    (run / "recipe.toml").write_text(text)
    html = write([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "</script><b>" not in html


def test_the_file_names_no_outside_source(tmp_path):
    html = write([write_run(tmp_path / "ticket")], tmp_path / "report.html").read_text(encoding="utf-8")
    ours = html[: html.index("<script>")]  # before plotly.js, which holds addresses of maps that are not asked for
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", ours)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda run: (run / "recipe.toml").unlink(), "holds no run"),
        (lambda run: (run / "recipe.toml").write_text("keep ="), "recipe.toml is damaged"),
        (lambda run: (run / "bill.json").write_text("{"), "bill.json is damaged"),
        (lambda run: (run / "bill.json").write_text('{"phases": 3}'), "not a bill"),
        (lambda run: (run / "ticket.safetensors").write_bytes(b"no"), "ticket.safetensors is damaged"),
        (lambda run: (run / "tune.json").write_text("[]"), "tune.json holds a list"),
    ],
)
def test_damaged_folders_are_named_and_nothing_is_written(tmp_path, damage, found):
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(InputError, match=found):
        write([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_only_a_report_is_written_over(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("my own page")
    with pytest.raises(InputError, match="no earlybird report"):
        write([run], out)
    assert out.read_text() == "my own page"
    out.unlink()
    write([run], out)
    write([run], out)  # its own kind is replaced
    with pytest.raises(InputError, match="is a folder"):
        write([run], tmp_path)


def test_a_run_without_a_ticket_is_called_by_its_method(tmp_path):
    run = write_run(tmp_path / "resized", seconds=40)
    for name in ("ticket.safetensors", "change.json", "history.json"):
        (run / name).unlink()
    recipe = run / "recipe.toml"
    text = recipe.read_text().replace("keep = 0.5\n", "").replace("tolerance = 0.1\nwindow = 5\n", "")
    recipe.write_text(text + 'method = ["progressive_resizing"]\n')
    page, _ = page_of(write_run(tmp_path / "dense", dense=True, seconds=100), run)
    assert page["headline"].startswith("Progressive resizing trained in 2.50")


def test_what_methods_tell_is_drawn_as_lines_or_as_a_map(tmp_path):
    folder = write_run(tmp_path / "run")
    few = {"title": "bits", "unit": "bits", "note": "", "steps_hold": True, "series": {"all": [[0, 3], [10, 8]]}}
    many = {"title": "share", "unit": "share", "note": "Executed.", "steps_hold": False,
            "series": {f"block {n}": [[0, 0.5], [5, n / 10]] for n in range(9)}}  # fmt: skip
    empty = {**few, "series": {"all": []}}
    (folder / "traces.json").write_text(json.dumps({"progressive_precision": [few, empty], "layer_skipping": [many]}))
    page, figures = page_of(folder)
    assert [chart["title"] for chart in page["traces"]] == ["progressive precision: bits", "layer skipping: share"]
    line = figures["trace-0"]["data"][0]
    assert (line["x"], line["y"], line["line"]["shape"]) == ([0, 10], [3, 8], "hv")
    heat = figures["trace-1"]["data"][0]
    assert heat["z"][4] == [0.5, 0.4]
    assert len(heat["y"]) == 9
    html = write([folder], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "What the methods did" in html


def test_easiest_and_hardest_images_are_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    shown = {"amount": 3.0, "label": "cat", "png": "iVBORw0KGgo="}
    (folder / "inputs.json").write_text(
        json.dumps({"layer_skipping": {"mean": 4.5, "least": [shown], "most": [{**shown, "label": "<dog>"}]}})
    )
    html = write([folder], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "data:image/png;base64,iVBORw0KGgo=" in html
    assert "4.5 in the mean" in html
    assert "&lt;dog&gt;" in html


def test_energy_is_split_by_operation_where_there_are_several(tmp_path):
    folder = write_run(tmp_path / "run")
    assert page_of(folder)[0]["operations"] is None
    bill = json.loads((folder / "bill.json").read_text())
    bill["phases"] = {"train": {**bill["phases"]["train"], "passes": {"forward": 1e12}}}
    bill["phases"]["train"]["operations"] = {"mult 8x8": 1e12, "add 8": 1e12, "shift 8": 1e12}
    (folder / "bill.json").write_text(json.dumps(bill))
    page, figures = page_of(folder)
    assert [name for name, _ in page["operations"]["legend"]] == ["mult 8x8", "add 8", "shift 8", "data movement"]
    bars = {bar["name"]: bar["x"][0] for bar in figures["operations"]["data"]}
    assert bars["mult 8x8"] / bars["add 8"] == pytest.approx(0.2 / 0.03)


def test_a_run_of_which_nothing_tells_what_dense_would_have_taken(tmp_path):
    folder = write_run(tmp_path / "run")
    bill = json.loads((folder / "bill.json").read_text())
    for row in bill["dense"]["phases"].values():
        row["seconds"] = row["peak_bytes"] = None
    (folder / "bill.json").write_text(json.dumps(bill))
    page, _ = page_of(folder)
    assert page["has_estimate"]
    assert page["headline"] == "The ticket reached 90.00 %; what dense takes was not measured"
    assert page["lead"][0] == "Dense was not run: its time is not known."
    assert "Time" not in [tile.name for tile in page["tiles"] if "less" in tile.value]
    html = write([folder], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "not measured" in html


def test_own_kernels_show_as_a_candidate_and_layer_by_layer(tmp_path):
    run = write_run(tmp_path / "ticket")
    tune = json.loads((run / "tune.json").read_text())
    fastest = tune["candidates"][1]
    tune["candidates"] = [{**fastest, "kernels": False}, {**fastest, "kernels": True, "step_s": 0.05}]
    tune["choice"] |= {"kernels": {"products_for_weights": 16, "products_for_all": 0, "batch_norms": True}}
    tune["convolutions"] = [{"positions": 16, "layers": 3, "pytorch_s": 0.3, "weights_s": 0.1, "passes_s": 0.2}]
    (run / "tune.json").write_text(json.dumps(tune))
    steps, layers = page_of(run)[0]["tuned"]
    assert steps["title"].endswith("eager + own kernels")
    assert [row.style for row in steps["table"].rows] == ["", "chosen"]
    assert layers["table"].rows[0].cells == ["16", "3", "300 ms", "100 ms", "200 ms"]
    write([run], tmp_path / "report.html")
    assert "all passes as products" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.4, 0.5, "2.50\N{MULTIPLICATION SIGN} MORE"), (2.0, 2.5, "2.00\N{MULTIPLICATION SIGN} less")],
)
def test_of_a_range_the_worse_end_is_told(low: float, high: float, said: str) -> None:
    assert times_less(Ratio(low, high, "modelled")) == said
