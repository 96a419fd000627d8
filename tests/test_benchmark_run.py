"""The main job, `benchmarks/run.py`: exit codes, files, and that nothing wrong ever gets a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyext import registry
from pyext.backends import BACKENDS, backends
from pyext.lab import __main__ as lab_main
from pyext.lab import bench, isolated, measure, report, results
from pyext.lab.bench import default_backends
from pyext.lab.cases import PREALLOCATED, Case
from pyext.lab.measure import Effort, Samples
from pyext.lab.peers import PEERS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "run.py"
TINY = Effort(warmup_s=0.0, measure_s=0.001, blocks=3)
TIMES = (
    "median_s",
    "p20_s",
    "p80_s",
    "interleaved_median_s",
    "alone_median_s",
    "ratio_vs_eager",
    "ratio_ci",
    "pct_of_floor",
)
needs_extension = pytest.mark.skipif(
    BACKENDS["extension"].unavailable("cpu") is not None,
    reason=f"extension: {BACKENDS['extension'].unavailable('cpu')}",
)


@pytest.fixture(scope="module")
def run():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmarks_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _flags():
    """A run turns TF32 off and may set the thread count for its whole process; one that was
    interrupted ignores a second Ctrl-C."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    threads, on_interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, on_interrupt)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_num_threads(threads)


