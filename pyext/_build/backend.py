"""The build backend that pip, uv and `python -m build` call (PEP 517 and PEP 660).

It is setuptools' own, and adds two things: it asks only for what the target environment lacks, and
an editable install depends on the PyTorch that it was built against.
"""

from __future__ import annotations

import os

import setuptools
import toolchain

OLDEST_SETUPTOOLS = (77, 0, 3)  # the first that knows the license field of pyproject.toml

if tuple(int(part) for part in setuptools.__version__.split(".")[:3]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"pyext: building needs setuptools 77.0.3 or newer, and this is {setuptools.__version__}: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation."
    )

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import (  # noqa: E402
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_sdist(config_settings=None):
    return []


def get_requires_for_build_wheel(config_settings=None):
    return toolchain.build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return toolchain.build_requirements()


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    os.environ[toolchain.EDITABLE] = "1"
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    os.environ[toolchain.EDITABLE] = "1"
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
