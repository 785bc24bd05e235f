"""Teachers for tests: untrained ones do, where only what happens with their logits is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from earlybird.files import write_tensors, write_text
from earlybird.models.blueprint import Blueprint


def write_teacher(folder: Path, seed: int = 7, **changes: Any) -> tuple[Path, nn.Module]:
    """Write what a finished dense run leaves of its network, and return the folder and the network."""
    usual = {"model": "small_cnn", "classes": 5, "in_channels": 3, "image_size": 8, "width": 0.25}
    blueprint = Blueprint(**{**usual, **changes})
    network = blueprint.build(seed).eval()
    nn.init.normal_(list(network.modules())[-1].weight)
    write_text(folder / "recipe.toml", "dense = true\n")
    write_tensors(folder / "model.safetensors", network.state_dict(), {"blueprint": blueprint.to_json()})
    return folder, network
