"""``python -m pyext.lab mutants``: its patches, its automatic mutants, what it takes as proof."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pyext.backends import BACKENDS
from pyext.lab import __main__ as lab
from pyext.lab.mutants import command, generate, patches, trial
from pyext.lab.mutants.patches import Edit, Mutant, PatchError
from pyext.lab.mutants.scratch import ROOT, Built, Scratch
from pyext.lab.mutants.trial import NoEvidence, Row, Run
from pyext.lab.mutants.witness import sha256

pytestmark = pytest.mark.skipif(
    not (ROOT / patches.FOLDER).is_dir(),
    reason="needs the sources, and this is an installed package",
)

BY_HAND = patches.read_all(ROOT) if (ROOT / patches.FOLDER).is_dir() else []


# --- patches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", BY_HAND, ids=lambda mutant: mutant.name)
def test_every_patch_applies(mutant):
    source = (ROOT / mutant.path).read_text()
    mutated = mutant.apply(source)
    assert mutated != source
    assert mutant.name.startswith(f"{mutant.way}-") and mutant.description
    if mutant.path.endswith(".py"):
        ast.parse(mutated)


def test_there_are_enough_patches_in_every_way():
    ways = [mutant.way for mutant in BY_HAND]
    assert len(ways) >= 30
    assert all(ways.count(way) >= 8 for way in trial.CHECKS)
    assert set(command.QUICK) <= {mutant.name for mutant in BY_HAND}


def test_a_patch_finds_its_lines_where_they_have_moved_to():
    edit = Edit(line=1, old=("b\n",), new=("c\n",))
    mutant = Mutant("python-x", "x", "pyext/x.py", (edit,))
    assert mutant.apply("b\na\na\na\nb\n") == "c\na\na\na\nb\n"
    assert mutant.apply("a\na\nb\n") == "a\na\nc\n"
    with pytest.raises(PatchError, match="not there any more"):
        mutant.apply("a\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x\n--- a/a\n+++ b/a\n--- a/b\n+++ b/b\n", "2 files"),
        ("x\n--- a/a\n+++ b/a\n", "changes nothing"),
        ("x\n--- a/a\n+++ b/a\n@@ -1 +1 @@\n?\n", "no hunk"),
    ],
)
def test_what_is_no_patch_is_refused(tmp_path, text, reason):
    path = tmp_path / "broken.patch"
    path.write_text(text)
    with pytest.raises(PatchError, match=reason):
        patches.read(path)


# --- automatic mutants ---------------------------------------------------------------------------

CPP = """#include <a.h>  // 1 < 2
// a + b
template <class T>
void f(const T* x) {
  if (i < 3 && s == "1 + 1") __syncthreads();
  y = x[i * row_stride];
}
"""
PYTHON = '''"""1 < 2"""
import a
y = x + 10  # 3 - 4
s = f"{y}: 1 < 2"
'''


def changes(name: str, source: str, tmp_path: Path, seed: int = 0) -> list[str]:
    way = "triton" if name.endswith(".py") else "cuda"
    folder = tmp_path / ("kernels" if way == "triton" else "csrc/cuda")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
    mutants = list(generate.candidates(tmp_path, way, seed))
    for mutant in mutants:
        assert mutant.apply(source) != source
    return [mutant.description for mutant in mutants]


def test_tokens_of_cpp_are_changed_and_nothing_else(tmp_path):
    line = 'if (i < 3 && s == "1 + 1") __syncthreads();'
    assert set(changes("f.cu", CPP, tmp_path)) == {
        f"{line}  →  " + line.replace("i < 3", "i <= 3"),
        f"{line}  →  " + line.replace("3", "4"),
        f"{line}  →  " + line.replace("&&", "||"),
        f"{line}  →  " + line.replace("==", "!="),
        f"{line}  →  " + line.replace("__syncthreads();", ";"),
        "y = x[i * row_stride];  →  y = x[i + row_stride];",
        "y = x[i * row_stride];  →  y = x[i * column_stride];",
    }


def test_tokens_of_python_are_changed_and_nothing_else(tmp_path):
    assert [each for each in changes("f.py", PYTHON, tmp_path) if each[0] == "y"] == [
        "y = x + 10  # 3 - 4  →  y = x - 10  # 3 - 4",
        "y = x + 10  # 3 - 4  →  y = x + 11  # 3 - 4",
    ]


def test_the_seed_decides_and_edits_elsewhere_do_not(tmp_path):
    first = changes("f.cu", CPP, tmp_path)
    assert changes("f.cu", CPP, tmp_path) == first
    assert any(changes("f.cu", CPP, tmp_path, seed) != first for seed in (1, 2, 3))
    moved = changes("f.cu", "\n\n" + CPP, tmp_path)
    assert moved == first


@pytest.mark.parametrize("way", generate.SOURCES)
def test_the_kernels_have_automatic_mutants(way):
    mutants = list(generate.candidates(ROOT, way, 0))
    assert len(mutants) > 200
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    for mutant in mutants[:50]:
        assert mutant.way == way and not mutant.by_hand
        mutant.apply((ROOT / mutant.path).read_text())


# --- evidence ------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A scratch copy of one file and one library, and a run that used both."""
    for name in ("pyext/a.py", "pyext/_C_cpu.so"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    library = tmp_path / "pyext/_C_cpu.so"
    scratch = Scratch(
        tmp_path, built={"cpp": Built("pyext/_C_cpu.so", sha256(library), frozenset())}
    )
    files = (tmp_path / "pyext/a.py", library)
    run = Run("passed", None, "", 1, {str(path): sha256(path) for path in files})
    mutant = Mutant("python-a", "a", "pyext/a.py", ())
    return scratch, run, mutant


def test_evidence_is_the_mutated_file_and_the_library(copy):
    scratch, run, mutant = copy
    assert set(trial.check_evidence(scratch, run, ("cpp",), mutant)) == {
        "pyext/a.py",
        "pyext/_C_cpu.so",
    }


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run, root: run.loaded.clear(), "did not say"),
        (lambda run, root: run.loaded.update({__file__: sha256(__file__)}), "not in the scratch"),
        (lambda run, root: run.loaded.update({str(root / "pyext/a.py"): "0"}), "is not what it"),
        (lambda run, root: run.loaded.pop(str(root / "pyext/a.py")), "changed but not loaded"),
        (lambda run, root: run.loaded.pop(str(root / "pyext/_C_cpu.so")), "built but not loaded"),
    ],
)
def test_without_evidence_there_is_no_result(copy, spoil, reason):
    scratch, run, mutant = copy
    spoil(run.loaded and run, scratch.folder)
    with pytest.raises(NoEvidence, match=reason):
        trial.check_evidence(scratch, run, ("cpp",), mutant)


