"""The page from made-up rows: of one session each, of one machine each, and of machines with one core."""

import re
from xml.etree import ElementTree

import alternatives
import common
import overheads
import page
import paper_figures
import pytest
import roofline
import scaling
import step_times

PHASES = ("forward", "input", "weight")


@pytest.fixture
def images(tmp_path, results):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def add(name, *found):
    for row in found:
        common.append(name, row)


def cells(text):
    """Return the cells of all lines of tables, heads left out."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if set(line[0]) != {"-"}]


def shown(text, images):
    """Return the pictures of a text, each of which is there and well formed."""
    files = re.findall(r"\]\(images/([^)]+)\)", text)
    for file in files:
        ElementTree.parse(images / file)
    return files


def step_row(head, contestant, seconds, **values):
    row = {"contestant": contestant, "width": 1.0, "step_seconds": seconds, "forward_macs": 2e8}
    return {**row, **head(), **values}


def test_ratios_of_steps_are_those_that_were_recorded_and_of_one_session(results, head):
    add(
        step_times.NAME,
        step_row(head, "dense", 9.0, session="old"),
        step_row(head, "dense", 0.4),
        step_row(head, "ticket", 0.2, ratios={"plain": 5.0, "dense": 1.9}),
        step_row(head, "ticket", 0.1, device="small", ratios={"dense": 3.0}),
    )
    text = page.step_times_section(results)
    assert "| dense | 200 M | 400 |  |  |" in text
    assert "| ticket | 200 M | 200 | 5.00x | 1.90x |" in text
    assert "9000" not in text
    assert "| ticket | 200 M | 100 |  | 3.00x |" in text
    assert text.index("big, 2 threads") < text.index("small, 2 threads")


def test_rows_of_steps_from_before_ratios_have_none(results, head):
    rows = [step_row(head, name, seconds) for name, seconds in (("plain", 1.0), ("ticket", 0.5))]
    add(step_times.NAME, *({key: value for key, value in row.items() if key != "session"} for row in rows))
    text = page.step_times_section(results)
    assert "x |" not in text
    assert "| ticket | 200 M | 500 |" in text


def test_limits_of_overheads_are_checked_and_shares_are_told_from_seconds(results, head):
    add(
        overheads.NAME,
        {"figure": "detector", "share": 0.004, "limit": 0.005, "detail": "d", **head()},
        {"figure": "shrink", "seconds": 1.0, "limit": 3.0, "detail": "old", **head()},
        {"figure": "shrink", "seconds": 3.5, "limit": 3.0, "detail": "s", **head(session="second")},
        {"figure": "old", "help_seconds": 0.1, "floor_seconds": 0.3, "detail": "o", **head()},
    )
    text = page.overheads_section(results)
    assert "| detector | 0.40% | within 0.50% | d |" in text
    assert "| shrink | 3.50 s | ABOVE 3.00 s | s |" in text
    assert "| old |  |  | o |" in text
    assert "1.00 s" not in text


def layers_row(head, network, seconds, **values):
    entry = ["features.0", "convolution", "forward", 4, 8, 16, seconds]
    reached = {"step_seconds": 0.1, "flops": 1e10, "of_peak": 0.25, "of_roofline": 0.5}
    row = {"part": "layers", "width": 0.5, "network": network, "operations": [entry], **reached}
    return {**row, "copies": {"100": 4e10, "1000": 1e10}, "peak": 4e11, **head(), **values}


def test_the_roofline_has_the_points_of_one_session_on_one_machine(images, head):
    rounding = {"part": "rounding", "width": 0.5, "multiple": 8, "step_seconds": 0.02, "against_1": 1.25}
    seconds = {phase: {"8": 1e-4, "16": 2e-4} for phase in PHASES}
    add(
        roofline.NAME,
        layers_row(head, "ticket", 1e-4, session="old"),
        layers_row(head, "dense", 1e-4),
        layers_row(head, "ticket", 2e-4),
        {**rounding, "parameters": 1e6, "forward_macs": 2e6, **head()},
        {"part": "peak", "dtype": "bfloat16", "flops": {}, **head(threads=1)},
        layers_row(head, "dense", 1e-4, device="small", threads=1),
        {"part": "channels", "side": 8, "peak": 4e11, "seconds": seconds, **head()},
    )
    text = page.roofline_section(images)
    assert ["0.5", "dense", "100.0", "100", "25%", "50%"] in cells(text)
    assert ["0.5", "8", "1.00 M", "2.0 M", "20.0", "1.25x"] in cells(text)
    assert len([line for line in cells(text) if line[1] in ("dense", "ticket")]) == 3
    assert shown(text, images) == ["roofline.svg", "roofline-2.svg", "channels.svg"]
    assert (images / "roofline.svg").read_text().count("<circle") == 2
    assert "roof from main memory" in (images / "roofline.svg").read_text()


def test_the_memory_roof_is_the_fastest_copy_that_no_cache_holds(head):
    """At 10 GB/s and 800 GFLOP/s the roofs meet at 80 FLOPs a byte, whatever the smaller copies reach."""
    slower = layers_row(head, "dense", 1e-4, copies={"100": 9e10, "1000": 5e9}, peak=3e11)
    svg = roofline.roofline_figure([slower, layers_row(head, "ticket", 1e-4, peak=8e11)])
    lines = [
        one.get("points").split() for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    ]
    assert lines[0][1] == lines[1][0]  # where the memory's roof ends, the other begins
    one = roofline.Operation("convolution", "forward", 4, 8, 16)
    low, ridge, high = one.flops / one.moved, 80.0, 160.0
    axis = roofline.Axis.around([low, ridge, high], "", log=True)
    left, _, right = (float(place.split(",")[0]) for place in (*lines[0], lines[1][1]))
    meets = float(lines[1][0].split(",")[0])
    share = (axis.share(ridge) - axis.share(low)) / (axis.share(high) - axis.share(low))
    assert (meets - left) / (right - left) == pytest.approx(share, abs=0.01)


def test_alternatives_show_the_newest_session_of_each_machine(results, head):
    convolution = {"side": 2, "inputs": 8, "outputs": 16, "pass": "weight", "own_seconds": 1e-3}
    step = {"width": 0.5, "network": "vgg16", "shrunk": False, "step_seconds": 0.1, "ratio": 1.5}
    add(
        alternatives.NAME,
        {**convolution, "ratios": {"products": 9.0}, **head(session="old")},
        {**convolution, "ratios": {"products": 2.0, "fp32": 0.5}, **head()},
        {**step, **head()},
        {**convolution, "ratios": {"products": 3.0}, **head(device="small")},
    )
    text = page.alternatives_section(results)
    assert ["2", "8 to 16", "weight", "1.000", "products 2.00x, fp32 0.50x"] in cells(text)
    assert ["vgg16 x 0.5", "100.0", "1.50x"] in cells(text)
    assert "9.00x" not in text
    assert text.index("2.00x") < text.index("small, 2 threads") < text.index("3.00x")


def sweep_rows(head, sweep, exponent=1, **values):
    """Every quantity of the i-th point is ``(i + 1) ** exponent``."""
    head = head(**values)
    points = scaling.sweeps(head["threads"])[sweep]
    return [
        {"sweep": sweep, "point": vars(point), "points": len(points),
         **dict.fromkeys(scaling.QUANTITIES, (index + 1.0) ** exponent), **head}
        for index, point in enumerate(points)
    ]  # fmt: skip


def test_sweeps_of_two_machines_and_of_two_sessions_are_never_pooled(images, head):
    small = {"device": "small", "threads": 1}
    add(
        scaling.NAME,
        *sweep_rows(head, "batch", exponent=5, session="old"),
        *sweep_rows(head, "batch"),
        *sweep_rows(head, "threads"),
        *sweep_rows(head, "batch", exponent=2, **small),
        *sweep_rows(head, "threads", **small),
        *sweep_rows(head, "batch", exponent=7, session="cut off")[:-1],
    )
    text = page.scaling_section(images)
    exponents = [line for line in cells(text) if line[0].startswith(("batch", "threads"))]
    assert [line[0] for line in exponents] == [
        "batch (32, 64, 128, 256, 512)", "threads (1, 2)", "batch (32, 64, 128, 256, 512)", "threads (1)",
    ]  # fmt: skip
    once, twice = (float(exponents[index][1].split(" ")[0]) for index in (0, 2))
    assert 0.5 < once < 1
    assert twice == pytest.approx(2 * once, abs=0.02)
    assert set(exponents[1][1:]) == {"1.00"}
    assert set(exponents[3][1:]) == {"no fit"}
    assert shown(text, images) == ["scaling-batch.svg", "scaling-threads.svg", "scaling-batch-2.svg"]


def test_a_peak_that_could_not_be_told_is_left_out_and_said_so(images, head):
    found = sweep_rows(head, "batch")
    found[0]["shrunk_peak_bytes"] = 0
    add(scaling.NAME, *found)
    text = page.scaling_section(images)
    assert "(4 of 5 points)" in text
    assert text.count("points)") == 1


def trained(head, training, **values):
    return {**vars(training), "accuracy": 0.9, "macs": 1e12, "modelled_joules": [1e3, 2e3], "drawn_at": 100,
            **head(), **values}  # fmt: skip


def test_paper_figures_rest_on_done_runs_alone_and_name_the_others(images, head):
    base = paper_figures.Training(
        network="vgg11", data="cifar10", epochs=10, seed=0, preset="default", kind="early", keep=0.5
    )
    other = paper_figures.replace(base, seed=1)
    alone = paper_figures.replace(base, network="resnet20")
    failed = {"status": "failed with exit code 2: the loss is nan", "seconds": 5.0}
    add(
        paper_figures.NAME,
        trained(head, base, side_by_side=2),
        {**vars(other), **head(), **failed},
        {**vars(alone), **head(), **failed},
    )
    text = page.paper_figures_section(images)
    assert "90.00 (1)" in text
    assert f"- {other.name}: failed with exit code 2: the loss is nan" in text
    assert f"- {alone.name}: failed" in text
    assert "2 runs at a time" in text
    assert shown(text, images) == ["paper-controls-vgg11-cifar10-default-10ep.svg"]


def test_a_page_goes_where_it_is_asked_to_with_what_it_shows(tmp_path, results):
    written = page.write(tmp_path / "new")
    assert written == tmp_path / "new" / "README.md"
    assert written.read_text().count("No rows yet.") == len(page.SECTIONS)
