"""Draw accuracy against seconds, from the rows of a benchmark, as an SVG that reads on light and dark pages.

python benchmarks/plot.py 0.5 10 docs/images/vgg16-cifar10.svg     # width, epochs, file
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import rows

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 380, 56, 44, 40, 150
COLOURS = {"dense": "#8a8f98", "ticket": "#12977f", "ticket_layer": "#c77d1a"}
LABELS = {"dense": "dense, tuned", "ticket": "early ticket", "ticket_layer": "early ticket, by layer"}


def draw(width: float, epochs: int) -> str:
    """Return the SVG of all complete runs of one width and number of epochs."""
    found = [
        row for row in rows("vgg16_cifar10")
        if (row["width"], row["epochs"]) == (width, epochs) and row["contestant"] in COLOURS
    ]  # fmt: skip
    if not found:
        sys.exit(f"no rows of width {width:g} and {epochs} epochs")
    longest = max(row["curve"][-1][0] for row in found)
    highest = max(accuracy for row in found for _, accuracy in row["curve"])
    low, high = 0.5, min(1.0, highest + 0.03)

    def x(seconds: float) -> float:
        return LEFT + seconds / longest * (WIDTH - LEFT - RIGHT)

    def y(accuracy: float) -> float:
        return HEIGHT - BOTTOM - (max(accuracy, low) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    head = found[-1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="13"><style>text{fill:#24292f}.g{stroke:#8884}@media(prefers-color-scheme:dark)'
        "{text{fill:#e6edf3}}</style>",
        f'<text x="{LEFT}" y="20" font-weight="600">VGG-16-BN (width {width:g}) on CIFAR-10, {epochs} epochs: '
        "test accuracy against measured seconds</text>",
    ]
    for tick in range(50, int(high * 100) + 1, 10):
        at = f"{y(tick / 100):.1f}"
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick / 100) + 4:.1f}" text-anchor="end">{tick} %</text>')
    step = next(s for s in (20, 50, 100, 200, 500, 1000) if longest / s <= 8)
    for tick in range(0, int(longest) + 1, step):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick} s</text>')
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 8}" font-size="11">{head["device"]}, torch {head["torch"]}, {head["date"]}; '
        "search, tuning and evaluation included</text>"
    )
    ends: dict[str, tuple[float, float]] = {}
    for row in found:
        points = " ".join(f"{x(s):.1f},{y(a):.1f}" for s, a in row["curve"])
        colour = COLOURS[row["contestant"]]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends[row["contestant"]] = (x(row["curve"][-1][0]), y(row["curve"][-1][1]))
    for contestant, (right, top) in ends.items():
        parts.append(f'<circle cx="{right:.1f}" cy="{top:.1f}" r="4" fill="{COLOURS[contestant]}"/>')
        label_y = top - 8 if contestant != "dense" else top + 4
        anchor, dx = ("start", 8) if contestant == "dense" else ("middle", 0)
        parts.append(
            f'<text x="{right + dx:.1f}" y="{label_y:.1f}" text-anchor="{anchor}" style="fill:{COLOURS[contestant]}">'
            f"{LABELS[contestant]}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    Path(sys.argv[3]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[3]).write_text(draw(float(sys.argv[1]), int(sys.argv[2])), encoding="utf-8")


if __name__ == "__main__":
    main()
