"""Draw accuracy against seconds, from the rows of a benchmark, as an SVG that reads on light and dark pages.

python benchmarks/plot.py 0.5 10 docs/images/vgg16-cifar10.svg     # width, epochs, file
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import rows
from figures import COLOURS, Axis, Series, chart

CONTESTANTS = {  # label, colour
    "dense": ("dense, tuned", COLOURS[5]),
    "ticket": ("early ticket", COLOURS[0]),
    "ticket_layer": ("early ticket, by layer", COLOURS[1]),
}


def draw(width: float, epochs: int) -> str:
    """Return the SVG of all complete runs of one width and number of epochs."""
    found = [
        row for row in rows("vgg16_cifar10")
        if (row["width"], row["epochs"]) == (width, epochs) and row["contestant"] in CONTESTANTS
    ]  # fmt: skip
    if not found:
        sys.exit(f"no rows of width {width:g} and {epochs} epochs")
    series, labelled = [], set()
    for row in found:
        label, colour = CONTESTANTS[row["contestant"]]
        points = [(seconds, 100 * accuracy) for seconds, accuracy in row["curve"]]
        series.append(Series(points=points, colour=colour, label="" if label in labelled else label))
        labelled.add(label)
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    head = found[-1]
    return chart(
        series,
        Axis.around(xs, "seconds, measured; search, tuning and evaluation included", zero=True),
        Axis.around(ys, "test accuracy, %"),
        title=f"VGG-16-BN (width {width:g}) on CIFAR-10, {epochs} epochs: test accuracy against measured seconds",
        note=f"{head['device']}, torch {head['torch']}, {head['date']}",
    )


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    Path(sys.argv[3]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[3]).write_text(draw(float(sys.argv[1]), int(sys.argv[2])), encoding="utf-8")


if __name__ == "__main__":
    main()
