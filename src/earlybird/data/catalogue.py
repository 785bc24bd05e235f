"""What data sets there are, where their files are looked for, and what those files must contain.

Nothing here needs torch or numpy, so that `earlybird data` answers at once.

A data set is looked for in a given folder or in ``$EARLYBIRD_DATA``, then in the user's cache
(``$XDG_CACHE_HOME/earlybird``, by default ``~/.cache/earlybird``). Several layouts are known for each, so that folders
made by other tools are found too. Whatever the layout, the decoded content is compared with one SHA-256 a file.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedFile:
    """A file as its publisher serves it.

    Attributes:
        name: File name, also the last part of its address.
        bytes: Size.
        sha256: SHA-256 of the file as served (compressed).
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DataInfo:
    """One data set of the catalogue.

    Attributes:
        name: What to type after ``--data``.
        description: One line.
        citation: Whom to cite.
        link: Home page.
        licence: As its source states it.
        train_images: Number of training images.
        test_images: Number of test images.
        shape: Of one image, (channels, height, width).
        class_names: In the order of the labels.
        mean: Of the training pixels a channel, 0-1 scale; empty where it is measured at loading.
        std: Standard deviation, likewise.
        files: What a download brings; empty when the data set comes with an installed package.
        mirrors: Addresses of the folders that serve ``files``, tried in order.
    """

    name: str
    description: str
    citation: str
    link: str
    licence: str
    train_images: int
    test_images: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    files: tuple[PublishedFile, ...] = ()
    mirrors: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Number of images, training and test together."""
        return self.train_images + self.test_images

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def bytes(self) -> int:
        """Size of the download; 0 when there is none."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set may lie in a data folder.

    Attributes:
        kind: How to read them: ``'idx'``, ``'mosaic'``, ``'binary'``, ``'archive'`` or ``'csv'``.
        folder: Subfolder, relative to the data folder.
        files: Names of the files, all of them needed.
    """

    kind: str
    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Where a data set lies: ``paths`` belong to ``layout.files``, in order."""

    layout: Layout
    folder: Path
    paths: tuple[Path, ...]


