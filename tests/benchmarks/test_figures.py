import itertools
import re
from xml.etree import ElementTree

import figures
import pytest
from figures import COLOURS, HEIGHT, LEFT, TOP, WIDTH, Axis, Series, apart, beside, chart, heat_maps
from hypothesis import given
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.lists(st.floats(-1e9, 1e9).map(lambda value: round(value, 6)), min_size=1, max_size=20)
POSITIVE = st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=20)


@given(NUMBERS, st.booleans())
def test_a_linear_axis_contains_its_values_and_has_few_round_ticks(values, zero):
    axis = Axis.around(values, "", zero=zero)
    slack = 1e-9 * (axis.high - axis.low)
    assert all(axis.low - slack <= value <= axis.high + slack for value in values)
    assert not zero or axis.low <= 0
    assert 2 <= len(axis.ticks()) <= 10
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in axis.ticks())


@given(POSITIVE)
def test_a_logarithmic_axis_contains_its_values(values):
    axis = Axis.around(values, "", log=True)
    assert all(0 < axis.share(value) < 1 for value in values)
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks())


def test_ticks_of_a_logarithmic_axis_are_one_two_five_and_over_many_decades_powers_of_ten():
    assert Axis("", 30, 600, log=True).ticks() == [50, 100, 200, 500]
    assert Axis("", 0.5, 2e6, log=True).ticks() == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]


def test_equal_factors_are_equal_ways_on_a_logarithmic_axis():
    axis = Axis("", 1, 1000, log=True)
    assert [axis.share(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_logarithmic_axis_has_no_room_for_zero():
    with pytest.raises(ValueError, match="positive"):
        Axis.around([0.0, 1.0], "", log=True)


def test_a_chart_is_well_formed_and_every_point_is_inside_its_frame():
    series = [
        Series(points=[(1, 10), (10, 40), (100, 90)], colour=COLOURS[0], label="a < b & c"),
        Series(points=[(2, 91), (50, 12)], colour=COLOURS[1], line=False, label="dots"),
        Series(points=[(1, 50), (100, 50)], colour=COLOURS[5], dots=False, dashed=True),
    ]
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    svg = chart(series, Axis.around(xs, "x", log=True), Axis.around(ys, "y <%>"), title="t & t", note="n")
    root = ElementTree.fromstring(svg)
    dots = root.findall(f"{SVG}circle")
    assert len(dots) == 3 + 2
    assert len(root.findall(f"{SVG}polyline")) == 2
    for dot in dots:
        assert LEFT <= float(dot.get("cx")) <= WIDTH
        assert TOP <= float(dot.get("cy")) <= HEIGHT - figures.BOTTOM
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"a < b & c", "dots", "x", "y <%>", "t & t", "n"} <= set(texts)


def test_the_highest_point_of_a_chart_is_the_highest_on_the_page():
    svg = chart([Series(points=[(0, 1), (1, 5), (2, 3)], colour=COLOURS[0])], Axis("", 0, 2), Axis("", 0, 5), title="")
    left, top = zip(
        *((float(dot.get("cx")), float(dot.get("cy"))) for dot in ElementTree.fromstring(svg).iter(f"{SVG}circle"))
    )
    assert list(left) == sorted(left)
    assert top[1] == min(top) == TOP
    assert top[0] > top[2]


@pytest.mark.parametrize("page", ["light", "dark"])
def test_ink_is_readable_on_light_and_dark_pages(page):
    svg = chart([Series(points=[(0, 0), (1, 1)], colour=COLOURS[0])], Axis("", 0, 1), Axis("", 0, 1), title="t")
    inks = re.findall(r"text\{fill:(#[0-9a-f]{6})\}", svg)
    ink, paper = (inks[0], "#ffffff") if page == "light" else (inks[1], "#0d1117")
    assert _contrast(ink, paper) >= 7
    assert all(_contrast(colour, paper) >= 2.9 for colour in COLOURS)


def _contrast(one, other):
    """Contrast ratio of WCAG 2, from relative luminance."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("maps", "n"), [(1, 3), (4, 5), (6, 1)])
def test_a_heat_map_has_a_cell_for_every_pair(maps, n):
    matrix = [[abs(row - column) / 10 for column in range(n)] for row in range(n)]
    svg = heat_maps([(f"map {i}", list(range(n)), matrix) for i in range(maps)], title="t", key="distance", note="n")
    root = ElementTree.fromstring(svg)
    cells = [rect for rect in root.findall(f"{SVG}rect") if rect.get("class") == "cell"]
    assert len(cells) == maps * n * n
    _, _, right, bottom = map(float, root.get("viewBox").split())
    for cell in cells:
        assert float(cell.get("x")) >= 0
        assert float(cell.get("x")) + float(cell.get("width")) <= right
        assert float(cell.get("y")) + float(cell.get("height")) <= bottom


def test_cells_of_equal_masks_are_the_strongest():
    svg = heat_maps([("", [1, 2], [[0.0, 0.3], [0.3, 0.0]])], title="", key="")
    cells = [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.get("class") == "cell"]
    strength = [float(cell.get("fill-opacity")) for cell in cells]
    assert strength[0] == strength[3] == 1
    assert strength[1] == strength[2] < 0.1


def test_labels_are_moved_apart_and_keep_their_order():
    assert apart([100.0, 101.0, 50.0], 15, 0, 300) == [100, 115, 50]
    assert apart([298.0, 299.0], 15, 0, 300) == [285, 300]
    assert apart([], 15, 0, 300) == []


def test_many_labels_become_numbers_with_a_list_beside_the_chart():
    dots = [Series(points=[(index % 4, 80 + index / 9)], colour="#000", label=f"way {index}") for index in range(20)]
    svg = chart(dots, Axis.around([0, 3], "s"), Axis.around([80, 83], "%"), title="t")
    assert svg.count("<circle") == 20
    for number in range(1, 21):
        assert f">{number}</text>" in svg
        assert f">{number}  way {number - 1}</text>" in svg
    few = chart(dots[:3], Axis.around([0, 3], "s"), Axis.around([80, 83], "%"), title="t")
    assert ">way 0</text>" in few
    assert ">1  way 0</text>" not in few


def test_numbers_of_neighbouring_dots_are_written_on_different_sides():
    places = beside([(100.0, 100.0), (104.0, 100.0), (100.0, 104.0)])
    assert len({(round(x - 100), round(y - 100)) for x, y in places}) == 3
    gaps = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) for a, b in itertools.combinations(places, 2)]
    assert min(gaps) >= 8