def relu_run(run, folder: Path, *more: str) -> tuple[int, dict]:
    """A run of relu on one small shape; the exit code and the result file."""
    arguments = ["--device", "cpu", "--suite", "relu", "--shape", "4096", "--out", str(folder)]
    code = run.main([*arguments, *more], effort=TINY, alone=False)
    return code, results.load(folder)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--suite", "relu,tanh"], "--suite does not know 'tanh'; it accepts adadelta_step, "),
            (["--backend", "cuda"], "--backend does not know 'cuda'; it accepts eager, extension"),
            (["--peer", "numpy"], "--peer does not know 'numpy'; it accepts eager-inplace"),
            (["--dtype", "int8"], "--dtype does not know 'int8'; it accepts float64"),
            (["--suite", ""], "--suite does not know an empty list"),
            (["--shape", "4096x"], "does not understand '4096x'; it accepts positive numbers"),
            (["--shape", "0"], "does not understand '0'"),
            (
                ["--suite", "relu", "--shape", "4x4"],
                "--shape 4x4 fits none of the chosen suites: relu takes n",
            ),
            (
                ["--suite", "mnist", "--shape", "4"],
                "--shape 4 fits none of the chosen suites: none takes a shape",
            ),
            (["--threads", "0"], "'0' is not an integer of at least 1"),
            (["--threads", "many"], "'many' is not an integer of at least 1"),
            (["--seed", "-1"], "'-1' is not an integer from 0 to 2147483647"),
            (["--minutes", "0"], "'0' is not a number above 0"),
            (["--peer", "none,jax"], "--peer none stands alone"),
            (["--device", "tpu"], "--device"),
            (["--profile", "slow"], "'quick', 'full'"),
        ],
    )
    def test_wrong_usage_is_one_sentence_and_2(self, run, arguments, sentence, capsys):
        with pytest.raises(SystemExit) as stopped:
            run.main(["--device", "cpu", *arguments])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_cuda_without_a_gpu_is_one_sentence_and_3(self, run, capsys):
        assert run.main(["--device", "cuda"]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("--device cuda cannot be used here: ")

    def test_list_names_everything(self, run, capsys):
        assert run.main(["--device", "cpu", "--list"]) == 0
        out = capsys.readouterr().out
        for name in (*registry.ops(), "mnist", *default_backends(), *PEERS):
            assert name in out

    def test_the_folder_is_named_after_device_and_time(self, run):
        name = run._default_name(torch.device("cpu"))
        device, day, clock = name.rsplit("-", 2)
        assert device == device.lower() and "/" not in device and " " not in device
        assert len(day) == 8 and len(clock) == 6

    def test_an_unwritable_folder_is_a_sentence(self, run, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        code = run.main(
            ["--device", "cpu", "--suite", "relu", "--out", str(tmp_path / "file" / "x")]
        )
        assert code == 2
        assert "Cannot write to" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Exit code, result file and folder of a small run."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ("--backend", "eager,extension", "--peer", "eager-inplace,graph", "--seed", "3")
    return (*relu_run(run, folder, *arguments), folder)


class TestFiles:
    def test_every_row_has_every_field(self, finished):
        code, data, _ = finished
        assert code == 0
        assert data["schema"] == results.SCHEMA
        assert data["complete"] is True and data["interrupted"] is False
        for row in data["rows"]:
            assert list(row) == list(results.COLUMNS)
        # eager-inplace computes both directions at once and has no others.
        assert {(row["direction"], row["variant"]) for row in data["rows"]} == {
            (direction, variant)
            for direction in ("forward", "backward", "both")
            for variant in ("eager", "extension", "eager-inplace", "graph")
            if variant != "eager-inplace" or direction == "both"
        }

    def test_what_was_timed_was_verified(self, finished):
        _, data, _ = finished
        timed = [row for row in data["rows"] if row["status"] == "ok"]
        assert timed
        for row in timed:
            assert row["verified"] is True
            assert row["rel_err"] < 1e-5
            assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert row["clock"] == "host"
            low, high = row["ratio_ci"]
            assert low <= high
            assert row["floor_s"] > 0
            assert row["pct_of_floor"] == pytest.approx(100 * row["floor_s"] / row["median_s"])
            if row["variant"] == "eager":
                assert row["ratio_vs_eager"] == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_what_is_unavailable_says_why(self, finished):
        _, data, _ = finished
        rows = [row for row in data["rows"] if row["variant"] == "graph"]
        assert len(rows) == 3
        for row in rows:
            assert row["status"] == "unavailable"
            assert "need an NVIDIA GPU" in row["reason"]
            assert all(row[name] is None for name in TIMES)

    def test_the_environment_is_whole_and_names_nobody(self, finished):
        _, data, _ = finished
        environment = data["environment"]
        assert environment["seed"] == 3
        assert environment["threads"] == torch.get_num_threads()
        assert environment["flags"]["tf32"] is False
        assert environment["versions"]["torch"] == torch.__version__
        assert environment["cpu"]["model"] == environment["device"]
        assert set(environment["commit"]) == {"hash", "dirty"}
        text = json.dumps(data)
        assert socket.gethostname() not in text
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text

    def test_ceilings_name_what_reached_them(self, finished):
        _, data, _ = finished
        ceilings = data["ceilings"]
        every = [ceilings["copy"], *ceilings["fma"].values(), *ceilings["matrix"].values()]
        for ceiling in (*every, ceilings["launch"]["host"]):
            assert ceiling["value"] > 0
            assert ceiling["source"]

    def test_plots_and_tables_can_be_made_again(self, finished, capsys):
        _, data, folder = finished
        plots = {"time_relu.png", "ratio.png", "roofline.png"}
        assert plots <= {path.name for path in folder.iterdir()}
        for name in plots:
            (folder / name).unlink()
        assert lab_main.main(["report", str(folder), "--direction", "both"]) == 0
        assert plots <= {path.name for path in folder.iterdir()}
        out = capsys.readouterr().out
        assert out.count("| `relu` | both | 4096 | float32 |") == 1
        assert "forward" not in out.split("Measured")[0]
        assert f"Measured {data['started'][:10]} on {data['environment']['device']}" in out

    def test_plots_do_without_a_row_of_new_memory(self, finished, tmp_path):
        """Where the time was up before the op's other rows."""
        _, data, _ = finished
        rows = [{**row, "outputs": PREALLOCATED} for row in data["rows"]]
        paths = report.write_plots({**data, "rows": rows}, tmp_path)
        assert [path.name for path in paths] == ["ratio.png", "roofline.png"]


@needs_extension
class TestWrong:
    """A backend that is wrong gets a row that says so, no time, and exit code 1."""

    def plant(self, monkeypatch, function) -> None:
        op = dataclasses.replace(registry.get("relu"), function=function)
        monkeypatch.setitem(registry.ops(), "relu", op)

    def check(self, run, folder: Path, status: str, reason: str) -> None:
        code, data = relu_run(run, folder, "--backend", "eager,extension", "--peer", "none")
        assert code == 1
        rows = [row for row in data["rows"] if row["variant"] == "extension"]
        assert len(rows) == 3
        for row in rows:
            assert row["status"] == status
            assert row["verified"] is False
            assert reason in row["reason"]
            assert all(row[name] is None for name in TIMES)
        for row in data["rows"]:
            if row["variant"] == "eager":
                assert row["status"] == "ok" and row["median_s"] > 0

    def test_from_the_start(self, run, monkeypatch, tmp_path, capsys):
        self.plant(monkeypatch, lambda x, *, backend: torch.nn.functional.leaky_relu(x, 0.001))
        self.check(run, tmp_path, "wrong", "off by")
        assert "A result was wrong: extension in relu" in capsys.readouterr().out

    def test_only_after_a_while(self, run, monkeypatch, tmp_path):
        calls = 0

        def tiring(x, *, backend):
            nonlocal calls
            calls += 1
            return torch.relu(x) if calls <= 3 else x.clone()

        self.plant(monkeypatch, tiring)
        self.check(run, tmp_path, "wrong", "off by")
        first = next(row for row in results.load(tmp_path)["rows"] if row["variant"] == "extension")
        assert first["reason"].startswith("right before the timing, not after it")

    def test_only_on_the_small_shape_of_the_host_path(self, run, monkeypatch, tmp_path):
        calls = 0

        def tiring(x, *, backend):
            nonlocal calls
            calls += len(x) == 4096
            good = torch.relu(x)
            return good if len(x) != 4096 or calls <= right else good + 0 * x + 1

        self.plant(monkeypatch, tiring)
        more = ("--backend", "eager,extension", "--peer", "none", "--profile", "full")
        for right in (0, 1, 10**9):  # wrong at once, wrong while it is timed, right
            calls = 0
            code, data = relu_run(run, tmp_path, *more, "--shape", "64")
            timed = [row for row in data["rows"] if row["shape"] == [64]]
            assert {row["status"] for row in timed} == {"ok"}
            assert [row["status"] for row in data["rows"] if row["shape"] == [4096]] == (
                ["wrong"] if right < 10**9 else []
            )
            assert (code, len(data["host_path"])) == ((1, 0) if right < 10**9 else (0, 1))

    def test_the_host_path_keeps_to_the_time(self, run, tmp_path):
        more = ("--backend", "eager,extension", "--peer", "none", "--profile", "full")
        code, data = relu_run(run, tmp_path, *more, "--shape", "64", "--minutes", "0.0001")
        assert code == 0 and data["host_path"] == []
        assert any("1 of 1 small calls were not taken apart" in note for note in data["notes"])

    def test_that_raises(self, run, monkeypatch, tmp_path):
        def broken(x, *, backend):
            raise RuntimeError("the kernel fell over\nand more lines")

        self.plant(monkeypatch, broken)
        self.check(run, tmp_path, "error", "RuntimeError: the kernel fell over")


class TestProcesses:
    CASE = Case("relu", "both", (64,), "float32", "cpu")

    def test_a_variant_can_be_timed_alone(self):
        ((case, (outcome,)),) = isolated.time_apart([(self.CASE, ["eager"])], TINY, seed=0)
        assert case == self.CASE
        assert outcome.name == "eager" and outcome.status == "ok"
        assert isinstance(outcome.times["host"], Samples)
        assert outcome.times["host"].median > 0

    def test_every_variant_is_timed_alone_too(self, run, tmp_path):
        arguments = ["--device", "cpu", "--suite", "relu", "--shape", "64", "--out", str(tmp_path)]
        arguments += ["--backend", "eager,extension", "--peer", "eager-inplace"]
        assert run.main(arguments, effort=TINY, alone=True) == 0
        alone = {
            row["variant"]: row["alone_median_s"]
            for row in results.load(tmp_path)["rows"]
            if row["direction"] == "both" and row["outputs"] == "allocated" and row["verified"]
        }
        usable = [name for name in ("eager", "extension") if name in backends()]
        assert set(alone) == {*usable, "eager-inplace"}
        assert all(seconds > 0 for seconds in alone.values())

    @pytest.mark.parametrize(
        ("device", "limit_s", "groups"),
        [
            ("cpu", None, [["eager", "extension", "compile", "jax"]]),
            ("cpu", 60.0, [["eager", "extension"], ["compile", "jax"]]),
            ("cuda", None, [["eager"], ["extension"], ["compile"], ["jax"]]),
        ],
    )
    def test_who_is_there_at_the_same_time(self, device, limit_s, groups):
        settings = SimpleNamespace(device=torch.device(device), limit_s=limit_s)
        names = ["eager", "extension", "compile", "jax"]
        found = bench.Benchmark._groups_apart(SimpleNamespace(settings=settings), names)
        assert found == groups

    def test_those_apart_take_turns_at_each_case(self, run, monkeypatch, tmp_path):
        log = []
        monkeypatch.setattr(bench.Benchmark, "_groups_apart", lambda self, names: [names])

        def time_apart(jobs, effort, seed, limit_s):
            if jobs[0][0].outputs == PREALLOCATED:  # all variants in one process
                return
            name = jobs[0][1][-1]
            try:
                for case, _ in jobs:
                    log.append((name, case.op))
                    yield case, []
            finally:
                log.append((name, "end"))

        monkeypatch.setattr(isolated, "time_apart", time_apart)
        arguments = "--device cpu --suite relu,mse_loss --shape 64 --backend eager".split()
        arguments += ["--peer", "eager-inplace", "--out", str(tmp_path)]
        assert run.main(arguments, effort=TINY, alone=True) == 0
        first, second = log[0][1], log[2][1]
        assert log == [
            ("eager", first),
            ("eager-inplace", first),
            ("eager", second),
            ("eager-inplace", second),
            ("eager-inplace", "end"),
            ("eager", "end"),
        ]

    def test_an_exception_ends_those_apart(self, run, monkeypatch, tmp_path):
        ended, held = [], []

        def time_apart(jobs, effort, seed, limit_s):
            try:
                for case, _ in jobs:
                    yield case, []
            finally:
                ended.append(jobs[0][1])

        def interrupt(self, name, case, outcomes):
            if name == "eager-inplace":
                held.append(KeyboardInterrupt())  # whose traceback keeps what nobody has closed
                raise held[0]

        monkeypatch.setattr(isolated, "time_apart", time_apart)
        monkeypatch.setattr(bench.Benchmark, "_take_alone", interrupt)
        arguments = "--device cpu --suite relu,mse_loss --shape 64 --backend eager".split()
        arguments += ["--peer", "eager-inplace", "--out", str(tmp_path)]
        assert run.main(arguments, effort=TINY, alone=True) == 130
        assert ["eager"] in ended and ["eager-inplace"] in ended

    def test_a_process_ends_when_its_parent_is_gone(self):
        request = {"task": "time", "threads": 1, "seed": 0, "effort": dataclasses.asdict(TINY)}
        request |= {"cases": [self.CASE.to_json()], "variants": [["eager"]]}
        child = subprocess.run(
            [sys.executable, "-m", "pyext.lab.isolated"],
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (child.returncode, child.stdout) == (0, '"started"\n')

    def outcomes_of_one_that_dies(self, script, monkeypatch) -> tuple[list, int]:
        """Of three cases timed apart, in processes that run ``script``; and how many those were."""
        command, stream, starts = (sys.executable, "-c", script), isolated.stream, []

        def slowly(*args):
            starts.append(1)
            assert len(starts) <= 3
            for answer in stream(*args, command):
                yield answer
                time.sleep(1)  # in which it dies

        monkeypatch.setattr(isolated, "stream", slowly)
        jobs = [(dataclasses.replace(self.CASE, shape=(n,)), ["eager"]) for n in (1, 2, 3)]
        outcomes = [outcome for _, (outcome,) in isolated.time_apart(jobs, TINY, seed=0)]
        return outcomes, len(starts)

    def test_a_death_between_two_turns_is_charged_to_nobody(self, monkeypatch):
        script = (
            "import json, os, sys; request = json.loads(input()); print(0, flush=True)\n"
            "input(); print(json.dumps([{'name': 'eager', 'kind': 'backend', 'times': {}}]))\n"
            "sys.stdout.flush(); os._exit(9)"
        )
        outcomes, starts = self.outcomes_of_one_that_dies(script, monkeypatch)
        assert [each.status for each in outcomes] == ["ok"] * 3
        assert starts == 3

    def test_one_that_dies_before_its_first_turn_is_not_started_for_ever(self, monkeypatch):
        script = "import os; input(); print(0, flush=True); os._exit(9)"
        outcomes, _ = self.outcomes_of_one_that_dies(script, monkeypatch)
        assert [each.status for each in outcomes] == ["error"] * 3
        assert all("exit code 9" in each.reason for each in outcomes)

    def test_a_process_waits_for_its_turn(self, monkeypatch):
        answers, turns = [], iter([True, True, False])
        request = {"task": "time", "threads": torch.get_num_threads(), "seed": 0}
        request |= {"cases": 3 * [self.CASE.to_json()], "variants": 3 * [["eager"]]}
        request["effort"] = dataclasses.asdict(TINY)
        monkeypatch.setattr(isolated, "receive", lambda: (request, answers.append))
        monkeypatch.setattr(isolated, "wait_for_turn", lambda: next(turns))
        isolated.main()
        assert len(answers) == 1 + 2  # that it has started, and two cases

    def test_a_process_is_asked_when_the_answer_is_wanted(self):
        script = (
            "import time; from pyext.lab import isolated; _, send = isolated.receive(); send('0')\n"
            "while isolated.wait_for_turn(): send(str(time.time()))"
        )
        answers = isolated.stream({"turns": True}, command=(sys.executable, "-c", script))
        assert next(answers) == 0
        for _ in range(2):
            wanted = time.time()
            assert next(answers) >= wanted
            time.sleep(0.2)  # in which it would answer of itself
        answers.close()

    @pytest.mark.skipif(not measure.can_recycle_memory(), reason="needs glibc's malloc")
    def test_preallocated_outputs_are_timed_in_a_process_of_their_own(self, run, tmp_path):
        case = dataclasses.replace(self.CASE, shape=(2**20,))
        jobs = [
            (dataclasses.replace(case, outputs=PREALLOCATED), ["eager", "eager-inplace"]),
            (case, ["eager"]),
        ]
        (first, (alone,)), (second, both) = isolated.time_apart(jobs, TINY, seed=0)
        assert (first, second) == (case, jobs[0][0])
        assert [each.name for each in both] == ["eager", "eager-inplace"]
        assert {each.status for each in (alone, *both)} == {"ok"}

    def test_a_process_that_dies_says_how_and_another_goes_on(self, monkeypatch):
        """The second of three cases kills it: with a signal, or with Python's own words."""
        script = (
            "import json, os, sys; request = json.loads(input()); print(0, flush=True)\n"
            "for case in request['cases']:\n"
            "    if case['shape'] == [2]: ACTION\n"
            "    print(json.dumps([{'name': 'eager', 'kind': 'backend', 'times': {}}]), flush=True)"
        )
        jobs = [(dataclasses.replace(self.CASE, shape=(n,)), ["eager"]) for n in (1, 2, 3)]
        stream = isolated.stream
        for action, reason in (
            ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
            ("raise MemoryError('no room')", "ended with exit code 1: MemoryError: no room"),
        ):
            command = (sys.executable, "-c", script.replace("ACTION", action))
            monkeypatch.setattr(isolated, "stream", lambda *args: stream(*args, command))  # noqa: B023
            outcomes = [outcome for _, (outcome,) in isolated.time_apart(jobs, TINY, seed=0)]
            assert [each.status for each in outcomes] == ["ok", "error", "ok"]
            assert outcomes[1].reason == f"in a process of its own, which {reason}"

    def test_a_death_is_charged_to_who_dies_alone(self, monkeypatch):
        """Of three variants one kills the process; a peer that does is not to be had."""
        script = (
            "import json, os, sys; request = json.loads(input()); print(0, flush=True)\n"
            "for names in request['variants']:\n"
            "    if {'extension', 'jax'} & set(names): os._exit(7)\n"
            "    answer = [{'name': name, 'kind': 'backend', 'times': {}} for name in names]\n"
            "    print(json.dumps(answer if names != ['graph'] else []), flush=True)"
        )
        stream, command = isolated.stream, (sys.executable, "-c", script)
        monkeypatch.setattr(isolated, "stream", lambda *args: stream(*args, command))
        names = ["eager", "extension", "jax", "graph"]
        jobs = [(dataclasses.replace(self.CASE, shape=(n,)), names) for n in range(1, 6)]
        found = list(isolated.time_apart(jobs, TINY, seed=0))
        assert [case for case, _ in found] == [case for case, _ in jobs]
        for _, outcomes in found:  # the fifth as the first
            assert [(each.name, each.status) for each in outcomes] == [
                ("eager", "ok"),
                ("extension", "error"),
                ("jax", "unavailable"),
            ]
            assert outcomes[1].reason == "in a process of its own, which ended with exit code 7"

    def test_what_cannot_start_is_not_tried_for_ever(self, monkeypatch):
        starts, stream = [], isolated.stream

        def counted(*args):
            starts.append(1)
            yield from stream(*args, (sys.executable, "-c", "import no_such_module"))

        monkeypatch.setattr(isolated, "stream", counted)
        names = ["eager", "extension"]
        jobs = [(dataclasses.replace(self.CASE, shape=(n,)), names) for n in range(1, 9)]
        outcomes = [each for _, both in isolated.time_apart(jobs, TINY, seed=0) for each in both]
        assert [each.name for each in outcomes] == 8 * names and len(starts) == 1
        assert {each.status for each in outcomes} == {"error"}
        assert all("No module named 'no_such_module'" in each.reason for each in outcomes)

    def test_an_early_end_without_an_error_is_a_death(self, monkeypatch):
        stream, command = isolated.stream, (sys.executable, "-c", "input(); print(0)")
        monkeypatch.setattr(isolated, "stream", lambda *args: stream(*args, command))
        ((_, outcome),) = isolated.check_interpreted([self.CASE], seed=0)
        assert outcome.status == "error"
        assert outcome.reason == "in its interpreter's process, which ended before it had answered"

    def test_a_process_without_time_is_no_error(self, monkeypatch):
        stream, command = isolated.stream, (sys.executable, "-c", "import time; time.sleep(600)")
        monkeypatch.setattr(isolated, "stream", lambda *args: stream(*args, command))
        jobs = [(self.CASE, ["eager"])]
        assert list(isolated.time_apart(jobs, TINY, seed=0, limit_s=0.3)) == []

    @needs_extension
    @pytest.mark.parametrize("status", ["wrong", "error"])
    @pytest.mark.parametrize("guilty", ["eager", "extension"])
    def test_what_fails_only_alone_has_failed(
        self, run, monkeypatch, tmp_path, capsys, status, guilty
    ):
        def time_apart(jobs, effort, seed, limit_s):
            for case, names in jobs:
                assert guilty != "eager" or names in (["eager"], ["eager", "extension"])
                yield (
                    case,
                    [
                        isolated.Outcome(name, "backend", status, "off")
                        for name in names
                        if name == guilty
                    ],
                )

        monkeypatch.setattr(isolated, "time_apart", time_apart)
        arguments = ["--device", "cpu", "--suite", "relu", "--shape", "64", "--out", str(tmp_path)]
        arguments += ["--backend", "eager,extension", "--peer", "none"]
        assert run.main(arguments, effort=TINY, alone=True) == 1
        statuses = {
            row["variant"]: (row["status"], row["reason"], row["median_s"] is None)
            for row in results.load(tmp_path)["rows"]
            if row["direction"] == "both" and row["outputs"] == "allocated"
        }
        innocent = {"eager": "extension", "extension": "eager"}[guilty]
        assert statuses == {guilty: (status, "off", True), innocent: ("ok", None, False)}
        assert f"A result was wrong: {guilty} in relu" in capsys.readouterr().out
        assert lab_main.main(["report", str(tmp_path)]) == 0

    @needs_extension
    def test_a_failure_apart_says_so(self, monkeypatch):
        answer = {"name": "extension", "kind": "backend", "status": "wrong", "reason": "off"}
        monkeypatch.setattr(isolated, "stream", lambda *args: iter([0, [answer | {"times": {}}]]))
        ((_, (outcome,)),) = isolated.time_apart([(self.CASE, ["extension"])], TINY, seed=0)
        assert outcome.reason == "in a process of its own: off"

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
    def test_interpreted_rows_are_checked_and_have_no_time(self, run, tmp_path):
        code, data = relu_run(run, tmp_path, "--backend", "triton", "--peer", "none")
        assert code == 0
        rows = [row for row in data["rows"] if row["variant"] == "triton"]
        assert {row["direction"] for row in rows} == {"forward", "backward", "both"}
        for row in rows:
            assert row["status"] == "interpreted"
            assert row["verified"] is True
            assert row["rel_err"] is not None
            assert all(row[name] is None for name in (*TIMES, "clock", "floor_s"))

    def test_ctrl_c_keeps_the_finished_rows(self, tmp_path):
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import run; "
            "from pyext.lab.measure import Effort; "
            "sys.exit(run.main(sys.argv[2:], effort=Effort(0.2, 1.0, 5), alone=False))"
        )
        arguments = "--device cpu --suite relu,mse_loss --backend eager --peer none --out".split()
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(SCRIPT.parent), *arguments, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "150"},
        )
        try:
            finished = _wait_for_rows(process, tmp_path / "results.json", at_least=2)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130, out
        assert "finished rows are kept" in out
        data = results.load(tmp_path)
        assert data["interrupted"] is True and data["complete"] is False
        assert len(data["rows"]) >= finished
        assert all(row["status"] == "ok" and row["median_s"] > 0 for row in data["rows"])
        assert (tmp_path / "results.csv").exists()


