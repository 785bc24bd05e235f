import gzip

import numpy as np
import pytest
import torch

from earlybird.data import CATALOGUE, load, locate
from earlybird.data.digits import read_digits
from earlybird.errors import DataError


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = read_digits(locate("digits") / "digits.csv.gz")
    bunch = load_digits()
    assert np.array_equal(images[:, 0], np.rint(bunch.images * 255 / 16))
    assert np.array_equal(labels, bunch.target)


def test_the_split_is_fixed_and_stratified():
    data = load("digits", seed=1)
    info = CATALOGUE["digits"]
    assert data.train_images.shape == (info.train_images, *info.shape)
    assert data.test_images.shape == (info.test_images, *info.shape)
    share = torch.bincount(data.test_labels) / (torch.bincount(data.test_labels) + torch.bincount(data.train_labels))
    assert bool(((share - 0.2).abs() < 0.005).all())
    again = load("digits", seed=2)
    assert torch.equal(data.test_images, again.test_images)
    assert int(data.train_images.max()) == 255
    assert data.mean[0] == pytest.approx(float(data.train_images.double().mean() / 255))


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        read_digits(path)
    path.write_bytes(b"1,2,3")
    with pytest.raises(DataError, match="cannot be read"):
        read_digits(path)
