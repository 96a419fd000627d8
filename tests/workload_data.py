"""Tiny data sets in torchvision's layout, and a local mirror, for the tests of the workloads."""

import contextlib
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np

from pyext.workloads.data import DATASETS, Dataset, File

DEAD_MIRROR = "http://127.0.0.1:9/"  # the discard port: refused at once, and never the network


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of uint8 as an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


def arrays(train: int = 48, test: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Random images with a bright square whose corner tells the label, so that nets can learn."""
    generator = np.random.default_rng(seed)
    result = {}
    for split, count in (("train", train), ("test", test)):
        labels = generator.integers(10, size=count, dtype=np.uint8)
        images = generator.integers(64, size=(count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = 7 * (label // 4), 7 * (label % 4)
            image[row : row + 7, column : column + 7] = 255
        result[f"{split}_images"], result[f"{split}_labels"] = images, labels
    return result


def contents(images_and_labels: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Role → uncompressed file."""
    return {role: idx_bytes(array) for role, array in images_and_labels.items()}


def compress(content: bytes) -> bytes:
    """gzip without the time of day, so that the checksum is always the same."""
    return gzip.compress(content, mtime=0)


def dataset(files: dict[str, bytes], *mirrors: str) -> Dataset:
    """A data set that demands exactly these files."""
    real = DATASETS["mnist"].files
    return Dataset(
        title="tiny MNIST",
        folder="MNIST",
        mirrors=mirrors or (DEAD_MIRROR,),
        files={
            role: File(
                real[role].name,
                hashlib.sha256(compress(content)).hexdigest(),
                hashlib.sha256(content).hexdigest(),
            )
            for role, content in files.items()
        },
        mean=0.2,
        std=0.3,
    )


def write(root: Path, files: dict[str, bytes], *, gz: bool = True) -> Path:
    """Puts the files below `root` in torchvision's layout; returns their folder."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for role, content in files.items():
        name = DATASETS["mnist"].files[role].name
        path = folder / (f"{name}.gz" if gz else name)
        path.write_bytes(compress(content) if gz else content)
    return folder


@contextlib.contextmanager
def mirror(respond):
    """A server on this machine; `respond(name)` gives a file's bytes, or None for "not found".

    Yields its address and the list of what was asked for.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            asked.append(name)
            body = respond(name)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
