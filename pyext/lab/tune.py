"""``python -m pyext.lab tune``: finds faster tiles for the Triton products on this GPU.

A product's tiles follow a rule that knows no GPU (``kernels/_tiling.py``). This times others, in
the ops that launch the product, and keeps those that are faster in Triton's cache folder, where
every later process finds them. From the rule's tiling on, all neighbours (one size halved, doubled
or traded) are timed against the best so far, interleaved, until none is faster; what is kept has
been faster than the rule once more, in a measurement of its own. Nothing is timed that has not been
verified.

Exit codes: 0 done; 1 a result was wrong; 2 wrong usage; 3 no GPU or no Triton; 130 interrupted,
with what was tuned kept.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from rich.console import Console

from pyext import _arguments, registry
from pyext.backends import BACKENDS
from pyext.lab import environment
from pyext.lab.cases import Case, Inputs, Variant, backend_variant, cases, shape_text
from pyext.lab.measure import Effort, Ratio, Subject, measure, speedup

if TYPE_CHECKING:
    from pyext.kernels._tiling import Product, Tiling

OK, FAILED, WRONG_USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in registry.FLOATING_DTYPES)
_CLOCK = "device_warm"
# Each neighbour for 60 ms: a step shows a few percent. The last word, rule against winner, takes
# ten times as long, for the fastest of a dozen was lucky, too.
_SEARCH = Effort(warmup_s=0.02, measure_s=0.06)
_LAST_WORD = Effort(warmup_s=0.1, measure_s=0.6, blocks=20)
_MOST_STEPS = 8


@dataclass(frozen=True)
class Tuned:
    """What came of one product."""

    product: Product
    case: Case
    """In which it was timed."""
    rule: Tiling
    best: Tiling
    ratio: Ratio | None
    """The case's time with the rule's tiling over that with the best; None if no other won."""
    tried: int
    """How many tilings were timed."""
    refused: int
    """How many others this GPU or its compiler did not take."""

    @property
    def outcome(self) -> str:
        """In a line."""
        counts = f"{self.tried} tilings tried, {self.refused} refused"
        if self.ratio is None:
            return f"the rule's {self.rule} stays ({counts})"
        ratio = self.ratio
        return (
            f"{self.rule} -> {self.best}: {self.case.op} {shape_text(self.case.shape)} "
            f"{ratio.value:.3f}x as fast ({ratio.low:.3f}-{ratio.high:.3f}; {counts})"
        )


class WrongResult(RuntimeError):
    """A tiling gave a wrong result: a defect of the kernel or of Triton."""


def tune(
    case: Case,
    decided: Callable[[Product], bool],
    seed: int = 0,
) -> Iterator[Tuned]:
    """Tunes the products that one case launches, one after the other.

    Args:
        case: an op on a shape and dtype; it is timed as a whole, on its device.
        decided: which products are left as they are.
        seed: of the inputs, the order and the bootstrap.

    Yields:
        One for each product, as soon as it is known. Nothing is saved.

    Raises:
        WrongResult: a tiling gave a result beyond the op's tolerance.
    """
    from pyext.kernels._tuned import tiling_of

    inputs = Inputs(registry.get(case.op), case, seed)
    variant = backend_variant("triton", inputs, case)
    device = torch.device(case.device)
    best: dict[Product, Tiling] = {}
    for product in _launched(variant):
        if decided(product):
            continue
        search = _Search(case, inputs, variant, product, best, seed)
        found = search.run()
        best[product] = found.best if found.ratio else tiling_of(product, device)
        yield found


def _launched(variant: Variant) -> list[Product]:
    """The products of one call, each once, in the order of their launches."""
    from pyext.kernels import _tuned

    products, tiling_of = [], _tuned.tiling_of

    def listening(product: Product, device: torch.device) -> Tiling:
        products.append(product)
        return tiling_of(product, device)

    with mock.patch.object(_tuned, "tiling_of", listening):
        variant.results()
    return list(dict.fromkeys(products))


@contextlib.contextmanager
def _forced(tilings: dict[Product, Tiling]) -> Iterator[None]:
    """While it lasts, these products have these tilings, in all threads: autograd has its own."""
    from pyext.kernels import _tuned

    tiling_of = _tuned.tiling_of

    def forced(product: Product, device: torch.device) -> Tiling:
        return tilings.get(product) or tiling_of(product, device)

    with mock.patch.object(_tuned, "tiling_of", forced):
        yield


class _TimeIsUp(Exception):
    pass


class _Search:
    """Hill climbing from the rule's tiling of one product, within one case."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        variant: Variant,
        product: Product,
        others: dict[Product, Tiling],
        seed: int,
    ):
        self._case, self._inputs, self._variant = case, inputs, variant
        self._product, self._others, self._seed = product, dict(others), seed
        self._tried, self._refused = 0, 0

    def run(self) -> Tuned:
        from pyext.kernels._tiling import choose_tiling, neighbours

        product = self._product
        rule = choose_tiling(product.m, product.n, product.k, product.dtype.itemsize)
        self._usable(rule)
        best, known, ratio = rule, {rule}, None
        for _ in range(_MOST_STEPS):
            new = [each for each in neighbours(best, product) if each not in known]
            known.update(new)
            ratios = self._against(best, list(filter(self._usable, new)), _SEARCH)
            if not ratios:
                break
            fastest = max(ratios, key=lambda each: ratios[each].value)
            if ratios[fastest].verdict != "faster":
                break
            best = fastest
        if best != rule:
            ratio = self._against(rule, [best], _LAST_WORD).get(best)
        if ratio is None or ratio.verdict != "faster":
            best, ratio = rule, None
        return Tuned(product, self._case, rule, best, ratio, self._tried, self._refused)

    def _tilings(self, tiling: Tiling) -> dict[Product, Tiling]:
        return {**self._others, self._product: tiling}

    def _usable(self, tiling: Tiling) -> bool:
        """Whether the kernel compiles and is launched; a wrong result is an error."""
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            with _forced(self._tilings(tiling)):
                result = self._variant.verify(self._inputs)
        except (OutOfResources, PTXASError):
            self._refused += 1
            return False
        if not result:
            raise WrongResult(f"{self._product} in tiles of {tiling}: {result.detail}")
        self._tried += 1
        return True

    def _against(
        self, baseline: Tiling, tilings: Sequence[Tiling], effort: Effort
    ) -> dict[Tiling, Ratio]:
        """How much faster each is than ``baseline``; those that the clock cannot time are out."""
        subjects = [self._subject(tiling) for tiling in (baseline, *tilings)]
        device = torch.device(self._case.device)
        samples = measure(subjects, _CLOCK, effort, device=device, seed=self._seed)
        reference = samples[str(baseline)]
        if isinstance(reference, str):
            raise RuntimeError(f"{self._case.label} cannot be timed: {reference}")
        return {
            tiling: speedup(reference, own, paired=True, seed=self._seed)
            for tiling in tilings
            if not isinstance(own := samples[str(tiling)], str)
        }

    def _subject(self, tiling: Tiling) -> Subject:
        """The case with this tiling, named after it."""
        tilings, subject = self._tilings(tiling), self._variant.subject

        def forced(call: Callable[[], Any]) -> Callable[[], Any]:
            def call_forced() -> Any:
                with _forced(tilings):
                    return call()

            return call_forced

        return replace(
            subject,
            name=str(tiling),
            call=forced(subject.call),
            capturable=lambda: forced(forced(subject.capturable)()),
        )


