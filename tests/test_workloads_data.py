"""The data sets: reading, checksums, downloads, and what happens without them."""

import gzip
import hashlib
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import workload_data as tiny

from pyext.workloads import data

ARRAYS = tiny.arrays()
FILES = tiny.contents(ARRAYS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    real = socket.getaddrinfo

    def only_this_machine(host, *args, **options):
        assert host == "127.0.0.1", f"a test tried to reach {host}"
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_this_machine)
    monkeypatch.delenv("PYEXT_DATA", raising=False)


@pytest.fixture
def demand(monkeypatch):
    """Makes "mnist" the tiny data set, to be had from the given mirrors."""

    def set_mirrors(*mirrors):
        monkeypatch.setitem(data.DATASETS, "mnist", tiny.dataset(FILES, *mirrors))

    set_mirrors()
    return set_mirrors


def _served(name):
    roles = {f"{file.name}.gz": role for role, file in data.DATASETS["mnist"].files.items()}
    return tiny.compress(FILES[roles[name]])


def _check(loaded):
    assert loaded.title == "tiny MNIST" and loaded.is_real
    for role, array in ARRAYS.items():
        np.testing.assert_array_equal(getattr(loaded, role).numpy(), array)
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == torch.int64


# --- files that are there ------------------------------------------------------------------------


@pytest.mark.parametrize("gz", [True, False])
def test_reads_both_forms(tmp_path, demand, gz):
    tiny.write(tmp_path, FILES, gz=gz)
    _check(data.load("mnist", tmp_path, download=False))


def test_a_good_copy_beside_a_corrupt_one_is_enough(tmp_path, demand):
    tiny.write(tmp_path, FILES, gz=True)
    for path in tiny.write(tmp_path, FILES, gz=False).glob("*-ubyte"):
        path.write_bytes(b"damaged")
    _check(data.load("mnist", tmp_path, download=False))


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"",
    ],
    ids=["truncated", "one bit", "empty"],
)
def test_a_corrupt_file_is_refused(tmp_path, demand, gz, damage):
    folder = tiny.write(tmp_path, FILES, gz=gz)
    path = folder / ("t10k-labels-idx1-ubyte" + (".gz" if gz else ""))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match="t10k-labels.* is corrupt"):
        data.load("mnist", tmp_path, download=False)


def test_absent_data_without_download(tmp_path, demand):
    with pytest.raises(data.DataError, match="tiny MNIST is not in .*raw. Put its files there."):
        data.load("mnist", tmp_path, download=False)
    assert not list(tmp_path.iterdir())


def test_images_and_labels_must_belong_together(tmp_path, monkeypatch):
    files = FILES | {"train_labels": tiny.idx_bytes(ARRAYS["train_labels"][:-1])}
    monkeypatch.setitem(data.DATASETS, "mnist", tiny.dataset(files))
    tiny.write(tmp_path, files)
    with pytest.raises(data.DataError, match="train images .48, 28, 28. and labels .47,. do not"):
        data.load("mnist", tmp_path, download=False)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'cifar'; expected one of 'mnist', 'fashion', 'digits'"):
        data.load("cifar")


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4), (2, 3, 4)])
def test_read_idx(shape):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.uint8).reshape(shape)
    read = data.read_idx(tiny.idx_bytes(array))
    np.testing.assert_array_equal(read, array)
    assert read.shape == shape and read.flags.writeable


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x0d\x01\0\0\0\x01\0",
        b"\x1f\x8b\x08\0",
        tiny.idx_bytes(np.ones((2, 3), np.uint8))[:-1],
        tiny.idx_bytes(np.ones((2, 3), np.uint8)) + b"\0",
        tiny.idx_bytes(np.ones((2, 3), np.uint8))[:9],
    ],
)
def test_read_idx_refuses_other_content(content):
    with pytest.raises(data.DataError, match="IDX"):
        data.read_idx(content)


def test_the_data_folder(monkeypatch, tmp_path):
    assert "pyext-lab" in str(data.data_root())
    monkeypatch.setenv("PYEXT_DATA", str(tmp_path))
    assert data.data_root() == tmp_path
    assert data.data_root("~/elsewhere") == tmp_path.home() / "elsewhere"


# --- downloads, from a mirror on this machine ----------------------------------------------------


