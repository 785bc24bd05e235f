"""Folders of small photographs with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_masks(folder: Path, *, count: int = 6, size: tuple[int, int] = (32, 32)) -> Path:
    """Write grey photographs, each with a dark vertical line, and masks of the lines."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = generator.integers(150, 255, (*size, 3), dtype=np.uint8)
        mask = np.zeros(size, np.uint8)
        at = int(generator.integers(1, size[1] - 3))
        mask[:, at : at + 2] = 255
        pixels[mask > 0] = 20
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder
