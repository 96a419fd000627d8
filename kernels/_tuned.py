"""The tilings that ``python -m pyext.lab tune`` has found, in Triton's cache folder.

One file for each product, in a folder that is named after the GPU, Triton's version and the source
of the kernels: what was tuned for others is not found. Triton's cache manager replaces a file as a
whole, so that a tuner may be interrupted at any time. ``PYEXT_TUNED=0`` leaves all of them unread.

Nothing is timed behind the user's back. Triton's own autotuner would do it in the first call, also
while a stream is captured, and a product that updates weights would need a copy for each trial.
"""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch
import triton
from triton.runtime.cache import get_cache_manager

from ._registration import INTERPRETED
from ._tiling import Tiling, choose_tiling, fits


def tiling_of(product, device):
    """The tiling that a product gets on a device: the tuned one, or else the rule's."""
    return _tiling_of(product, device)


@functools.lru_cache(maxsize=4096)
def _tiling_of(product, device):
    tuned = load(product, device) if device.type == "cuda" and not INTERPRETED else None
    return tuned or choose_tiling(product.m, product.n, product.k, product.dtype.itemsize)


def load(product, device):
    """The tiling that was tuned for a product on a CUDA device; None if there is none.

    A file that is damaged is ignored with a warning.
    """
    if not enabled():
        return None
    try:
        path = _cache(device).get_file(_file_name(product))
        if path is None:
            return None
        text = Path(path).read_text()
    except OSError:
        return None  # the folder cannot be made or read, or was emptied just now
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
    _cache(device).put(json.dumps(tiling._asdict()), _file_name(product), binary=False)
    _tiling_of.cache_clear()


def count(device):
    """For how many products a tiling was tuned on a CUDA device; 0 where they are not read."""
    if not enabled():
        return 0
    with contextlib.suppress(OSError):
        return len(list(Path(_cache(device).cache_dir).glob("*.json")))
    return 0


def enabled():
    return os.environ.get("PYEXT_TUNED") != "0"


def _file_name(product):
    return f"{str(product).replace(' ', '-')}.json"


def _cache(device):
    from ._matmul import _add_parts_kernel, _matmul_kernel  # which imports this file

    properties = torch.cuda.get_device_properties(device)
    key = (
        "pyext-lab tilings",
        properties.name,
        f"{properties.major}.{properties.minor}",
        triton.__version__,
        _matmul_kernel.cache_key,
        _add_parts_kernel.cache_key,
    )
    return get_cache_manager(hashlib.sha256("-".join(key).encode()).hexdigest())
