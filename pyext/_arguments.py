"""What several command lines take, and the sentences with which they refuse the rest."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Sequence

import torch

from pyext import registry

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


def names(text: str) -> list[str]:
    """Names, or other texts, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen(
    parser: argparse.ArgumentParser,
    option: str,
    given: list[str] | None,
    accepted: Sequence[str],
    *,
    default: Sequence[str] | None = None,
    also: str = "",
) -> tuple[str, ...]:
    """The names given, in the order of ``accepted``; ends the program if one is unknown.

    Args:
        parser: whose usage error it is.
        option: where the names were given, for the sentence.
        given: those names; None if there was no such option.
        accepted: all names.
        default: what is chosen without the option; by default all.
        also: a name that is handled elsewhere, for the sentence.
    """
    if given is None:
        return tuple(accepted if default is None else default)
    unknown = [name for name in given if name not in accepted]
    if unknown or not given:
        what = ", ".join(map(repr, unknown)) or "an empty list"
        known = ", ".join((*accepted, also) if also else accepted)
        parser.error(f"{option} does not know {what}; it accepts {known}")
    return tuple(name for name in accepted if name in given)


def shapes(
    parser: argparse.ArgumentParser,
    given: list[str] | None,
    ops: Sequence[registry.Op],
    device: torch.device,
    profile: str,
    *,
    others: bool = True,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Op -> its shapes: those given that have its number of extents.

    Args:
        parser: whose usage error it is if one fits no op.
        given: texts such as ``64x1000x100x10``; None for the profile's shapes.
        ops: the ops chosen.
        device: whose benchmark shapes these are.
        profile: the same, ``quick`` or ``full``.
        others: whether an op that no given shape fits keeps the profile's, so that its rows are not
            silently missing; else it is left out.
    """
    if given is None:
        return {op.name: op.benchmark_shapes[device.type][profile] for op in ops}
    parsed = [_shape(parser, text) for text in given]
    lengths = {len(op.shape_names) for op in ops}
    for shape in parsed:
        if len(shape) not in lengths:
            forms = "; ".join(f"{op.name} takes {'x'.join(op.shape_names)}" for op in ops)
            text = "x".join(map(str, shape))
            parser.error(
                f"--shape {text} fits none of the chosen suites: {forms or 'none takes a shape'}"
            )
    fitting = {
        op.name: tuple(shape for shape in parsed if len(shape) == len(op.shape_names)) for op in ops
    }
    return {
        op.name: fitting[op.name] or op.benchmark_shapes[device.type][profile]
        for op in ops
        if fitting[op.name] or others
    }


def _shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        parser.error(
            f"--shape does not understand {text!r}; it accepts positive numbers joined by x, such "
            "as 4096 (elements) or 64x1000x100x10 (batch, in, hidden, out)"
        )
    return tuple(map(int, text.split("x")))
