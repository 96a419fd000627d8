"""The tilings that ``python -m pyext.lab tune`` has found, in the user's cache folder.

One file for each product, in a folder that is named after the GPU, Triton's version and the source
of the kernels: what was tuned for others is not found. A file is replaced as a whole, so that a
tuner may be interrupted at any time. ``PYEXT_TUNED=0`` leaves all of them unread.

Nothing is timed behind the user's back. Triton's own autotuner would do it in the first call, also
while a stream is captured, and a product that updates weights would need a copy for each trial. Nor
do the files lie in Triton's cache folder: torch.compile moves that within a process.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import triton

from ._registration import INTERPRETED
from ._tiling import Tiling, choose_tiling, fits


def tiling_of(product, device):
    """The tiling that a product gets on a device: the tuned one, or else the rule's."""
    return _tiling_of(product, device)


# Remembered, for the host's sake: the rule takes 29 us, the whole way to a known tiling 1.2.
@functools.lru_cache(maxsize=4096)
def _tiling_of(product, device):
    tuned = load(product, device)
    return tuned or choose_tiling(product.m, product.n, product.k, product.dtype.itemsize)


def load(product, device):
    """The tiling that was tuned for a product on a device; None if there is none.

    A file that is damaged is ignored with a warning.
    """
    if not enabled(device):
        return None
    path = _path(product, device)
    try:
        text = path.read_text()
    except OSError:
        return None  # none was saved, or it cannot be read
    with contextlib.suppress(ValueError, TypeError):
        tiling = Tiling(**json.loads(text))
        if all(type(each) is int for each in tiling) and fits(tiling, product):
            return tiling
    warnings.warn(
        f"{path} is damaged and ignored; `python -m pyext.lab tune --again` writes it anew",
        stacklevel=2,
    )
    return None


def save(product, tiling, device):
    """Keep a tiling for a product on a CUDA device, for this process too. Raises OSError."""
    path = _path(product, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(tiling._asdict()))
    os.replace(file.name, path)
    _tiling_of.cache_clear()


def count(device):
    """For how many products a tiling was tuned on a device; 0 where they are not read."""
    return len(list(_folder(device).glob("*.json"))) if enabled(device) else 0


def enabled(device):
    """Whether tuned tilings are looked for: of a GPU, unless the user or the interpreter is against
    it."""
    return device.type == "cuda" and not INTERPRETED and os.environ.get("PYEXT_TUNED") != "0"


def _path(product, device):
    return _folder(device) / f"{str(product).replace(' ', '-')}.json"


def _folder(device):
    import pooch  # here: without a GPU nobody needs it

    from ._matmul import _add_parts_kernel, _matmul_kernel  # which imports this file

    properties = torch.cuda.get_device_properties(device)
    key = (
        properties.name,
        f"{properties.major}.{properties.minor}",
        triton.__version__,
        _matmul_kernel.cache_key,
        _add_parts_kernel.cache_key,
    )
    digest = hashlib.sha256("-".join(key).encode()).hexdigest()
    return Path(pooch.os_cache("pyext-lab")) / "triton-tilings" / digest[:32]
