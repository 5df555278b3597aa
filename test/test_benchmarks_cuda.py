"""The call that does everything which needs a GPU, as far as it goes without one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpytorch

pytest.importorskip("rich", reason="the benchmarks need the extra [benchmarks]: rich")
pytest.importorskip("matplotlib", reason="the benchmarks need the extra [benchmarks]: matplotlib")
pytest.importorskip("psutil", reason="the benchmarks need the extra [benchmarks]: psutil")

from test_benchmarks import make_rows

from benchmarks import cuda
from benchmarks.__main__ import main
from benchmarks.questions import graph, inverse, largest, launches, parity
from benchmarks.shared import machine, measuring, run
from benchmarks.shared import rows as record
from benchmarks.shared.options import Options
from benchmarks.shared.rows import Case, Row

JUNIT = """<testsuites><testsuite name="pytest" tests="5" failures="1" errors="1" skipped="2">
<testcase name="a"><failure message="wrong"/></testcase><testcase name="b"><error message="broken"/></testcase>
<testcase name="c"><skipped message="no CUDA device"/></testcase>
<testcase name="d"><skipped message="no CUDA device"/></testcase><testcase name="e"/>
</testsuite></testsuites>"""


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(Options, "seconds", 0.0)
    monkeypatch.setattr(measuring, "SETTLE", 0)


def row(question: str, provider: str = "tensors", mode: str = "step", **values) -> Row:
    return Row(
        Case(question, "synthetic", 20, 6, "float64", "cpu"), provider, mode, values=values, **machine.stamp("cpu")
    )


class TestCounting:
    def test_runtime_calls(self):
        names = ["cudaLaunchKernel"] * 3 + [
            "cudaLaunchKernelExC",
            "aten::mm",
            "cudaStreamSynchronize",
            "cudaMemcpyAsync",
        ]
        assert launches.count_runtime_calls(names) == {
            launches.LAUNCHES: 4,
            launches.WAITS: 1,
            launches.COPIES: 1,
        }

    def test_operators_that_others_call_are_theirs(self):
        events = [("aten::matmul", False), ("aten::mm", True), ("ProfilerStep*", False), ("aten::add_", False)]
        assert launches.count_operators(events) == 2

    def test_operators_of_a_profile(self):
        a = torch.eye(3)
        assert launches._counts(lambda: torch.matmul(a, a), "cpu") == {launches.OPERATORS: 1}

    def test_warnings(self):
        messages = ["called a synchronizing CUDA operation (Triggered internally at ...)", "jitter was added"]
        assert launches.count_warnings(messages) == 1

    def test_what_was_not_counted_is_a_dash(self):
        (table,) = launches.tables(
            [row("launches", operators=7), row("launches", provider="stock", operators=9, waits=2)]
        )
        assert table.lines == [["20", "tensors", "7", "-", "-", "-", "-"], ["20", "stock", "9", "-", "-", "-", "2"]]


class TestParity:
    def test_difference_is_told(self):
        same = row("parity", **dict.fromkeys(parity.WHAT, 1e-12))
        off, nan = (row("parity", **{**same.values, "covariance": wrong}) for wrong in (1e-3, float("nan")))
        assert [parity.differs(each) for each in (same, off, nan)] == [False, True, True]
        assert parity.tables([off])[0].lines[0][-1] == "DIFFERS"
        assert "tensors on cpu DIFFERS" in parity.remarks([same, off])[0]
        assert parity.remarks([same]) == ["All 1 comparisons with the CPU agree."]

    def test_batches_and_fantasies_are_compared(self):
        rows = parity.measure(
            Case("parity", "synthetic", 12, 3, "float64", "cpu", batch=2, m=4), Options(), lambda _: None
        )
        assert [each.provider for each in rows] == ["stock", "tensors"]
        assert all(set(each.values) == set(parity.WHAT) for each in rows) and not any(map(parity.differs, rows))


def test_inverses_are_compared(brief, tmp_path, capsys):
    words = ["inverse", "--quick", "--n", "130", "--dtype", "float64", "--output", str(tmp_path)]
    with gpytorch.settings.fast_computations(True, True, True):
        assert main(words) == 0
    providers = {each.provider for each in record.read(tmp_path / "inverse.json")}
    assert providers == {inverse.TORCH, inverse.SOLVES, inverse.PRODUCT, inverse.DOUBLED, "blocks from 128"}
    assert list(tmp_path.glob("*.png")) and "float64: the fastest is" in capsys.readouterr().out


class TestLargest:
    """A memory that holds 100,000 numbers."""

    @staticmethod
    def search(first: int, matrices: float, most: int = 10**9) -> tuple[dict, list[int]]:
        """Search where every step needs `matrices` n x n matrices and a library takes no more than `most` rows."""
        tried = []

        def attempt(n: int) -> tuple[float, float, str]:
            tried.append(n)
            fits = matrices * n**2 <= 100_000 and n <= most
            return (1.0, matrices, "") if fits else (0.0, 0.0, "out of memory")

        return largest.search(first, attempt, lambda matrices: int((95_000 / matrices) ** 0.5)), tried

    def test_n_grows_where_a_large_step_needs_less_than_the_small_one_promised(self):
        found, tried = self.search(first=200, matrices=1.0)
        assert tried == [200, 308] and found == {"refused": {}, "largest": 308, "seconds": 1.0, "matrices": 1.0}

    def test_n_shrinks_until_one_trains(self):
        found, tried = self.search(first=350, matrices=1.0)
        assert tried == [350, 322, 296, 308]
        assert found["largest"] == 308 and list(found["refused"]) == ["350", "322"]

    def test_n_that_was_refused_is_not_tried_again(self):
        found, tried = self.search(first=300, matrices=1.0, most=290)
        assert tried == [300, 276] and found["largest"] == 276

    def test_nothing_trains(self):
        found, tried = self.search(first=350, matrices=1.0, most=0)
        assert len(tried) == largest.TRIES and "largest" not in found
        (row_,) = [row("largest", **found)]
        assert largest.tables([row_])[0].lines[0][3] == "none of those tried"

    def test_want_of_memory_is_an_answer_and_not_an_error(self, monkeypatch):
        def fail(case, way):
            raise RuntimeError("can't allocate memory\nmore")

        monkeypatch.setattr(largest, "_first_step", fail)
        assert largest._try(row("largest").case, "stock") == (0.0, 0.0, "can't allocate memory")

    def test_question(self, tmp_path):
        with gpytorch.settings.fast_computations(True, True, True):
            assert main(["largest", "--quick", "--memory", "0.01", "--n", "9", "--output", str(tmp_path)]) == 0
        rows = record.read(tmp_path / "largest.json")
        assert [each.provider for each in rows] == ["stock", "tensors"]
        assert rows[0].values["largest"] < rows[1].values["largest"]


class TestCall:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
    def test_without_a_device_it_says_what_to_do(self, tmp_path, capsys):
        assert main(["cuda", "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert "The device 'cuda' cannot be used here" in err and "--device cpu --quick" in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_dry_run_goes_through_every_section(self, brief, tmp_path, monkeypatch, capfd):
        def tests(run):
            run.tests = {"tests": 3, "failed": 0, "skipped": 3, "reasons": ["no CUDA device on this machine"]}

        monkeypatch.setattr(cuda, "_run_tests", tests)
        monkeypatch.setattr(cuda, "QUICK_SIZES", (12,))
        monkeypatch.setattr(cuda, "GRAPH_MINUTES", 60.0)  # however busy the machine is, nothing is cut off
        monkeypatch.setattr(cuda.write, "__defaults__", (60.0,))
        with gpytorch.settings.fast_computations(True, True, True):
            assert main(["cuda", "--device", "cpu", "--quick", "--dtype", "float64", "--output", str(tmp_path)]) == 0
        page = (tmp_path / "cuda.md").read_text()
        for title in (*cuda.QUESTIONS.values(), *cuda.TIMED.values(), "Tests", "Environment"):
            assert title in page
        assert "This is a dry run on cpu" in page and "- skipped: no CUDA device on this machine" in page
        out = capfd.readouterr().out
        assert "kernel launches, copies and fills, synchronizing operators, waits are left out: cpu has none" in out
        assert f"{graph.GRAPHS} and {graph.CAPTURED} are left out" in out.replace("\n", " ")
        for line in page.splitlines():
            if line.startswith("!["):
                assert (tmp_path / line[line.index("(") + 1 : -1]).exists()
        assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"
        graphs = {each.provider for each in record.read(tmp_path / "graph.json")}
        assert graphs - {graph.COMPILED} == {"stock", "tensors"}
        assert graph.COMPILED in graphs or torch.__version__ < (2, 6)  # what does not work is left out by name

    def test_failure_of_a_section_leaves_the_others(self, tmp_path, monkeypatch, capsys):
        def broken(run):
            raise RuntimeError("an illegal memory access")

        def fine(run):
            run.rows["parity"] = [row("parity", **dict.fromkeys(parity.WHAT, 1.0))]

        monkeypatch.setattr(cuda, "_plan", lambda options: [("launches", broken), ("parity", fine)])
        assert cuda.write(Options(output=tmp_path)) == 1
        page = (tmp_path / "cuda.md").read_text()
        assert "The section 'launches' failed" in page and "RuntimeError: an illegal memory access" in page
        assert "Results differ from the CPU's." in page and "## Parity with the CPU" in page

    def test_outcome_of_the_tests(self, tmp_path):
        (tmp_path / "tests.xml").write_text(JUNIT)
        expected = {"tests": 5, "failed": 2, "skipped": 2, "reasons": ["no CUDA device"]}
        assert cuda.outcome(tmp_path / "tests.xml") == expected

    def test_small_n_and_what_nothing_else_tells_come_first(self):
        names = [name for name, _ in cuda._plan(Options(device="cuda"))]
        assert names[:3] == ["parity", "tests", "launches"]
        assert names.index("train, n = 50") < names.index("train, n = 10,000") < names.index("largest")
        assert names.index("train, n = 1,000") < names.index("graph") < names.index("train, n = 5,000")
        assert names.index("largest") < names.index("train, n = 20,000")
        assert "batch, n = 200" in names and "batch, n = 1,000" not in names

    def test_no_case_is_begun_when_the_time_is_up(self, tmp_path, capsys):
        question = SimpleNamespace(
            __name__="benchmarks.toy",
            cases=lambda options: [Case("toy", "x", n, 1, "float64", "cpu") for n in (1, 2)],
            measure=lambda case, options, advance: make_rows("toy", (case.n,)),
        )
        assert run.answer(question, Options(output=tmp_path, quick=True), until=0.0) == []
        assert "toy x n=2 float64: left out, as the time is up." in capsys.readouterr().out
        assert len(run.answer(question, Options(output=tmp_path, quick=True))) == 4


def test_environment_of_the_tests_is_this_checkout() -> None:
    assert (Path(cuda.ROOT) / "test" / "test_cuda.py").exists()
