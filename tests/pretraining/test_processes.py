"""Two real processes under torchrun, talking through gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from earlybird.train.recipe import Recipe
from tests.tickets.teachers import write_teacher
from tests.train.test_distributed import torchrun

RECIPE: dict[str, Any] = {
    "data": "digits", "model": "small_cnn", "width": 0.25, "epochs": 3, "batch_size": 64, "exact": True,
    "checkpoint_every": "10it", "crop": 1,
}  # fmt: skip

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")


def test_losses_gradients_and_queues_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    with torchrun(tmp_path, worker="tests.pretraining.worker") as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "simclr", "accumulate": 2, "batch_size": 32},
        {"method": "moco", "moco_queue": 128},
        {"method": "distillation", "teacher_views": 2},
    ],
    ids=lambda changes: changes["method"],
)
def test_two_processes_agree_and_resume_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    if changes["method"] == "distillation":
        changes = {**changes, "teacher": str(write_teacher(tmp_path / "teacher", classes=10, in_channels=1)[0])}
    (tmp_path / "recipe.toml").write_text(Recipe.from_values({**RECIPE, **changes}).to_toml())
    with torchrun(tmp_path) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    first, second = (load_file(tmp_path / f"whole-rank{rank}.safetensors") for rank in (0, 1))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(whole[name], resumed[name]), name
