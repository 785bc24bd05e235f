import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from earlybird import export
from earlybird.data import load
from earlybird.errors import EarlybirdError, InputError
from earlybird.files import write_tensors
from earlybird.train.recipe import Recipe
from earlybird.train.run import train

MODEL = """
from torch import nn

def build(classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run whose ticket was drawn."""
    values = {"data": "digits", "width": 0.25, "epochs": 2, "exact": True, "deadline": "10it", "look_every": "2it"}
    out = tmp_path_factory.mktemp("runs") / "ticket"
    assert train(Recipe.from_values(values), out, quiet=True).drawn_at is not None
    return out


@pytest.fixture
def onnx():
    """Skip where the extra is not installed."""
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_small_network_is_rebuilt_from_its_definition(trained):
    from safetensors.torch import load_file

    model = export.load(trained)
    weights = load_file(trained / "model.safetensors")
    assert not model.training
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in weights.items()
    }
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == json.loads((trained / "result.json").read_text())["parameters"]


def test_one_file_rebuilds_it_in_a_fresh_process_without_data(trained, tmp_path):
    file = export.export_weights(trained, tmp_path / "model.safetensors")
    code = (
        "import torch; from earlybird.export import load\n"
        f"model = load({str(file)!r})\n"
        "images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad(): print(model(images).double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = export.load(trained)(IMAGES).double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-4)


def test_a_dense_run_is_exported_too(tmp_path):
    values = {"data": "digits", "width": 0.25, "epochs": 1, "exact": True, "dense": True}
    train(Recipe.from_values(values), tmp_path / "dense", quiet=True)
    file = export.export_weights(tmp_path / "dense", tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(export.load(file)(IMAGES), export.load(tmp_path / "dense")(IMAGES))


def test_a_run_on_a_file_is_exported_when_the_file_is_gone(tmp_path):
    data = tmp_path / "own.npz"
    images = np.random.default_rng(0).integers(0, 256, (90, 12, 12, 3), dtype=np.uint8)
    np.savez(data, images=images, labels=np.arange(90) % 3)
    values = {"data": str(data), "model": "small_cnn", "width": 0.25, "epochs": 1, "batch_size": 16, "exact": True}
    train(Recipe.from_values({**values, "dense": True}), tmp_path / "run", quiet=True)
    data.unlink()
    assert export.load(tmp_path / "run")(torch.zeros(2, 3, 12, 12)).shape == (2, 3)
    file = export.export_weights(tmp_path / "run", tmp_path / "model.safetensors")
    assert export.load(file)(torch.zeros(2, 3, 12, 12)).shape == (2, 3)


def test_a_model_from_outside_is_exported(tmp_path, monkeypatch, onnx):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets_for_export.py").write_text(MODEL)
    values = {"model": "own_nets_for_export:build", "data": "digits", "epochs": 1, "exact": True}
    train(Recipe.from_values(values), tmp_path / "run", quiet=True)
    path, difference = export.export_onnx(tmp_path / "run", tmp_path / "model.onnx")
    assert path.exists()
    assert difference <= export.TOLERANCE


def test_onnx_computes_the_same_for_any_batch(trained, tmp_path, onnx):
    path, difference = export.export_onnx(trained, tmp_path / "model.onnx")
    assert difference <= export.TOLERANCE
    session = onnx.InferenceSession(path)
    (given,) = session.get_inputs()
    assert (given.name, given.shape[1:]) == ("images", [1, 8, 8])
    for batch in (1, 2, 7):
        (found,) = session.run(["logits"], {"images": IMAGES[:batch].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(found), export.load(trained)(IMAGES[:batch]), rtol=1e-3, atol=1e-4
            )


def test_onnx_says_how_images_are_read(trained, tmp_path, onnx):
    path, _ = export.export_onnx(trained, tmp_path / "model.onnx")
    data = load("digits")
    found = onnx.InferenceSession(path.read_bytes()).get_modelmeta().custom_metadata_map
    assert tuple(json.loads(found["mean"])) == data.mean
    assert tuple(json.loads(found["std"])) == data.std
    assert tuple(json.loads(found["class_names"])) == tuple(data.classes)


def test_a_wrong_onnx_is_not_put_in_place(trained, tmp_path, monkeypatch, onnx):
    def broken(model, blueprint, path):
        with torch.no_grad():
            next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).weight.mul_(1.01)
        original(model, blueprint, path)
        with torch.no_grad():
            next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).weight.div_(1.01)

    original = export._to_onnx
    monkeypatch.setattr(export, "_to_onnx", broken)
    (tmp_path / "model.onnx").write_bytes(b"older")
    with pytest.raises(EarlybirdError, match="differs from PyTorch"):
        export.export_onnx(trained, tmp_path / "model.onnx", force=True)
    assert (tmp_path / "model.onnx").read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_missing_extra_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match=r"onnxruntime.*pip install onnx"):
        export.export_onnx(trained, tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["recipe.toml", "model.safetensors"])
