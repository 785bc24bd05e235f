"""How a kernel moves over an image."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Window"]


class Window(NamedTuple):
    """How a kernel moves over an image; each a height and a width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def map_of(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output for those of ``image``."""
        height, width = (
            (side + 2 * padding - gap * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, gap in zip(image, *self)
        )
        return height, width

    def turned(self) -> Window | None:
        """Return the window that takes the output's gradient to the input's; None where there is none."""
        padding = tuple(
            gap * (kernel - 1) - padding for kernel, padding, gap in zip(self.kernel, self.padding, self.dilation)
        )
        if self.stride != (1, 1) or min(padding) < 0:
            return None
        return self._replace(padding=(padding[0], padding[1]))