def test_downloads_what_is_absent_once(tmp_path, demand):
    with tiny.mirror(_served) as (address, asked):
        demand(address)
        _check(data.load("mnist", tmp_path))
        _check(data.load("mnist", tmp_path))
    assert sorted(asked) == sorted(path.name for path in (tmp_path / "MNIST/raw").iterdir())
    assert len(asked) == 4


def test_tries_the_next_mirror(tmp_path, demand):
    with tiny.mirror(lambda name: None) as (empty, asked), tiny.mirror(_served) as (good, _):
        demand(tiny.DEAD_MIRROR, empty, good)
        _check(data.load("mnist", tmp_path))
    assert len(asked) == 4


def test_downloads_a_corrupt_file_again(tmp_path, demand):
    folder = tiny.write(tmp_path, FILES)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half a file")
    with tiny.mirror(_served) as (address, asked):
        demand(address)
        _check(data.load("mnist", tmp_path))
    assert asked == ["train-images-idx3-ubyte.gz"]


@pytest.mark.parametrize(
    "serve", [lambda name: _served(name)[:-9], lambda name: b"<html>", lambda name: None]
)
def test_a_bad_download_is_never_kept(tmp_path, demand, serve):
    with tiny.mirror(serve) as (address, _):
        demand(address, tiny.DEAD_MIRROR)
        with pytest.raises(data.DataError) as caught:
            data.load("mnist", tmp_path)
    assert not list((tmp_path / "MNIST/raw").iterdir())
    for part in ("not downloaded (127.0.0.1", "torchvision's layout", "PYEXT_DATA"):
        assert part in str(caught.value)


def test_a_silent_mirror_is_given_up_in_time(tmp_path, demand, monkeypatch):
    monkeypatch.setattr(data, "READ_TIMEOUT_S", 0.2)
    with tiny.mirror(lambda name: time.sleep(1) or b"") as (address, _):
        demand(address)
        start = time.perf_counter()
        with pytest.raises(data.DataError, match="ReadTimeout"):
            data.load("mnist", tmp_path)
        assert time.perf_counter() - start < 0.9


def test_time_outs_are_seconds():
    assert 1 <= data.CONNECT_TIMEOUT_S <= 10 and 1 <= data.READ_TIMEOUT_S <= 30


def test_a_folder_that_cannot_be_made(tmp_path, demand):
    (tmp_path / "MNIST").write_text("a file where a folder should be")
    with pytest.raises(data.DataError, match="cannot make the folder|cannot be read"):
        data.load("mnist", tmp_path)


# --- the stand-in --------------------------------------------------------------------------------


def test_digits_are_labelled_as_what_they_are():
    digits = data.load("digits")
    assert not digits.is_real and "not MNIST" in digits.title
    assert digits.train_images.shape[1:] == (28, 28) and digits.train_images.dtype == torch.uint8
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.max() > 200 and digits.test_labels.unique().tolist() == [*range(10)]
    normalized = digits.normalize(digits.train_images)
    assert abs(normalized.mean()) < 1e-4 and abs(normalized.std() - 1) < 1e-3


def test_load_or_digits(tmp_path, demand):
    found, reason = data.load_or_digits("mnist", tmp_path)
    assert found.name == "digits"
    assert "tiny MNIST is not in" in reason and reason.endswith("not MNIST) instead.")
    tiny.write(tmp_path, FILES)
    found, reason = data.load_or_digits("mnist", tmp_path)
    assert found.title == "tiny MNIST" and reason is None


# --- the real files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_real_data(name):
    if not REAL_DATA:
        pytest.skip("PYEXT_DATA is not set: no real data")
    real = data.load(name, REAL_DATA, download=False)
    dataset = data.DATASETS[name]
    for file in dataset.files.values():
        path = Path(REAL_DATA) / dataset.folder / "raw" / f"{file.name}.gz"
        if path.exists():
            unzipped = gzip.decompress(path.read_bytes())
            assert hashlib.sha256(unzipped).hexdigest() == file.sha256
    assert real.train_images.shape == (60000, 28, 28) and real.test_images.shape == (10000, 28, 28)
    assert torch.bincount(real.test_labels).shape == (10,)
    if name == "mnist":
        assert real.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    pixels = real.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(real.mean, abs=1e-4)
    assert pixels.std().item() == pytest.approx(real.std, abs=1e-4)


REAL_DATA = os.environ.get("PYEXT_DATA")