def test_an_unfinished_run_is_refused(trained, tmp_path, missing):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in {"recipe.toml", "model.safetensors", "ticket.safetensors"} - {missing}:
        (folder / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(InputError, match=r"no recipe\.toml|not finished"):
        export.load(folder)


def test_weights_of_another_definition_are_refused(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.toml", "model.safetensors"):  # the ticket is missing: the dense model does not fit
        (folder / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(InputError, match="do not fit small_cnn"):
        export.load(folder)


def test_weights_that_do_not_say_what_they_belong_to_are_refused(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_bytes((trained / "recipe.toml").read_bytes())
    for metadata, found in (({}, "does not say"), ({"blueprint": "{"}, "not a blueprint")):
        write_tensors(folder / "model.safetensors", {"weight": torch.zeros(1)}, metadata)
        with pytest.raises(InputError, match=found):
            export.load(folder)


def test_another_safetensors_file_is_refused(trained):
    with pytest.raises(InputError, match="not an exported network"):
        export.load(trained / "model.safetensors")


def test_a_file_imports_no_code_that_was_not_confirmed(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets_in_a_file.py").write_text("open('called', 'w').close()\n" + MODEL)
    values = {"model": "own_nets_in_a_file:build", "data": "digits", "epochs": 1, "exact": True, "dense": True}
    train(Recipe.from_values(values), tmp_path / "run", quiet=True)
    file = export.export_weights(tmp_path / "run", tmp_path / "model.safetensors")
    (tmp_path / "called").unlink()
    monkeypatch.delitem(sys.modules, "own_nets_in_a_file")
    for wrong in (None, "another:build"):
        with pytest.raises(InputError, match="own_nets_in_a_file:build"):
            export.load(file, model=wrong)
    with pytest.raises(InputError, match="--model own_nets_in_a_file:build"):
        export.export_weights(file, tmp_path / "again.safetensors")
    assert not (tmp_path / "called").exists()
    with torch.no_grad():
        found = export.load(file, model="own_nets_in_a_file:build")(IMAGES)
        assert torch.equal(found, export.load(tmp_path / "run")(IMAGES))  # a run folder is one's own
    zoo = export.export_weights(trained, tmp_path / "zoo.safetensors")
    export.load(zoo)
    with pytest.raises(InputError, match="built from small_cnn"):
        export.load(zoo, model="own_nets_in_a_file:build")


BLUEPRINT = {"model": "small_cnn", "classes": 10, "in_channels": 1, "image_size": 8, "width": 0.25}


@pytest.mark.parametrize(
    "change",
    [
        {"blueprint": None},
        {"blueprint": "{"},
        {"blueprint": "[]"},
        {"blueprint": json.dumps({"model": "small_cnn"})},
        {"blueprint": json.dumps({**BLUEPRINT, "model": 3})},
        {"blueprint": json.dumps({**BLUEPRINT, "classes": "10"})},
        {"blueprint": json.dumps({**BLUEPRINT, "image_size": -8})},
        {"blueprint": json.dumps({**BLUEPRINT, "width": None})},
        {"order": None},
        {"order": "[1]"},
        {"order": '["features.0"]'},
        {"provenance": None},
    ],
)
def test_a_damaged_export_is_named(change, tmp_path):
    metadata = {"format": export.FORMAT, "blueprint": json.dumps(BLUEPRINT), "order": '["one"]', "provenance": "{}"}
    metadata = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    tensors = {"ticket/one": torch.ones(4, dtype=torch.uint8)}
    file = write_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(InputError, match="damaged export"):
        export.load(file)


def test_an_export_replaces_only_an_export(trained, tmp_path):
    file = tmp_path / "model.safetensors"
    for path in (file, trained / "ticket.safetensors"):
        before = path.read_bytes() if path.exists() else b"something else"
        path.write_bytes(before)
        with pytest.raises(InputError, match=r"exists and is no export.*--force"):
            export.export_weights(trained, path)
        assert path.read_bytes() == before
    export.export_weights(trained, file, force=True)
    export.export_weights(trained, file)  # its own
    with pytest.raises(InputError, match="is a folder"):
        export.export_weights(trained, tmp_path, force=True)


def test_an_onnx_export_replaces_only_an_export(trained, tmp_path, onnx):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"exists and is no export.*--force"):
        export.export_onnx(trained, file)
    assert file.read_bytes() == b"something else"
    export.export_onnx(trained, file, force=True)
    export.export_onnx(trained, file)  # its own