def test_a_mutant_outside_of_the_library_is_a_defect(copy, monkeypatch):
    scratch, _, _ = copy
    path = scratch.folder / "csrc/cpu/forgotten.h"
    path.parent.mkdir(parents=True)
    path.write_text("a\n")
    monkeypatch.setattr(Scratch, "build", lambda self, names: None)
    mutant = Mutant("cpp-x", "x", "csrc/cpu/forgotten.h", (Edit(0, ("a\n",), ("b\n",)),))
    row = trial.try_mutant(scratch, mutant, {"cpp": "0"}, {})
    assert row.status == "defect" and "no part of the library" in row.by
    assert path.read_text() == "a\n"


def test_a_copy_runs_its_own_files(tmp_path):
    scratch = Scratch.of_project(tmp_path / "copy", jobs=1)
    code = "import pyext, pyext.kernels; print(pyext.__file__); print(pyext.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(scratch.folder)},
        cwd=scratch.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.split():
        assert Path(line).resolve().is_relative_to(scratch.folder.resolve())


@pytest.mark.parametrize(
    ("body", "verdict", "test", "message"),
    [
        ("assert 1 == 2", "failed", "test_x.py::test_b", "assert 1 == 2"),
        ("os.abort()", "crashed", "test_x.py::test_b", "SIGABRT"),
        ("time.sleep(300)", "stopped", "test_x.py::test_b", "over 20 s"),
        ("x = b'1' * (1 << 30); time.sleep(300)", "stopped", "test_x.py::test_b", "GiB"),
        ("pass", "passed", None, ""),
    ],
    ids=["failed", "crashed", "hung", "memory", "passed"],
)
def test_how_tests_end(tmp_path, monkeypatch, body, verdict, test, message):
    # Longer than an import of PyTorch on a busy machine.
    monkeypatch.setattr(trial, "SLOWEST_TEST_S", 200 if "x =" in body else 20)
    monkeypatch.setattr(trial, "MOST_MEMORY", 1 << 30)
    text = f"import os, time\ndef test_a(): pass\ndef test_b(): {body}\n"
    (tmp_path / "test_x.py").write_text(text)
    run = trial.run_tests(Scratch(tmp_path), ["test_x.py"])
    assert (run.verdict, run.test) == (verdict, test)
    assert message in run.message and run.loaded
    assert run.passed == (2 if verdict == "passed" else 1)


