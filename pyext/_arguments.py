"""For ``argparse``'s ``type``: each refuses what it does not accept in a sentence."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable

MOST_SEED = 2**31 - 1
"""Training makes a seed of 64 bits for each epoch from it."""


def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An integer from ``least`` to ``most``."""
    wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer {wanted}")

    return parse


def number(accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """A finite number that ``accepts`` does; ``wanted`` says in words which those are."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(value := float(text)) and accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {wanted}")

    return parse


seed = integer(0, MOST_SEED)
