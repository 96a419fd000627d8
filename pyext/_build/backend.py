"""The build backend that pip, uv and `python -m build` call (PEP 517 and PEP 660): setuptools' own."""

from setuptools.build_meta import *  # noqa: F403
