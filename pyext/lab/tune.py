"""``python -m pyext.lab tune``: finds faster tiles for the Triton products on this GPU.

A product's tiles follow a rule that knows no GPU (``kernels/_tiling.py``). This times others, in
the ops that launch the product, and keeps those that are faster in the user's cache folder, where
every later process finds them. From the rule's tiling on, all neighbours (one size halved, doubled
or traded) are timed against the best so far, interleaved, until none is faster; what is kept has
then been faster than the rule in each of several measurements of the two. Nothing is timed that has
not been verified, and what is kept is verified once more.

Exit codes: 0 done; 1 a result was wrong, or a call failed; 2 wrong usage; 3 the environment lacks
something (a GPU, Triton, memory, room for the files); 130 interrupted, with what was tuned kept.
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
_CLOCK = "device_warm"
# A step shows a few percent. The fastest of a dozen was lucky, too, so the last word is had by
# rule and winner alone, five times: one of 40 intervals lies above 1 for no reason, not five.
_SEARCH = Effort(warmup_s=0.02, measure_s=0.06)
_LAST_WORD = Effort(warmup_s=0.1, measure_s=0.06)
_LAST_WORDS = 5
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
    """The case's time with the rule's tiling over that with the best, the least of the last
    measurements; None if no other won."""
    tried: int
    """How many tilings were verified."""
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


class CannotTune(RuntimeError):
    """Not even the rule's tiling can be launched or timed here."""


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
        CannotTune: not even the rule's tiling can be launched or timed.
    """
    from triton.runtime.errors import TritonError

    inputs = Inputs(registry.get(case.op), case, seed)
    variant = backend_variant("triton", inputs, case)
    best: dict[Product, Tiling] = {}
    try:
        products = _launched(variant)
    except TritonError as error:
        raise CannotTune(f"{case.label} cannot be launched here: {error}") from error
    for product in products:
        if decided(product):
            continue
        found = _Search(case, inputs, variant, product, best, seed).run()
        best[product] = found.best
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
    """No further product is begun."""


class _CannotSave(Exception):
    """Why, in a sentence without its full stop."""


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
        self._tried: set[Tiling] = set()
        self._refused = 0

    def run(self) -> Tuned:
        from pyext.kernels._tiling import choose_tiling, neighbours

        product = self._product
        rule = choose_tiling(product.m, product.n, product.k, product.dtype.itemsize)
        if not self._usable(rule):
            raise CannotTune(f"{product}: this GPU does not take the rule's tiles of {rule}")
        best, known = rule, {rule}
        for _ in range(_MOST_STEPS):
            new = [each for each in neighbours(best, product) if each not in known]
            known.update(new)
            ratios = self._against(best, list(filter(self._usable, new)), _SEARCH, self._seed)
            faster = {each: r for each, r in ratios.items() if r.verdict == "faster"}
            if not faster:
                break
            best = max(faster, key=lambda each: faster[each].value)
        ratio = None if best == rule else self._last_word(rule, best)
        if ratio is None:
            best = rule
        else:
            self._usable(best)  # verified after the timing, too
        return Tuned(product, self._case, rule, best, ratio, len(self._tried), self._refused)

    def _last_word(self, rule: Tiling, best: Tiling) -> Ratio | None:
        """The least of several ratios, each of which says that ``best`` is faster; else None."""
        ratios = []
        for repeat in range(_LAST_WORDS):
            ratio = self._against(rule, [best], _LAST_WORD, self._seed + repeat).get(best)
            if ratio is None or ratio.verdict != "faster":
                return None
            ratios.append(ratio)
        return min(ratios, key=lambda each: each.value)

    def _tilings(self, tiling: Tiling) -> dict[Product, Tiling]:
        return {**self._others, self._product: tiling}

    def _usable(self, tiling: Tiling) -> bool:
        """Whether the kernel compiles and is launched; a wrong result is an error."""
        from triton.runtime.errors import TritonError

        try:
            with _forced(self._tilings(tiling)):
                result = self._variant.verify(self._inputs)
        except TritonError:  # does not compile, or needs more than a multiprocessor has
            self._refused += 1
            return False
        except RuntimeError as error:
            if "PassManager" not in str(error):  # a pass of the compiler failed
                raise
            self._refused += 1
            return False
        if not result:
            raise WrongResult(f"{self._product} in tiles of {tiling}: {result.detail}")
        self._tried.add(tiling)
        return True

    def _against(
        self, baseline: Tiling, tilings: Sequence[Tiling], effort: Effort, seed: int
    ) -> dict[Tiling, Ratio]:
        """How much faster each is than ``baseline``; those that the clock cannot time are out."""
        if not tilings:
            return {}
        subjects = [self._subject(tiling) for tiling in (baseline, *tilings)]
        device = torch.device(self._case.device)
        samples = measure(subjects, _CLOCK, effort, device=device, seed=seed)
        reference = samples[str(baseline)]
        if isinstance(reference, str):
            raise CannotTune(f"{self._case.label}: {reference}")
        return {
            tiling: speedup(reference, own, paired=True, seed=seed)
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
        help=f"of {', '.join(registry.DTYPE_NAMES)} (default: float32)",
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
    dtypes = _arguments.chosen(
        parser, "--dtype", options.dtype, registry.DTYPE_NAMES, default=["float32"]
    )
    cuda = torch.device("cuda")
    chosen = [ops[name] for name in suites]
    shapes = _arguments.shapes(parser, options.shape, chosen, cuda, "quick", others=False)
    chosen = [op for op in chosen if op.name in shapes]
    if not any(getattr(torch, dtype) in op.dtypes for op in chosen for dtype in dtypes):
        parser.error(f"nothing to tune: {', '.join(suites)} is not measured in {', '.join(dtypes)}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    reason = BACKENDS["triton"].unavailable("cuda")
    if not reason and BACKENDS["triton"].interpreted:
        reason = "TRITON_INTERPRET=1 runs the kernels in NumPy; unset it"
    if reason:
        console.print(f"tune needs an NVIDIA GPU and Triton: {reason}.", soft_wrap=True)
        return MISSING
    from pyext.kernels import _tuned

    device = torch.device("cuda", torch.cuda.current_device())
    if not _tuned.enabled(device):
        parser.error("PYEXT_TUNED=0 leaves unread what this would save; unset it")
    environment.use_full_precision()
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
    goes_on = "" if options.again else "; the same command goes on where this one ended"
    status, last = OK, ""

    def decided(product: Product) -> bool:
        if any(each.product == product for each in found):
            return True
        if not options.again and _tuned.load(product, device) is not None:
            return True
        if time.monotonic() > end:
            raise _TimeIsUp
        return False

    try:
        for case in wanted:
            with console.status(case.label):
                for each in tune(case, decided, options.seed):
                    _save(each, device)
                    found.append(each)
                    console.print(f"{each.product}: {each.outcome}", markup=False, soft_wrap=True)
    except _TimeIsUp:
        last = f"The time was used up{goes_on}."
    except KeyboardInterrupt:
        status, last = INTERRUPTED, f"Interrupted{goes_on}."
    except (CannotTune, _CannotSave, torch.OutOfMemoryError) as error:
        status, last = MISSING, f"{str(error).rstrip('.')}."
    except RuntimeError as error:
        status, last = FAILED, f"{type(error).__name__}: {error}"
    faster = sum(each.ratio is not None for each in found)
    console.print(
        f"Products tuned: {len(found)}, {faster} of them faster than with the rule's tiles; "
        f"kept for this GPU: {_tuned.count(device)}."
    )
    if last:
        console.print(last, markup=False, soft_wrap=True)
    return status


def _save(found: Tuned, device: torch.device) -> None:
    from pyext.kernels import _tuned

    try:
        _tuned.save(found.product, found.best, device)
    except OSError as error:
        raise _CannotSave(f"Tilings cannot be kept: {error}") from error
