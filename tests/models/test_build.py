"""`build`: seeds, factories from outside, and what is said when they do not fit."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from earlybird.errors import InputError
from earlybird.models import build


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module of factories into the current directory and return its unique name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> str:
        name = f"nets_{abs(hash(source)):x}"
        Path(f"{name}.py").write_text("from torch import nn\nimport torch\n" + textwrap.dedent(source))
        return name

    return write


LINEAR = """
    def make(classes, in_channels, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size ** 2, classes))
"""


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (build("small_cnn", classes=10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet20'"):
        build("resnet-20", classes=10)


def test_factory_from_the_current_directory_gets_what_its_signature_takes(nets) -> None:
    model = build(f"{nets(LINEAR)}:make", classes=4, in_channels=2, image_size=8)
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 4)


def test_factory_may_call_the_classes_num_classes(nets) -> None:
    name = nets(
        """
        def make(num_classes, **more):
            assert set(more) == {"in_channels", "image_size", "width"}, more
            return nn.Sequential(nn.Flatten(), nn.Linear(more["in_channels"] * 64, num_classes))
        """
    )
    assert build(f"{name}:make", classes=4, in_channels=2, image_size=8, width=0.5)[1].out_features == 4


def test_factory_with_keywords_only_gets_no_alias(nets) -> None:
    name = nets(
        """
        def make(**more):
            assert set(more) == {"classes", "in_channels", "image_size", "width"}, more
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, more["classes"]))
        """
    )
    assert build(f"{name}:make", classes=4, image_size=8)[1].out_features == 4


def test_factory_can_be_a_class_or_an_attribute_of_one(nets) -> None:
    name = nets(
        """
        class Net(nn.Sequential):
            def __init__(self, classes):
                super().__init__(nn.Flatten(), nn.Linear(192, classes))

            @staticmethod
            def small(classes):
                return Net(classes)
        """
    )
    assert type(build(f"{name}:Net", classes=4, image_size=8)).__name__ == "Net"
    assert type(build(f"{name}:Net.small", classes=4, image_size=8)).__name__ == "Net"


def test_output_check_leaves_mode_buffers_and_generator_as_they_were(nets) -> None:
    name = nets(
        """
        def make(classes):
            return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(192, classes))
        """
    )
    state = torch.get_rng_state()
    model = build(f"{name}:make", classes=4, image_size=8)
    assert all(module.training for module in model.modules())
    assert model[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("x = 1", "make", "has no 'make'"),
        (LINEAR, "mkae", "did you mean 'make'"),
        ("make = 1", "make", "needed|function or class"),
        ("def make(): return 3", "make", "returned int"),
        ("def make(): raise RuntimeError('no luck')", "make", "failed: RuntimeError: no luck"),
        ("def make(depth): return nn.Identity()", "make", "missing 1 required"),
        ("def make(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))", "make", r"gives \(5,\) .* 4 classes"),
        ("def make(): return nn.Conv2d(3, 4, 1)", "make", r"gives \(4, 8, 8\)"),
        ("def make(): return nn.Conv2d(1, 4, 1)", "make", r"cannot run on an image of shape \(3, 8, 8\)"),
        ("import not_there_at_all", "make", "cannot import .*not_there_at_all"),
        ("raise ValueError('broken')", "make", "cannot import .*ValueError: broken"),
    ],
)
def test_misfits_are_named_on_one_line(nets, source: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(f"{nets(source)}:{name}", classes=4, image_size=8)
    assert "Traceback" not in str(caught.value)


def test_width_for_a_factory_that_takes_none_is_refused(nets) -> None:
    with pytest.raises(InputError, match="takes no width"):
        build(f"{nets(LINEAR)}:make", classes=4, width=0.5)


@pytest.mark.parametrize("spec", [":make", "nets:", "no_such_module_xyz:make"])
def test_incomplete_or_missing_paths(spec: str) -> None:
    with pytest.raises(InputError):
        build(spec, classes=4)
