import numpy as np
import pytest
import torch
from PIL import Image

from earlybird.data import load
from earlybird.data.images import decode, default_size, list_folder
from earlybird.errors import DataError

COLOURS = {"blue": (0, 0, 200), "green": (0, 180, 0), "red": (220, 0, 0)}


def make(root, count=5, size=(12, 10), suffix="png"):
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, colour).save(root / name / f"{i}.{suffix}")
    return root


def test_a_folder_becomes_a_data_set(tmp_path):
    data = load(str(make(tmp_path / "x")))
    assert data.classes == ("blue", "green", "red")
    assert data.train_images.shape == (12, 3, 10, 10)
    assert data.test_images.shape == (3, 3, 10, 10)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        for image, label in zip(images, labels):
            assert image[:, 4, 4].tolist() == list(COLOURS[data.classes[label]])


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_train_and_test_folders_are_respected(tmp_path, name):
    make(tmp_path / "train", count=2)
    make(tmp_path / name, count=1, size=(30, 30))
    data = load(str(tmp_path))
    assert data.train_images.shape == (6, 3, 10, 10)
    assert data.test_images.shape == (3, 3, 10, 10)
    assert data.test_labels.tolist() == [0, 1, 2]


def test_a_train_folder_alone_is_split(tmp_path):
    make(tmp_path / "train")
    data = load(str(tmp_path), seed=1)
    assert (len(data.train_images), len(data.test_images)) == (12, 3)


def test_all_broken_images_are_named(tmp_path):
    make(tmp_path / "x")
    (tmp_path / "x/red/1.png").write_bytes(b"no image")
    whole = (tmp_path / "x/green/3.png").read_bytes()
    (tmp_path / "x/green/3.png").write_bytes(whole[:45])
    (tmp_path / "x/blue/0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="3 image") as caught:
        load(str(tmp_path / "x"))
    for name in ("red/1.png (not an image)", "green/3.png", "blue/0.jpg"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_files_cut_short_do_not_pass_as_images(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    decode(tmp_path, (path,), 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=path.name):
        decode(tmp_path, (path,), 40)


def test_all_empty_class_folders_are_named(tmp_path):
    make(tmp_path)
    (tmp_path / "violet").mkdir()
    (tmp_path / "white").mkdir()
    (tmp_path / "white/notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"folder\(s\) violet, white"):
        list_folder(tmp_path)


def test_folders_without_classes(tmp_path):
    with pytest.raises(DataError, match=r"0 class folder"):
        list_folder(tmp_path)
    make(tmp_path / "only")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(DataError, match=r"1 class folder"):
        list_folder(tmp_path)


def test_a_class_of_the_test_part_that_was_never_trained(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "test")
    (tmp_path / "test/violet").mkdir()
    with pytest.raises(DataError, match=r"classes violet; the classes of .*blue, green, red"):
        list_folder(tmp_path)


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    make(tmp_path, count=1)
    with pytest.raises(DataError, match=r"blue \(1\), green \(1\), red \(1\)"):
        load(str(tmp_path))


def test_other_files_and_subfolders(tmp_path):
    make(tmp_path)
    (tmp_path / "red/.thumb.png").write_bytes(b"x")
    (tmp_path / "red/Thumbs.db").write_bytes(b"x")
    (tmp_path / "red/more").mkdir()
    Image.new("RGB", (12, 10), COLOURS["red"]).save(tmp_path / "red/more/9.PNG")
    classes, train, test = list_folder(tmp_path)
    assert np.bincount(train.labels).tolist() == [5, 5, 6]
    assert test is None
    assert classes == ("blue", "green", "red")


def test_the_middle_of_the_shorter_side_is_kept(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert bool((decode(tmp_path, (tmp_path / "x.png",), 20) == 255).all())


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    kinds = {
        "grey.png": Image.fromarray(ramp),
        "grey16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "alpha.png": Image.fromarray(ramp).convert("RGBA"),
        "palette.png": Image.fromarray(ramp).convert("P"),
        "cmyk.tiff": Image.fromarray(ramp).convert("CMYK"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        decoded = decode(tmp_path, (tmp_path / name,), 32)[0]
        assert np.abs(decoded.astype(int) - ramp).max() <= 1, name


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # white on top as stored
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    decoded = decode(tmp_path, (tmp_path / "x.png",), 16)[0]
    assert int(decoded[:, :8].max()) == 0
    assert int(decoded[:, 8:].min()) == 255


def test_the_default_size_is_the_median_of_the_shorter_sides_up_to_224(tmp_path):
    for i, size in enumerate([(30, 40), (50, 36), (300, 500)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    paths = tuple(sorted(tmp_path.glob("*.png")))
    assert default_size(paths) == 36
    assert default_size(paths[2:3]) == 224
    assert default_size((tmp_path / "broken.png",)) == 224


def test_large_photographs_are_scaled_down(tmp_path):
    Image.new("RGB", (1600, 1200), (10, 200, 30)).save(tmp_path / "x.jpg", quality=95)
    decoded = decode(tmp_path, (tmp_path / "x.jpg",), 64)[0]
    assert np.abs(decoded.astype(int) - np.array([10, 200, 30])[:, None, None]).max() <= 3


def test_more_than_fits_into_memory_is_said_before_decoding(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr("earlybird.data.images._memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="--image-size"):
        load(str(tmp_path), image_size=200)


def test_progress_and_image_size(tmp_path):
    make(tmp_path)
    seen = []
    data = load(str(tmp_path), image_size=8, progress=lambda what, done, total: seen.append((done, total)))
    assert data.train_images.shape[2:] == (8, 8)
    assert seen == [(i, 15) for i in range(1, 16)]
    assert data.train_images.dtype == torch.uint8


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    assert load(str(tmp_path)).classes == ("bus", "train")
