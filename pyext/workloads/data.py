"""MNIST and Fashion-MNIST from their IDX files, read with NumPy, in torchvision's folder layout.

The files are `<root>/MNIST/raw/train-images-idx3-ubyte.gz` and so on, gzipped or not, and every
file is checked against its SHA-256 before it is read. What is absent is downloaded, unless the
caller says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import torch
from torch import Tensor

__all__ = [
    "DATASETS",
    "Data",
    "DataError",
    "Dataset",
    "File",
    "data_root",
    "load",
    "load_digits",
    "load_or_digits",
    "read_idx",
]

CONNECT_TIMEOUT_S = 5
"""A mirror that has not answered within this time is given up for the next."""
READ_TIMEOUT_S = 15
"""The same for one that answered and then sends nothing."""


class DataError(RuntimeError):
    """The data is not there, or is not what it should be; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class File:
    """One IDX file: its name without `.gz` and the SHA-256 of both forms."""

    name: str
    sha256_gz: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where a data set comes from: folder, mirrors, and its four files by what they hold."""

    title: str
    folder: str
    mirrors: tuple[str, ...]
    files: Mapping[str, File]
    mean: float
    std: float
    """Of the training images, scaled to [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Images and labels, in memory.

    Shapes and dtypes: images (N, 28, 28) uint8, labels (N,) int64.
    """

    name: str
    title: str
    """What to call the data wherever a number that came from it is shown."""
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    std: float
    is_real: bool = True
    """False for the stand-in that `load_or_digits` falls back to."""

    def to(self, device: torch.device | str) -> Data:
        """The same with its tensors on `device`."""
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, 28, 28) uint8 → (N, 1, 28, 28) of `dtype`, with mean 0 and standard deviation 1."""
        return images.unsqueeze(1).to(dtype).div_(255).sub_(self.mean).div_(self.std)


DATASETS: dict[str, Dataset] = {
    "mnist": Dataset(
        title="MNIST",
        folder="MNIST",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        files={
            "train_images": File(
                "train-images-idx3-ubyte",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            "train_labels": File(
                "train-labels-idx1-ubyte",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            "test_images": File(
                "t10k-images-idx3-ubyte",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            "test_labels": File(
                "t10k-labels-idx1-ubyte",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        },
        mean=0.1307,
        std=0.3081,
    ),
    "fashion": Dataset(
        title="Fashion-MNIST",
        folder="FashionMNIST",
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        files={
            "train_images": File(
                "train-images-idx3-ubyte",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            "train_labels": File(
                "train-labels-idx1-ubyte",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
            "test_images": File(
                "t10k-images-idx3-ubyte",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
            "test_labels": File(
                "t10k-labels-idx1-ubyte",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        },
        mean=0.2860,
        std=0.3530,
    ),
}

# Makes, from a file's name, what pooch reports progress to: `total`, `update`, `reset`, `close`.
ProgressBar = Callable[[str], Any]


def data_root(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The data folder: the argument, else `PYEXT_DATA`, else a cache folder of the user's."""
    if explicit is not None:
        return Path(explicit).expanduser()
    if from_environment := os.environ.get("PYEXT_DATA"):
        return Path(from_environment).expanduser()
    return Path(pooch.os_cache("pyext-lab"))


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    progress: ProgressBar | None = None,
) -> Data:
    """The data set called `name`: "mnist", "fashion", or "digits" (see `load_digits`).

    Args:
        root: as in `data_root`.
        download: fetch what is absent or corrupt; needs the network.
        progress: makes a progress bar for pooch from a file's name.

    Raises:
        ValueError: there is no such data set.
        DataError: a file is absent or corrupt and was not downloaded.
    """
    if name == "digits":
        return load_digits()
    if name not in DATASETS:
        known = ", ".join(map(repr, (*DATASETS, "digits")))
        raise ValueError(f"unknown data set {name!r}; expected one of {known}")
    dataset, root = DATASETS[name], data_root(root)
    arrays = {}
    for role, file in dataset.files.items():
        content = _content(dataset, file, root / dataset.folder / "raw", download, progress)
        arrays[role] = torch.from_numpy(read_idx(content))
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise DataError(
                f"{dataset.title}: the {split} images {tuple(images.shape)} and labels "
                f"{tuple(labels.shape)} do not belong together"
            )
    return Data(
        name,
        dataset.title,
        arrays["train_images"],
        arrays["train_labels"].long(),
        arrays["test_images"],
        arrays["test_labels"].long(),
        dataset.mean,
        dataset.std,
    )


def load_or_digits(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    progress: ProgressBar | None = None,
) -> tuple[Data, str | None]:
    """`load`, or scikit-learn's digits where the data is not to be had.

    Returns:
        The data, and None or the sentence that says why it is not the data that was asked for.
    """
    try:
        return load(name, root, progress=progress), None
    except DataError as error:
        digits = load_digits()
        return digits, f"{error} Using {digits.title} instead."


def load_digits() -> Data:
    """scikit-learn's bundled handwritten digits, 8×8, resized to 28×28: needs no network.

    1797 images, of which every fifth is for testing. It stands in for MNIST where that is not to be
    had; its title says so.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    # Grey levels 0..16 → 0..255; bilinear, as there is nothing finer to recover.
    small = torch.from_numpy(bunch.images).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    images = large.squeeze(1).round_().clamp_(0, 255).to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(images)) % 5 == 0
    scaled = images[~test].double() / 255
    return Data(
        "digits",
        "scikit-learn digits (8×8 resized to 28×28, not MNIST)",
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        scaled.mean().item(),
        scaled.std().item(),
        is_real=False,
    )


def read_idx(content: bytes) -> np.ndarray:
    """The array in an IDX file of unsigned bytes.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the elements, last index fastest.

    Raises:
        DataError: it is no such file, or shorter or longer than its header says.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError("not an IDX file of unsigned bytes")
    sizes, elements = content[4 : 4 + 4 * content[3]], content[4 + 4 * content[3] :]
    if len(sizes) != 4 * content[3]:
        raise DataError("an IDX file that ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    if len(elements) != math.prod(shape):
        raise DataError(f"an IDX file of shape {shape} holds {len(elements)} elements")
    return np.frombuffer(elements, dtype=np.uint8).reshape(shape).copy()


def _content(
    dataset: Dataset, file: File, folder: Path, download: bool, progress: ProgressBar | None
) -> bytes:
    """The uncompressed bytes of one file, from a copy whose checksum is right."""
    problems = []
    for path, checksum in (
        (folder / file.name, file.sha256),
        (folder / f"{file.name}.gz", file.sha256_gz),
    ):
        content, problem = _read(path, checksum)
        if content is not None:
            return content
        if problem:
            problems.append(problem)
    reason = " ".join(problems) or f"{dataset.title} is not in {folder}."
    if not download:
        raise DataError(f"{reason} Put its files there.")
    path = folder / f"{file.name}.gz"
    failures = _download(dataset, file, path, progress)
    if failures is not None:
        raise DataError(
            f"{reason} It was not downloaded ({failures}). Put the four files of "
            f"{dataset.title} into {folder} (torchvision's layout), or name the data folder with "
            "the environment variable PYEXT_DATA."
        )
    content, problem = _read(path, file.sha256_gz)
    if content is None:
        raise DataError(problem or f"{path} vanished after its download.")
    return content


def _read(path: Path, checksum: str) -> tuple[bytes | None, str | None]:
    """(content, None), (None, what is wrong with the file) or, if there is none, (None, None)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})."
    if hashlib.sha256(content).hexdigest() != checksum:
        return None, f"{path} is corrupt: its SHA-256 is not {checksum[:12]}…."
    return (
        gzip.GzipFile(fileobj=io.BytesIO(content)).read() if path.suffix == ".gz" else content
    ), None


def _download(dataset: Dataset, file: File, path: Path, progress: ProgressBar | None) -> str | None:
    """Puts the file at `path` from the first mirror that has it; returns None or why none has.

    pooch downloads to a temporary name and renames it once the checksum is right, so what is at
    `path` is never half a file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make the folder {path.parent}: {error.strerror}"
    if not os.access(path.parent, os.W_OK):
        return f"cannot write to {path.parent}"
    failures = []
    for mirror in dataset.mirrors:
        downloader = pooch.HTTPDownloader(
            timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
            progressbar=progress(path.name) if progress else False,
        )
        try:
            with _quiet_pooch():
                pooch.retrieve(
                    mirror + path.name,
                    known_hash=f"sha256:{file.sha256_gz}",
                    fname=path.name,
                    path=path.parent,
                    downloader=downloader,
                )
            return None
        except (OSError, ValueError) as error:  # requests' exceptions are OSErrors
            failures.append(f"{mirror.split('/')[2]}: {type(error).__name__}")
    return ", ".join(failures)


@contextlib.contextmanager
def _quiet_pooch() -> Iterator[None]:
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