CATALOGUE: dict[str, DataInfo] = {
    info.name: info
    for info in (
        DataInfo(
            name="digits",
            description="handwritten digits, 8x8 grey, comes with scikit-learn (no download)",
            citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998",
            link="https://doi.org/10.24432/C50P49",
            licence="CC BY 4.0",
            train_images=1442,
            test_images=355,
            shape=(1, 8, 8),
            class_names=tuple("0123456789"),
        ),
        DataInfo(
            name="mnist",
            description="handwritten digits, 28x28 grey",
            citation="Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document "
            "recognition, Proc. IEEE 86(11), 1998",
            link="http://yann.lecun.com/exdb/mnist/",
            licence="none stated",
            train_images=60_000,
            test_images=10_000,
            shape=(1, 28, 28),
            class_names=tuple("0123456789"),
            mean=(0.1307,),
            std=(0.3081,),
            files=(
                PublishedFile(
                    "train-images-idx3-ubyte.gz",
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                PublishedFile(
                    "train-labels-idx1-ubyte.gz",
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                PublishedFile(
                    "t10k-images-idx3-ubyte.gz",
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                PublishedFile(
                    "t10k-labels-idx1-ubyte.gz",
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            ),
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
        ),
        DataInfo(
            name="fashion-mnist",
            description="articles of clothing, 28x28 grey",
            citation="H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine "
            "learning algorithms, arXiv 1708.07747, 2017",
            link="https://github.com/zalandoresearch/fashion-mnist",
            licence="MIT",
            train_images=60_000,
            test_images=10_000,
            shape=(1, 28, 28),
            class_names=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            mean=(0.2860,),
            std=(0.3530,),
            files=(
                PublishedFile(
                    "train-images-idx3-ubyte.gz",
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                PublishedFile(
                    "train-labels-idx1-ubyte.gz",
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                PublishedFile(
                    "t10k-images-idx3-ubyte.gz",
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                PublishedFile(
                    "t10k-labels-idx1-ubyte.gz",
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            ),
            mirrors=(
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
            ),
        ),
        DataInfo(
            name="cifar10",
            description="small photographs, 32x32 colour",
            citation="A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, "
            "University of Toronto, 2009",
            link="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence="none stated",
            train_images=50_000,
            test_images=10_000,
            shape=(3, 32, 32),
            class_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            files=(
                PublishedFile(
                    "cifar-10-binary.tar.gz",
                    170_052_171,
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                ),
            ),
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
        ),
    )
}

# SHA-256 of the decoded files: uncompressed IDX, and the label-and-pixel records of CIFAR-10's binary version. One sum
# a file serves every layout, so a corrupt file is noticed whether it was packed as gzip, tar or WebP.
CONTENT_SHA256: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "cifar10": {
        "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
}

_CIFAR_BATCHES = tuple(CONTENT_SHA256["cifar10"])
_CIFAR_BINARY = tuple(f"{batch}.bin" for batch in _CIFAR_BATCHES)


def _idx_layouts(name: str, folders: tuple[str, ...]) -> tuple[Layout, ...]:
    return tuple(
        Layout("idx", folder, tuple(f"{file}{suffix}" for file in CONTENT_SHA256[name]))
        for folder in folders
        for suffix in (".gz", "")
    )


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "digits": (Layout("csv", "", ("digits.csv.gz",)),),
    "mnist": _idx_layouts("mnist", ("mnist", "MNIST/raw")),
    "fashion-mnist": _idx_layouts("fashion-mnist", ("fashion-mnist", "FashionMNIST/raw")),
    "cifar10": (
        Layout(
            "mosaic",
            "cifar10",
            (*(f"{batch}.webp" for batch in _CIFAR_BATCHES), "train_labels.u8", "test_labels.u8"),
        ),
        Layout("binary", "cifar10", _CIFAR_BINARY),
        Layout("binary", "cifar10/cifar-10-batches-bin", _CIFAR_BINARY),
        Layout("binary", "cifar-10-batches-bin", _CIFAR_BINARY),
        Layout("archive", "cifar10", ("cifar-10-binary.tar.gz",)),
        Layout("archive", "", ("cifar-10-binary.tar.gz",)),
    ),
}


def cache_folder() -> Path:
    """Return the folder for downloads: ``$XDG_CACHE_HOME/earlybird``, by default ``~/.cache/earlybird``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "earlybird"


def data_folder(root: Path | None = None) -> Path | None:
    """Return the folder the user keeps data in: ``root`` if given, else ``$EARLYBIRD_DATA``, else None."""
    if root is not None:
        return Path(root)
    named = os.environ.get("EARLYBIRD_DATA", "")
    return Path(named) if named else None


def search_folders(name: str, root: Path | None = None) -> tuple[Path, ...]:
    """Return the folders in which data set ``name`` is looked for, in order."""
    if name == "digits":
        # the file is read where it lies: importing scikit-learn takes longer than the training step
        package = importlib.util.find_spec("sklearn")
        return (Path(package.origin).parent / "datasets" / "data",) if package and package.origin else ()
    own = data_folder(root)
    return (own, cache_folder()) if own is not None else (cache_folder(),)


def find(name: str, root: Path | None = None) -> Found | None:
    """Return the first complete layout of data set ``name``, or None."""
    for base in search_folders(name, root):
        for layout in LAYOUTS[name]:
            folder = base / layout.folder
            paths = tuple(folder / file for file in layout.files)
            if all(path.is_file() for path in paths):
                return Found(layout, folder, paths)
    return None


def locate(name: str, root: Path | None = None) -> Path | None:
    """Return the folder in which data set ``name`` of the catalogue lies complete, or None.

    Args:
        name: A key of `CATALOGUE`.
        root: Data folder to look in first; by default ``$EARLYBIRD_DATA``.
    """
    found = find(name, root)
    return found.folder if found else None


def missing(name: str, folder: Path) -> tuple[Path, ...]:
    """Return the files that a partial copy of data set ``name`` lacks in ``folder``; empty when there is no part of it.

    Of the known layouts, the one of which most is there counts.
    """
    best: tuple[int, tuple[Path, ...]] = (0, ())
    for layout in LAYOUTS[name]:
        paths = [folder / layout.folder / file for file in layout.files]
        absent = tuple(path for path in paths if not path.is_file())
        present = len(paths) - len(absent)
        if present > best[0]:
            best = (present, absent)
    return best[1]
