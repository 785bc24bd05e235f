"""What methods tell the report."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from earlybird.traces import SHOWN, Trace, png, rank_inputs


def test_a_trace_survives_json() -> None:
    trace = Trace(title="bits", unit="bits", series={"conv": [(0, 3.0), (10, 8.0)]}, note="Two rungs.", steps_hold=True)
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_pixel_by_pixel(channels: int) -> None:
    image = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3)
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(png(image)))))
    assert np.array_equal(read.reshape(2, 3, channels), image.permute(1, 2, 0).numpy())


def test_the_least_and_the_most_are_ranked_and_never_the_same() -> None:
    amounts = torch.tensor([5.0, 1.0, 3.0, 1.0, 9.0])
    ranked = rank_inputs(amounts, torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5), list("abcde"))
    assert [one["label"] for one in ranked["least"]] == ["b", "d"]
    assert [one["label"] for one in ranked["most"]] == ["e", "a"]
    assert ranked["mean"] == 3.8
    many = rank_inputs(torch.arange(100), torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.zeros(100).long(), ["a"])
    assert len(many["least"]) == len(many["most"]) == SHOWN
