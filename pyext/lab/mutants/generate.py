"""Automatic mutants: one token of a kernel's source, changed.

Which ones, a seed decides: every possible change has a number that depends on the seed and on the
change alone, and those with the smallest numbers come first. So an edit elsewhere in the sources
does not choose others. Rules take turns, else most mutants would be changed constants.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from pyext.lab.mutants.patches import Edit, Mutant

SOURCES = {
    "cpp": ("csrc/cpu/**/*.cpp", "csrc/cpu/**/*.h", "csrc/common/**/*.h"),
    "cuda": ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cuh"),
    "triton": ("kernels/*.py",),
}
"""Way -> where its kernels are."""

_NO_KERNELS = ("introspect", "register")

# Rule -> (what to look for in code without comments and strings, what to put in its place).
# Operators have spaces around them; a template's or a pointer's have none.
_SWAPPED = {
    "comparison": {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    "arithmetic": {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "+=": "-=", "-=": "+="},
    "logic": {"&&": "||", "||": "&&", "and": "or", "or": "and", "&": "|"},
    "stride": {
        "row_stride": "column_stride",
        "column_stride": "row_stride",
        "stride_a": "stride_b",
        "stride_b": "stride_a",
        "out_row": "out_column",
        "out_column": "out_row",
        "mask_row": "mask_column",
        "residual_column": "residual_row",
        "a_step": "b_step",
    },
    "operand": {"rows": "columns", "columns": "rows", "row": "column", "column": "row"},
}
_PATTERNS = {
    rule: re.compile(
        "|".join(
            rf"\b{re.escape(token)}\b"
            if token.isidentifier()
            else rf"(?<= ){re.escape(token)}(?= )"
            for token in sorted(tokens, key=len, reverse=True)
        )
    )
    for rule, tokens in _SWAPPED.items()
}
_CONSTANT = re.compile(r"(?<![\w.])\d+(?![\w.])")
_BARRIER = re.compile(r"(?:__sync\w+|\bgrid\.sync|\bwait_for_previous_kernel)\([^()]*\);")


def candidates(root: Path, way: str, seed: int) -> Iterator[Mutant]:
    """Every automatic mutant of one way's kernels, in the seed's order."""
    by_rule: dict[str, list[tuple[str, Mutant]]] = {}
    for pattern in SOURCES[way]:
        for path in sorted(root.glob(pattern)):
            if path.stem.startswith(_NO_KERNELS):
                continue
            name = path.relative_to(root).as_posix()
            for rule, mutant in _mutants_of(name, path.read_text(), seed):
                by_rule.setdefault(rule, []).append(mutant)
    queues = [[each for _, each in sorted(found, key=_number)] for found in by_rule.values()]
    for turn in itertools.zip_longest(*queues):
        yield from (mutant for mutant in turn if mutant is not None)


def _number(numbered: tuple[str, Mutant]) -> str:
    return numbered[0]


def _mutants_of(path: str, source: str, seed: int) -> Iterator[tuple[str, tuple[str, Mutant]]]:
    """(rule, (number, mutant)) for every change of one file."""
    lines = source.splitlines(keepends=True)
    code = _python_code(source) if path.endswith(".py") else _cpp_code(source)
    seen: dict[tuple[str, str], int] = {}
    for at, text in enumerate(code.splitlines(keepends=True)):
        for rule, begin, end, new in _changes(text):
            line = lines[at]
            changed = line[:begin] + new + line[end:]
            before, after = line.strip(), changed.strip()
            # The same change of equal lines: told apart by their order in the file.
            repeat = seen[before, after] = seen.get((before, after), -1) + 1
            key = f"{path}|{before}|{after}|{repeat}"
            name = f"auto-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            number = hashlib.sha256(f"{seed}|{key}".encode()).hexdigest()
            edit = Edit(at, (line,), (changed,))
            description = f"{before}  →  {after or '(nothing)'}"
            yield rule, (number, Mutant(name, description, path, (edit,), by_hand=False))


def _changes(code: str) -> Iterator[tuple[str, int, int, str]]:
    """(rule, begin, end, replacement) for every token of a line that a rule knows."""
    for rule, pattern in _PATTERNS.items():
        for found in pattern.finditer(code):
            yield rule, *found.span(), _SWAPPED[rule][found[0]]
    for found in _CONSTANT.finditer(code):
        yield "constant", *found.span(), str(int(found[0]) + 1)
    for found in _BARRIER.finditer(code):
        yield "barrier", *found.span(), ";"


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _cpp_code(source: str) -> str:
    """The source with comments, literals and directives blanked out; columns stay."""
    no_code = re.compile(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'"
        r"|^[ \t]*#(?:\\\n|[^\n])*|static_assert\([^;]*;",
        re.DOTALL | re.MULTILINE,
    )
    return no_code.sub(lambda found: _blank(found[0]), source)


def _python_code(source: str) -> str:
    """The source with comments, strings, imports and decorators blanked out; columns stay."""
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_string = tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE")
        if token.type != tokenize.COMMENT and not is_string:
            continue
        (first, begin), (last, end) = token.start, token.end
        for row in range(first - 1, last):
            text = lines[row]
            a = begin if row == first - 1 else 0
            b = end if row == last - 1 else len(text)
            lines[row] = text[:a] + _blank(text[a:b]) + text[b:]
    return re.sub(
        r"^[ \t]*(?:import|from|@)[^\n]*",
        lambda found: _blank(found[0]),
        "".join(lines),
        flags=re.M,
    )
