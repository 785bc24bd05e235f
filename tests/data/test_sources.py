import gzip
import hashlib
import http.server
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from earlybird.data import CATALOGUE, load
from earlybird.data.catalogue import CONTENT_SHA256, PublishedFile, cache_folder
from earlybird.data.dataset import channel_statistics
from earlybird.errors import DataError, InputError

REAL = Path(os.environ.get("EARLYBIRD_DATA", "/nowhere"))
needs = {
    name: pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"no {name} under EARLYBIRD_DATA")
    for name in ("mnist", "fashion-mnist", "cifar10")
}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.delenv("EARLYBIRD_DATA", raising=False)
    monkeypatch.delenv("EARLYBIRD_MIRROR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


@pytest.fixture
def small_mnist(monkeypatch):
    """The files of an MNIST of a few images, to which the catalogue's sums are adapted."""
    generator = np.random.default_rng(0)
    raw = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        raw[f"{prefix}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        raw[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    packed = {f"{name}.gz": gzip.compress(content) for name, content in raw.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in raw.items()}
    files = tuple(
        PublishedFile(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in packed.items()
    )
    monkeypatch.setitem(CONTENT_SHA256, "mnist", sums)
    monkeypatch.setitem(CATALOGUE, "mnist", replace(CATALOGUE["mnist"], files=files))
    return packed


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def serve(monkeypatch):
    """A function that serves a folder as the mirror of all data sets."""
    running = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        monkeypatch.setenv("EARLYBIRD_MIRROR", f"http://127.0.0.1:{server.server_port}/")

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def test_downloads_into_the_cache_and_reads_it_from_there_afterwards(empty, small_mnist, serve, monkeypatch):
    write(empty / "served/mnist", small_mnist)
    serve(empty / "served")
    seen = []
    first = load("mnist", progress=lambda *what: seen.append(what))
    assert first.train_images.shape == (20, 1, 28, 28)
    assert first.test_labels.tolist() == list(range(10))
    assert {name for name, done, total in seen if done == total} == set(small_mnist)
    monkeypatch.setenv("EARLYBIRD_MIRROR", "http://127.0.0.1:9")
    assert torch.equal(load("mnist").train_images, first.train_images)


def test_the_data_folder_is_read_in_place(empty, small_mnist, monkeypatch):
    write(empty / "data/mnist", small_mnist)
    monkeypatch.setenv("EARLYBIRD_DATA", str(empty / "data"))
    assert load("mnist", download=False).train_images.shape == (20, 1, 28, 28)
    assert load("mnist", root=empty / "data", image_size=32).test_images.shape == (10, 1, 32, 32)
    assert not cache_folder().exists()


def test_missing_files_are_named_and_not_silently_downloaded(empty, small_mnist):
    write(empty / "data/mnist", {name: raw for name, raw in small_mnist.items() if "labels" not in name})
    with pytest.raises(DataError, match=r"mnist/train-labels-idx1-ubyte.gz, mnist/t10k-labels-idx1-ubyte.gz missing"):
        load("mnist", root=empty / "data")


def test_a_corrupt_file_is_named(empty, small_mnist):
    name = "t10k-images-idx3-ubyte.gz"
    damaged = bytearray(gzip.decompress(small_mnist[name]))
    damaged[99] ^= 1
    write(empty / "data/mnist", small_mnist | {name: gzip.compress(damaged)})
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz differs from the published"):
        load("mnist", root=empty / "data")


def test_without_download_it_says_where_to_put_the_files(empty):
    with pytest.raises(DataError, match=r"cache/earlybird/cifar10; cifar-10-binary.tar.gz.*170 MB"):
        load("cifar10", download=False)


def test_without_network_it_says_where_to_put_the_file(empty, monkeypatch):
    monkeypatch.setenv("EARLYBIRD_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setattr("earlybird.data.download.time.sleep", lambda _: None)
    with pytest.raises(
        DataError, match=r"refused.*170,052,171 bytes.*put the file at .*cifar10/cifar-10-binary.tar.gz"
    ):
        load("cifar10")


def test_a_data_folder_that_does_not_exist_is_said(empty):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load("mnist", root=empty / "nowhere")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("CIFAR-10", "did you mean 'cifar10'"),
        ("./no/such/folder", "check the path"),
        ("missing.npz", "no file"),
        (__file__, "neither a folder of images nor"),
    ],
)
def test_unknown_data_are_said(empty, spec, message):
    with pytest.raises((InputError, DataError), match=message):
        load(spec)


def test_image_size_is_checked():
    with pytest.raises(InputError, match="image size 0"):
        load("digits", image_size=0)


@needs["mnist"]
def test_the_real_mnist():
    data = load("mnist", download=False)
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert float(data.train_images.double().mean() / 255) == pytest.approx(data.mean[0], abs=1e-4)


@needs["cifar10"]
def test_the_real_cifar10():
    data = load("cifar10", download=False)
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert data.train_labels[:10000].bincount().tolist() == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    mean, std = channel_statistics(data.train_images)
    assert mean == pytest.approx(data.mean, abs=1e-4)
    assert std == pytest.approx(data.std, abs=1e-4)


@needs["fashion-mnist"]
def test_the_published_fashion_mnist_passes_the_download(empty, serve):
    serve(REAL)
    data = load("fashion-mnist")
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