def test_tests_that_somebody_else_killed_are_no_result(tmp_path):
    text = "import os, signal\ndef test_a(): os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "test_x.py").write_text(text)
    with pytest.raises(NoEvidence, match="not by this program"):
        trial.run_tests(Scratch(tmp_path), ["test_x.py"])


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """Replaces the trials: nothing is built, and each mutant's row is what the test says."""

    def use(row_of):
        def build(self, names):
            self.built |= {name: Built("", "0", frozenset()) for name in names}

        monkeypatch.setattr(Scratch, "build", build)
        monkeypatch.setattr(Scratch, "of_project", lambda folder, jobs: Scratch(folder, jobs))
        monkeypatch.setattr(Scratch, "clone", lambda self, folder: Scratch(folder, 1))
        monkeypatch.setattr(trial, "try_mutant", lambda scratch, mutant, *_: row_of(mutant))
        monkeypatch.setattr(trial, "run_tests", lambda *_: Run("passed", None, "", 7, {}))
        monkeypatch.setattr(trial, "check_evidence", lambda *_: {})
        monkeypatch.setattr(trial, "run_outputs", lambda *_: {"case": "0"})

    return use


def test_all_caught_is_exit_code_0(pretend, capsys, tmp_path):
    pretend(lambda mutant: Row(mutant, "caught", "tests/test_ops.py::test_x", "off by 1"))
    file = tmp_path / "rows.json"
    assert lab.main(["mutants", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"by hand: {len(BY_HAND)} of {len(BY_HAND)} caught" in out
    assert f"automatic: {len(BY_HAND)} of {len(BY_HAND)} caught" in out
    data = json.loads(file.read_text())
    assert len(data["rows"]) == 2 * len(BY_HAND) and not data["interrupted"]
    assert set(data["control"]) == set(trial.CHECKS)


@pytest.mark.parametrize("status", ["survived", "invalid", "defect", "equivalent"])
def test_a_patch_that_is_not_caught_is_exit_code_1(pretend, capsys, status):
    def row_of(mutant):
        return Row(mutant, status if mutant.name == BY_HAND[0].name else "caught", "t")

    pretend(row_of)
    assert lab.main(["mutants", "--automatic", "0"]) == 1
    assert status.upper() in capsys.readouterr().out


def test_a_failed_control_is_exit_code_1(pretend, capsys, monkeypatch):
    pretend(lambda mutant: Row(mutant, "caught", "tests/test_ops.py::test_x"))
    broken = Run("failed", "tests/test_ops.py::test_y", "off by 1", 3, {})
    monkeypatch.setattr(trial, "run_tests", lambda *_: broken)
    assert lab.main(["mutants", "--automatic", "0"]) == 1
    assert "failed in tests/test_ops.py::test_y: off by 1" in capsys.readouterr().out


def test_one_way_alone(pretend, tmp_path):
    pretend(lambda mutant: Row(mutant, "caught", "tests/test_ops.py::test_x"))
    file = tmp_path / "rows.json"
    assert lab.main(["mutants", "--way", "cuda", "--automatic", "3", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert {row["way"] for row in data["rows"]} == set(data["control"]) == {"cuda"}
    assert sum(row["kind"] == "automatic" for row in data["rows"]) == 3


def test_automatic_mutants_that_change_nothing_are_replaced(pretend, capsys):
    def row_of(mutant):
        harmless = not mutant.by_hand and int(mutant.name[-1], 16) % 2
        return Row(mutant, "equivalent" if harmless else "caught", "tests/test_ops.py::test_x")

    pretend(row_of)
    assert lab.main(["mutants", "--automatic", "20"]) == 0
    assert "automatic: 20 of 20 caught (and " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("way", ("cpp", "cuda", "triton"))
def test_the_outputs_of_the_original_can_be_made(way, tmp_path):
    """In a process that does nothing else, with every library that counts as evidence."""
    backend, file = trial.CHECKS[way].backend, tmp_path / "outputs.json"
    needed = "extension" if way == "triton" else backend
    if reason := BACKENDS[needed].unavailable("cpu"):
        pytest.skip(reason)
    if way == "triton":
        pytest.importorskip("triton")
    command = [sys.executable, "-m", "pyext.lab.mutants.outputs", backend, str(file)]
    variables = {"TRITON_INTERPRET": "1"} if way == "triton" else {}
    subprocess.run(command, env=os.environ | variables, check=True, timeout=600)
    said = json.loads(file.read_text())
    assert len(said["hashes"]) > 100
    loaded = {Path(path).name for path in said["loaded"]}
    assert "_C_cpu.so" in loaded
    if way == "cuda":
        assert "_C_emulated.so" in loaded


def test_without_the_outputs_of_the_original_no_automatic_mutant_is_judged(
    pretend, monkeypatch, tmp_path
):
    pretend(lambda mutant: Row(mutant, "caught", "tests/test_ops.py::test_x"))
    monkeypatch.setattr(trial, "run_outputs", lambda *_: None)
    file = tmp_path / "rows.json"
    assert lab.main(["mutants", "--way", "cuda", "--automatic", "2", "--json", str(file)]) == 1
    rows = [row for row in json.loads(file.read_text())["rows"] if row["kind"] == "automatic"]
    assert [row["status"] for row in rows] == ["defect"] * 2
    assert "the unmutated cuda library cannot be made" in rows[0]["by"]


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in (
        ["--only", "nothing"],
        ["--way", "nothing"],
        ["--jobs", "0"],
        ["--automatic", "-1"],
    ):
        with pytest.raises(SystemExit) as stop:
            lab.main(["mutants", *arguments])
        assert stop.value.code == 2
    assert "--list shows them" in capsys.readouterr().err


def test_without_the_sources_is_exit_code_3(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert lab.main(["mutants"]) == 3
    assert "mutants need the project's sources" in capsys.readouterr().err


def test_interrupted_keeps_the_finished_rows(pretend, capsys, tmp_path):
    def row_of(mutant):
        if mutant.name != BY_HAND[0].name:
            time.sleep(0.2)
        return Row(mutant, "caught", "tests/test_ops.py::test_x")

    pretend(row_of)
    file = tmp_path / "rows.json"
    timer = threading.Timer(1.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        assert lab.main(["mutants", "--automatic", "0", "--json", str(file)]) == 130
    finally:
        timer.cancel()
        trial._stopped.clear()
    assert "finished rows" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["interrupted"] and 0 < len(data["rows"]) < len(BY_HAND)


# --- for real ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_few_planted_bugs_are_caught(tmp_path):
    data = run_command(tmp_path, "--quick")
    assert len(data["rows"]) == len(command.QUICK)
    assert all(row["status"] == "caught" and row["evidence"] for row in data["rows"])


@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
def test_every_planted_bug_is_caught_or_explained(tmp_path):
    data = run_command(tmp_path)
    survivors = {
        (row["file"], row["description"]) for row in data["rows"] if row["status"] == "survived"
    }
    assert not survivors - set(command.explanations())


def run_command(folder: Path, *options: str) -> dict:
    file = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "pyext.lab", "mutants", "--json", str(file), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads(file.read_text())