def _wait_for_rows(process: subprocess.Popen, path: Path, at_least: int) -> int:
    """Waits until the file has that many rows; returns how many it has."""
    for _ in range(1200):
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}: {process.stdout.read()}")
        with contextlib.suppress(FileNotFoundError):
            rows = len(json.loads(path.read_text())["rows"])
            if rows >= at_least:
                return rows
        time.sleep(0.1)
    pytest.fail("no rows within two minutes")


class TestMnist:
    """The suite with the training left out."""

    @pytest.fixture
    def section(self, run, monkeypatch):
        """The suite's section, rows and notes, given what Triton's interpreter answered."""
        suite = sys.modules["mnist_suite"]
        parser = run._parser()
        options = parser.parse_args(["--suite", "mnist", "--device", "cpu"])
        settings = run._settings(parser, options, torch.device("cpu"), None, False)
        nothing = suite.compare.Comparison("digits", (), (), (), ())
        monkeypatch.setattr(suite.compare, "run", lambda *args, **kwargs: nothing)
        monkeypatch.setattr(suite.data, "load_or_digits", lambda name: (None, None))

        def of(answers, death=None, missing=None):
            monkeypatch.setattr(suite, "_interpreted_parity", lambda *args: (answers, death))
            monkeypatch.setattr(suite, "interpreter_missing", lambda: missing)
            return suite.run(settings, lambda what, done: None)

        return of

    def test_no_triton_is_a_reason(self, section):
        _, rows, notes = section([], missing="Triton is not installed")
        assert [(row["status"], row["reason"]) for row in rows if row["variant"] == "triton"] == [
            ("unavailable", "Triton is not installed")
        ] * 2
        assert notes == []

    @pytest.mark.parametrize("profile", ["quick", "full"])
    def test_minutes_bound_the_training(self, run, monkeypatch, tmp_path, profile):
        limits = []

        def mnist(settings, progress, limit_s):
            limits.append(limit_s)
            return {"data": "MNIST", "failed": False, "shares": [], "curves": []}, [], []

        monkeypatch.setattr(sys.modules["mnist_suite"], "run", mnist)
        arguments = ["--device", "cpu", "--suite", "mnist", "--profile", profile]
        arguments += ["--out", str(tmp_path)]
        for more in ([], ["--minutes", "2"]):
            assert run.main([*arguments, *more], effort=TINY, alone=False) == 0
        assert limits[0] is None and 100 < limits[1] < 120

    def test_other_data_names_the_folder_on_the_terminal_alone(
        self, run, monkeypatch, tmp_path, capsys
    ):
        suite = sys.modules["mnist_suite"]
        digits = dataclasses.replace(suite.data.load_digits(), title="digits")
        sentence = "MNIST is not in /some/folder/MNIST/raw. Using digits instead."
        nothing = suite.compare.Comparison("digits", (), (), (), ())
        monkeypatch.setattr(suite.compare, "run", lambda *args, **kwargs: nothing)
        monkeypatch.setattr(suite.data, "load_or_digits", lambda name: (digits, sentence))
        monkeypatch.setattr(suite, "_interpreted_parity", lambda *args: ([], None))
        monkeypatch.setenv("PYEXT_DATA", "/some/folder")
        arguments = ["--device", "cpu", "--suite", "mnist", "--out", str(tmp_path)]
        assert run.main(arguments, effort=TINY, alone=False) == 0
        out = capsys.readouterr().out
        assert "The data folder is /some/folder." in out
        assert "MNIST is not in the data folder/MNIST/raw. Using digits instead." in out
        assert "/some/folder" not in (tmp_path / "results.json").read_text()

    @pytest.mark.parametrize("death", [None, isolated.ProcessDied("was ended by SIGSEGV")])
    def test_an_interpreter_that_ends_early_is_a_row_and_a_note(self, section, death):
        answer = {"workload": "mnist_cnn", "backend": "triton", "batch_size": 2, "ok": True}
        answers = [
            {**answer, "check": "relu_bitwise", "distance": 0.0},
            {**answer, "check": "float64", "distance": 0.0},
            {**answer, "workload": "mnist_mlp", "check": "relu_bitwise", "distance": 0.0},
        ]
        _, rows, notes = section(answers, death)
        assert {row["op"]: row["status"] for row in rows if row["variant"] == "triton"} == {
            "mnist_cnn": "interpreted",
            "mnist_mlp": "error" if death else "skipped",
        }
        assert {row["data"] for row in rows} == {"digits"}
        assert len(rows) == 2 and len(notes) == 1 and notes[0].startswith("mnist_mlp, triton: not")
