import os
import subprocess
import sys
from pathlib import Path

import pytest

from earlybird.data import CATALOGUE, locate
from earlybird.data.catalogue import CONTENT_SHA256, LAYOUTS, cache_folder, find, missing


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("EARLYBIRD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path


def fill(base: Path, layout) -> Path:
    folder = base / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in layout.files:
        (folder / name).touch()
    return folder


def test_entries_are_complete():
    for name, info in CATALOGUE.items():
        assert info.name == name
        assert info.classes == len(info.class_names) == len(set(info.class_names))
        assert info.images == info.train_images + info.test_images
        assert len(info.mean) == len(info.std)
        assert len(info.mean) in (0, info.shape[0])
        assert bool(info.files) == bool(info.mirrors)
        assert all(url.startswith("https://") and url.endswith("/") for url in info.mirrors)
        assert name in LAYOUTS
        sums = [file.sha256 for file in info.files] + list(CONTENT_SHA256.get(name, {}).values())
        assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in sums)


@pytest.mark.parametrize(("name", "number"), [(n, i) for n in LAYOUTS if n != "digits" for i in range(len(LAYOUTS[n]))])
def test_every_layout_is_found(empty, name, number):
    assert locate(name) is None
    layout = LAYOUTS[name][number]
    folder = fill(empty / "data", layout)
    assert locate(name) == folder
    assert find(name).layout == layout


def test_the_data_folder_comes_before_the_cache_and_an_argument_before_both(empty):
    layout = LAYOUTS["mnist"][0]
    assert cache_folder() == empty / "cache/earlybird"
    cached = fill(cache_folder(), layout)
    assert locate("mnist") == cached
    named = fill(empty / "data", layout)
    assert locate("mnist") == named
    given = fill(empty / "other", layout)
    assert locate("mnist", empty / "other") == given


def test_without_variables_the_cache_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/earlybird"


def test_missing_names_what_a_partial_copy_lacks(empty):
    assert missing("cifar10", empty) == ()
    folder = fill(empty, LAYOUTS["cifar10"][0])
    (folder / "data_batch_2.webp").unlink()
    (folder / "test_labels.u8").unlink()
    assert [path.name for path in missing("cifar10", empty)] == ["data_batch_2.webp", "test_labels.u8"]


def test_digits_come_with_scikit_learn():
    assert (locate("digits") / "digits.csv.gz").is_file()


def test_the_catalogue_needs_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from earlybird.data import CATALOGUE, locate; [locate(name) for name in CATALOGUE];"
        "print([name for name in ('torch', 'numpy', 'sklearn', 'PIL') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert ran.stdout.strip() == "[]"