# --- the command ---------------------------------------------------------------------------------


def _ops_with_products() -> list[registry.Op]:
    return [
        op
        for op in registry.ops().values()
        if op.cost(op.directions[-1], (1,) * len(op.shape_names), 4).unit == "matmul"
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    ops = ", ".join(op.name for op in _ops_with_products())
    add = parser.add_argument
    add("--suite", type=_arguments.names, metavar="NAMES", help=f"of {ops} (default: all)")
    add(
        "--dtype",
        type=_arguments.names,
        metavar="NAMES",
        help=f"of {', '.join(_DTYPES)} (default: float32)",
    )
    add(
        "--shape",
        type=_arguments.names,
        metavar="SHAPES",
        help="such as 64x1000x100x10 (default: those of a quick benchmark)",
    )
    add(
        "--minutes",
        type=_arguments.number(lambda value: value > 0, "above 0"),
        metavar="N",
        default=float("inf"),
        help="begin no product after so long (default: no limit)",
    )
    add("--again", action="store_true", help="also what was tuned before")
    add("--seed", type=_arguments.seed, default=0, metavar="N", help="default: 0")


def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    ops = {op.name: op for op in _ops_with_products()}
    suites = _arguments.chosen(parser, "--suite", options.suite, list(ops))
    dtypes = _arguments.chosen(parser, "--dtype", options.dtype, _DTYPES, default=["float32"])
    cuda = torch.device("cuda")
    chosen = [ops[name] for name in suites]
    shapes = _arguments.shapes(parser, options.shape, chosen, cuda, "quick")
    if not any(getattr(torch, dtype) in op.dtypes for op in chosen for dtype in dtypes):
        parser.error(f"nothing to tune: {', '.join(suites)} is not measured in {', '.join(dtypes)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if reason := BACKENDS["triton"].unavailable("cuda"):
        console.print(f"tune needs an NVIDIA GPU and Triton: {reason}.", soft_wrap=True)
        return MISSING
    from pyext.kernels import _tuned

    if not _tuned.enabled():
        parser.error("PYEXT_TUNED=0 leaves unread what this would save; unset it")
    environment.use_full_precision()
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [
        case
        for op in chosen
        for case in cases(op, device, dtypes, shapes[op.name])
        if case.direction == op.directions[-1]
    ]
    return _tune_all(wanted, options, console)


def _tune_all(wanted: Sequence[Case], options: argparse.Namespace, console: Console) -> int:
    from pyext.kernels import _tuned

    device = torch.device(wanted[0].device)
    end = time.monotonic() + 60 * options.minutes
    found: list[Tuned] = []
    status, last = OK, ""

    def decided(product: Product) -> bool:
        if any(each.product == product for each in found):
            return True
        return not options.again and _tuned.load(product, device) is not None

    try:
        for case in wanted:
            console.print(f"[dim]{case.label}[/]")
            for each in tune(case, decided, options.seed):
                _tuned.save(each.product, each.best, device)
                found.append(each)
                console.print(f"  {each.product}: {each.outcome}", markup=False, soft_wrap=True)
                if time.monotonic() > end:
                    raise _TimeIsUp
    except _TimeIsUp:
        last = "The time was used up; the same command goes on where this one ended."
    except KeyboardInterrupt:
        status, last = INTERRUPTED, "Interrupted; the same command goes on where this one ended."
    except OSError as error:
        status, last = MISSING, f"Triton's cache folder cannot be written: {error}."
    except RuntimeError as error:
        status, last = FAILED, f"{type(error).__name__}: {error}"
    faster = sum(each.ratio is not None for each in found)
    console.print(
        f"{len(found)} products tuned, {faster} of them faster than with the rule's tiles; "
        f"{_tuned.count(device)} are kept for this GPU."
    )
    if last:
        console.print(last, markup=False, soft_wrap=True)
    return status
