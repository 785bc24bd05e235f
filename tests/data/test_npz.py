import pickle

import numpy as np
import pytest
import torch

from earlybird.data import load
from earlybird.data.npz import read_npz
from earlybird.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) % 2


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("names", [("train_images", "train_labels", "test_images", "test_labels"),
                                   ("x_train", "y_train", "x_test", "y_test")])  # fmt: skip
def test_both_spellings_and_the_given_test_part(tmp_path, names):
    path = save(tmp_path / "a.npz", **dict(zip(names, (RGB[:16], LABELS[:16], RGB[16:], LABELS[16:, None]))))
    data = load(str(path))
    assert torch.equal(data.train_images, torch.from_numpy(RGB[:16]).permute(0, 3, 1, 2))
    assert data.train_images.is_contiguous()
    assert torch.equal(data.test_images, torch.from_numpy(RGB[16:]).permute(0, 3, 1, 2))
    assert data.test_labels.tolist() == LABELS[16:].tolist()
    assert data.classes == ("0", "1")


def test_without_a_test_part_it_is_split_by_seed(tmp_path):
    path = str(save(tmp_path / "a.npz", images=RGB, labels=LABELS, classes=np.array(["cat", "dog"])))
    data = load(path, seed=3)
    assert (len(data.train_images), len(data.test_images)) == (16, 4)
    assert data.test_labels.bincount().tolist() == [2, 2]
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.test_images, load(path, seed=3).test_images)
    assert not torch.equal(data.test_images, load(path, seed=4).test_images)


@pytest.mark.parametrize(
    ("images", "shape"),
    [(RGB[..., 0], (20, 1, 5, 6)), (RGB[..., :1], (20, 1, 5, 6)), (RGB.transpose(0, 3, 1, 2), (20, 3, 5, 6))],
)
def test_all_orders_of_axes(tmp_path, images, shape):
    read = read_npz(save(tmp_path / "a.npz", x=images, y=LABELS)).images
    assert read.shape == shape
    assert np.array_equal(read[:, 0], RGB[..., 0])


def test_image_size(tmp_path):
    path = save(tmp_path / "a.npz", x=RGB, y=LABELS)
    assert load(str(path), image_size=9).test_images.shape == (4, 3, 9, 9)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickled_objects_are_refused_and_never_loaded(tmp_path):
    path = tmp_path / "a.npz"
    objects = np.empty(2, dtype=object)
    objects[:] = [Bomb(), Bomb()]
    np.savez(path, x=objects, y=LABELS)
    with pytest.raises(DataError, match="x holds pickled Python objects, which are never loaded"):
        read_npz(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"damaged or is not a \.npz"):
        read_npz(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": RGB}, "holds x; train_images"),
        ({"x": RGB / 255, "y": LABELS}, r"x is float64; uint8.*astype\('uint8'\)"),
        ({"x": RGB.astype(np.int64), "y": LABELS}, "x is int64; uint8"),
        ({"x": RGB[..., :2], "y": LABELS}, r"shape \(20, 5, 6, 2\)"),
        ({"x": RGB[0, 0], "y": LABELS}, r"shape \(6, 3\)"),
        ({"x": RGB, "y": LABELS[:-1]}, "20 images, but 19 labels"),
        ({"x": RGB[:0], "y": LABELS[:0]}, "0 images"),
        ({"x": RGB, "y": LABELS.astype(float)}, "y is float64"),
        ({"x": RGB, "y": np.eye(20)[LABELS].astype(int)}, r"shape \(20, 20\)"),
        ({"x": RGB, "y": LABELS - 1}, "holds -1"),
        ({"x": RGB, "y": LABELS + 1}, "up to 2, but no training image has label 0"),
        ({"x": RGB, "y": LABELS, "classes": np.arange(2)}, "classes is int64"),
        ({"x": RGB, "y": LABELS, "classes": np.array(["only"])}, "fewer than|label 1"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        load(str(save(tmp_path / "a.npz", **arrays)))


def test_short_and_missing_files(tmp_path):
    path = save(tmp_path / "a.npz", x=RGB, y=LABELS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        read_npz(path)
    with pytest.raises(DataError, match="no file"):
        read_npz(tmp_path / "b.npz")
    np.save(tmp_path / "one.npy", RGB)
    with pytest.raises(DataError, match="one array"):
        read_npz(tmp_path / "one.npy")
