"""The benchmarks: what they read, what they keep, what they write. No test looks at how fast anything is."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import gpytorch

pytest.importorskip("rich", reason="the benchmarks need the extra [benchmarks]: rich")
pytest.importorskip("matplotlib", reason="the benchmarks need the extra [benchmarks]: matplotlib")
pytest.importorskip("psutil", reason="the benchmarks need the extra [benchmarks]: psutil")


from benchmarks import report
from benchmarks.__main__ import QUESTIONS, main
from benchmarks.questions import accuracy, attribution, ax, fantasies, threshold, train, uci
from benchmarks.shared import machine, measuring, peak, pools, run, ways
from benchmarks.shared import rows as record
from benchmarks.shared.apart import measure_apart, run_apart
from benchmarks.shared.data import load
from benchmarks.shared.options import InputError, Options
from benchmarks.shared.rows import Case, Row
from benchmarks.shared.tables import Table, markdown_table

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take longer than the work there is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_rows(question: str = "uci", sizes=(20, 40), commit: str = "abc") -> list[Row]:
    values = {
        "loss": 1.0,
        "rmse": 0.5,
        "nll": 0.7,
        "hyperparameter_difference": 0.0,
    }
    return [
        Row(
            Case(question, "iris", n, 3, "float64", "cpu", settings="20 steps; split 0"),
            provider=way,
            mode="step",
            p20=speed * n * 0.9,
            p50=speed * n,
            p80=speed * n * 1.1,
            peak_memory=1000,
            values=values,
            versions={"python": "3", "torch": "2"},
            machine={"cpu": "a processor", "threads": 2},
            commit=commit,
            date="2000-01-01",
        )
        for n in sizes
        for way, speed in (("stock", 2e-3), ("tensors", 1e-3))
    ]


def fill(mebibytes: int):
    return lambda: torch.ones(mebibytes * 2**17, dtype=torch.float64).sum()


class TestWhatTheUserGives:
    @pytest.fixture
    def table(self, tmp_path):
        def write(text: str) -> Path:
            path = tmp_path / "table.csv"
            path.write_text(text)
            return path

        return write

    good = "a,b,y\n" + "\n".join(f"{i},{i * i % 7},{i % 5}" for i in range(30)) + "\n"

    def test_table(self, table):
        (data,) = load(Options(csv=table(self.good), target="y"))
        assert data.name == "table"
        assert data.train_x.shape == (24, 2) and data.test_x.shape == (6, 2)
        np.testing.assert_allclose(data.train_x.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(data.train_x.std(0), 1)
        np.testing.assert_allclose([data.train_y.mean(), data.train_y.std()], [0, 1], atol=1e-12)

    def test_constant_input_is_kept_as_zero(self, table):
        text = "a,b,y\n" + "\n".join(f"{i},3,{i % 5}" for i in range(30))
        (data,) = load(Options(csv=table(text), target="y"))
        assert (data.train_x[:, 1] == 0).all() and (data.test_x[:, 1] == 0).all()

    @pytest.mark.parametrize(
        "text, target, message",
        [
            ("a,b,y\n1,x,3\n2,z,4\n", "y", "too few rows: 2, and at least 10"),
            (good.replace("3,2,3\n", "3,red,3\n"), "y", "column 'b' holds text ('red')"),
            (
                good.replace("3,2,3\n", "3,,3\n"),
                "y",
                "column 'b' has 1 missing or infinite value(s), first in data row 4",
            ),
            (good.replace("3,2,3\n", "3,inf,3\n"), "y", "column 'b' has 1 missing or infinite"),
            (good.replace("3,2,3\n", "3,2,nan\n"), "y", "column 'y' has 1 missing or infinite"),
            ("a,y\n" + "".join(f"{i},7\n" for i in range(30)), "y", "the target is constant (7)"),
            (good, "price", "no column 'price'; it has a, b, y"),
            (good, None, "Name the column to predict with --target"),
            ("y\n" + "".join(f"{i}\n" for i in range(30)), "y", "no column but the target"),
            ("1,2\n" + "".join(f"{i},{i}\n" for i in range(30)), "2", "no header"),
            ("", "y", "is empty"),
            ("a,y\n" + "1,2,3\n" * 20, "y", "more values than its header has names"),
            ("a,y\n1,2\n1,2,3\n" * 20, "y", "not a table"),
        ],
    )
    def test_bad_table(self, table, text, target, message, capsys):
        words = ["uci", "--csv", str(table(text))] + (["--target", target] if target else [])
        self.expect(words, message, capsys)

    @staticmethod
    def expect(words, message, capsys):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and "Traceback" not in err
        assert out == ""

    def test_missing_table(self, tmp_path, capsys):
        self.expect(["--csv", str(tmp_path / "none.csv"), "--target", "y"], "There is no file", capsys)
        self.expect(["--csv", str(tmp_path), "--target", "y"], "is a folder", capsys)

    def test_table_that_is_not_text(self, tmp_path, capsys):
        (tmp_path / "t.csv").write_bytes(bytes(range(128, 256)) * 10)
        self.expect(["--csv", str(tmp_path / "t.csv"), "--target", "y"], "not a table", capsys)

    def test_contradictions(self, tmp_path, capsys):
        self.expect(["--csv", "a.csv", "--data", "b"], "not both", capsys)
        self.expect(["--target", "y"], "--csv FILE", capsys)
        self.expect(["--sets", "iris,moon"], "No data set called moon; there are iris, diabetes, digits", capsys)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
    def test_missing_device(self, capsys):
        self.expect(["--device", "cuda"], "The device 'cuda' cannot be used here", capsys)

    def test_unknown_device(self, capsys):
        self.expect(["--device", "abacus"], "The device 'abacus' cannot be used here", capsys)

    @pytest.mark.parametrize(
        "words",
        [["poker"], ["--n", "0"], ["--n", "ten"], ["--dtype", "float16"], ["--kernel", "x"], ["--memory", "-1"]],
    )
    def test_bad_words(self, words, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


class TestFolder:
    @staticmethod
    def write(folder: Path, values: np.ndarray, mask: np.ndarray) -> None:
        folder.mkdir()
        for name, array in (("data", values), ("test_mask", mask)):
            with gzip.open(folder / f"{name}.csv.gz", "wt") as file:
                np.savetxt(file, array, delimiter=",")

    @pytest.fixture
    def folder(self, tmp_path):
        rng = np.random.default_rng(0)
        mask = np.zeros((30, 2))
        mask[:5, 0] = mask[5:12, 1] = 1
        self.write(tmp_path / "small", rng.normal(size=(30, 4)), mask)
        return tmp_path

    def test_split(self, folder):
        assert [len(load(Options(data=folder, split=s))[0].test_y) for s in (0, 1)] == [5, 7]
        assert load(Options(data=folder / "small"))[0].name == "small"

    def test_complaints(self, folder, tmp_path):
        for options, message in (
            (Options(data=tmp_path / "none"), "There is no folder"),
            (Options(data=folder, split=2), "splits 0 to 1; there is no split 2"),
            (Options(data=folder, sets=("large",)), "No data set called large; there are small"),
        ):
            with pytest.raises(InputError, match=message):
                load(options)
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"no sub-folder with a data\.csv\.gz"):
            load(Options(data=tmp_path / "empty"))
        (folder / "small" / "test_mask.csv.gz").unlink()
        with pytest.raises(InputError, match=r"There is no file .*test_mask"):
            load(Options(data=folder))

    def test_mask_of_another_length(self, tmp_path):
        self.write(tmp_path / "odd", np.eye(12), np.ones((3, 1)))
        with pytest.raises(InputError, match=r"has 3 rows, and data\.csv\.gz beside it has 12"):
            load(Options(data=tmp_path))

    @pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the folder shared/data does not lie beside the checkout")
    def test_real_data(self):
        found = {data.name: data for data in load(Options(data=REAL_DATA))}
        assert set(found) == {"energy", "concrete", "airfoil", "wine", "pol", "elevators", "bike"}
        assert len(found["energy"].train_y) + len(found["energy"].test_y) == 768
        assert found["pol"].train_x.shape[1] == 26
        assert all(np.isfinite(data.train_x).all() and np.isfinite(data.test_x).all() for data in found.values())


class TestRecord:
    def test_schema(self):
        row = make_rows()[0]
        flat = json.loads(json.dumps(row.as_dict()))
        assert Row.from_dict(flat) == row
        asked = "question provider n d batch dtype device mode p20 p50 p80 peak_memory versions machine commit date"
        assert set(asked.split()) <= set(flat)

    def test_conditions_name_no_host(self):
        import platform

        stamp = machine.stamp("cpu")
        assert set(stamp["versions"]) >= {"python", "torch", "gpytorch", "linear_operator", "overlay"}
        assert stamp["machine"]["threads"] == torch.get_num_threads() and stamp["machine"]["cpu"]
        host = platform.node()
        assert not host or host not in json.dumps(stamp).split('"')

    def test_file(self, tmp_path):
        path = tmp_path / "folder" / "rows.json"
        assert record.read(path) == []
        record.write(path, make_rows())
        assert record.read(path) == make_rows()
        path.write_text("[{]")
        with pytest.raises(InputError, match="move it away"):
            record.read(path)

    def test_other_commit_is_not_reused(self):
        rows = make_rows()
        now = rows[0]
        assert record.recall(rows, now.case, now) == rows[:2]
        assert record.recall(rows, now.case, dataclasses.replace(now, commit="def")) == []
        assert record.recall(rows, now.case, dataclasses.replace(now, machine={"cpu": "another"})) == []
        assert record.recall(rows, now.case, dataclasses.replace(now, versions={"torch": "3"})) == []

    def test_new_rows_take_the_place_of_old_ones(self):
        new = make_rows(commit="def")[:2]
        assert record.supersede(make_rows(), new) == make_rows()[2:] + new

    def test_interrupted_run_goes_on(self, tmp_path):
        measured = []

        def measure(case, options, advance):
            if len(measured) == 1 and not options.fresh:
                measured.append("interrupted")
                raise KeyboardInterrupt
            measured.append(case.n)
            return [Row(case, provider="stock", mode="step", p50=1.0, **machine.stamp("cpu"))]

        question = SimpleNamespace(
            __name__="benchmarks.toy",
            cases=lambda options: [Case("toy", "x", n, 1, "float64", "cpu") for n in (1, 2, 3)],
            measure=measure,
        )
        options = Options(output=tmp_path, quick=True)
        with pytest.raises(KeyboardInterrupt):
            run.answer(question, options)
        assert [row.case.n for row in record.read(tmp_path / "toy.json")] == [1]
        assert [row.case.n for row in run.answer(question, options)] == [1, 2, 3]
        assert measured == [1, "interrupted", 2, 3]
        run.answer(question, options)
        assert measured == [1, "interrupted", 2, 3]
        run.answer(question, Options(output=tmp_path, quick=True, fresh=True))
        assert measured == [1, "interrupted", 2, 3, 1, 2, 3]
        assert len(record.read(tmp_path / "toy.json")) == 3

    def test_interrupt_that_a_library_swallows_stops_the_run_after_the_case(self, tmp_path):
        def measure(case, options, advance):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return [Row(case, provider="stock", mode="step", p50=1.0, **machine.stamp("cpu"))]

        question = SimpleNamespace(
            __name__="benchmarks.toy",
            cases=lambda options: [Case("toy", "x", n, 1, "float64", "cpu") for n in (1, 2)],
            measure=measure,
        )
        handler = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            with pytest.raises(KeyboardInterrupt):
                run.answer(question, Options(output=tmp_path, quick=True))
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, handler)
        assert [row.case.n for row in record.read(tmp_path / "toy.json")] == [1]


class TestMeasuring:
    def test_case_is_measured_in_a_process_of_its_own(self):
        case = Case("train", train.FREED, 12, 2, "float64", "cpu", settings="quick")
        rows, said = measure_apart("benchmarks.questions.train", case, Options(quick=True))
        assert [row.provider for row in rows] == [*train.PROVIDERS, train.FLOOR]
        assert all(row.p50 > 0 and row.case == case for row in rows)
        assert rows[0].machine == machine.machine("cpu")
        assert said == ""

    def test_what_a_process_of_its_own_raises_is_raised(self):
        case = Case("train", train.SYNTHETIC, 12, 2, "float64", "cpu", kernel="no such kernel")
        with pytest.raises(KeyError, match="no such kernel"):
            measure_apart("benchmarks.questions.train", case, Options(quick=True))

    def test_only_full_runs_on_cpu_have_processes_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run, "measure_apart", lambda question, case, options: (["apart"], "said"))
        monkeypatch.setattr(record, "write", lambda path, rows: None)
        question = SimpleNamespace(
            __name__="benchmarks.toy",
            cases=lambda options: [Case("toy", "x", 1, 1, "float64", "cpu")],
            measure=lambda case, options, advance: ["beside"],
        )
        monkeypatch.setattr(record, "supersede", lambda recorded, known: recorded)
        for quick, expected in ((True, "beside"), (False, "apart")):
            assert run.answer(question, Options(output=tmp_path, quick=quick)) == [expected]

    def test_steps_after_larger_matrices_have_a_table_of_their_own(self):
        cases = train.cases(Options(sizes=(20, 500), dtypes=("float64",), kernels=("rbf",)))
        named = [(case.case, case.n) for case in cases]
        assert named == [(train.SYNTHETIC, 20), (train.SYNTHETIC, 500), (train.FREED, 500)]
        rows = [
            Row(case, provider=name, mode="step", p20=1.0, p50=1.0, p80=1.0, **machine.stamp("cpu"))
            for case in cases
            for name in (*train.PROVIDERS, train.FLOOR)
        ]
        tables = train.tables(rows)
        assert [len(table.lines) for table in tables] == [2, 1]
        assert [train.FREED in table.title for table in tables] == [False, True]

    def test_variants_take_turns(self, monkeypatch):
        monkeypatch.setattr(measuring, "SETTLE", 0)
        calls = []
        variants = {
            "a": measuring.Variant(lambda: calls.append("a")),
            "b": measuring.Variant(lambda: calls.append("b"), prepare=lambda: calls.append("-")),
        }
        times = measuring.in_turn(variants, "cpu", seconds=0, least=3)
        assert calls == ["a", "-", "b"] + ["a", "a", "-", "b", "-", "b"] * 3
        assert [len(t) for t in times.values()] == [3, 3]

    def test_spread(self):
        assert measuring.spread([3.0, 1.0, 2.0, 4.0, 5.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}

    def test_peak_counts_what_is_released_again(self):
        def work():
            a = torch.ones(1000, 1000, dtype=torch.float64)
            b = a + a
            del a
            return b.exp_().sum()

        trace = peak.trace_bytes(work, "cpu")
        assert 16_000_000 <= max(trace) < 16_100_000
        assert trace[-1] < 1000
        assert peak.python_peak_bytes(lambda: np.ones(10**6)) >= 8_000_000

    @pytest.mark.skipif(not peak.STATUS.exists(), reason="the system keeps no record of the largest resident set")
    def test_resident_peak_is_of_the_work_alone(self):
        before, after = peak.resident_peaks(fill, 30)
        assert 25 * 2**20 < after - before < 60 * 2**20

    def test_disagreement_stops_the_clock(self):
        right = torch.tensor([1.0, 2.0])
        assert measuring.check_same({"a": right, "b": right}, "float64", "loss") == {"a": 0, "b": 0}
        for wrong in (right + 1e-3, right * float("nan")):
            with pytest.raises(measuring.Disagreement, match="loss: b differs from a"):
                measuring.check_same({"a": right, "b": wrong}, "float64", "loss")


class TestShowing:
    def test_markdown(self):
        text = markdown_table(Table("title", ["a", "b"], [["1", "2"]], "caption"))
        assert text == "**title**\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\ncaption"

    def test_main_job_tables_and_pictures(self, tmp_path):
        rows = make_rows()
        time, result = uci.tables(rows)
        assert [line[:3] for line in time.lines] == [
            ["iris", "20", "stock"],
            ["", "", "tensors"],
            ["iris", "40", "stock"],
            ["", "", "tensors"],
        ]
        assert [line[4] for line in time.lines] == ["1.00", "2.00"] * 2
        assert result.lines[1][-1] == "same (0e+00)"
        assert [path.read_bytes()[:4] for path in uci.pictures(rows, tmp_path)] == [PNG]
        assert uci.remarks(rows) == []

    def test_other_hyperparameters_are_told(self):
        rows = make_rows()
        rows[1].values["hyperparameter_difference"] = 0.5
        assert "DIFFER (5e-01)" in uci.tables(rows)[1].lines[1][-1]
        assert "found other hyperparameters than stock" in uci.remarks(rows)[0]


def test_main_job_from_the_command_line(tmp_path):
    words = ["--quick", "--n", "20", "--steps", "3", "--sets", "iris", "--output"]
    command = [sys.executable, "-m", "benchmarks", *words, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Training on real data" in done.stdout and "iris" in done.stdout
    rows = record.read(tmp_path / "uci.json")
    assert [row.provider for row in rows] == list(uci.PROVIDERS)
    assert all(row.p20 <= row.p50 <= row.p80 and row.peak_memory > 0 for row in rows)
    assert all(row.values["hyperparameter_difference"] < 1e-6 for row in rows)
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize(
    "question, words",
    [
        ("train", "--kernel matern52 --dtype float32"),
        ("kernels", "--sets 'RBF,polynomial,linear,variational GP'"),
        ("attribution", "--kernel rbf"),
        ("memory", "--memory 1,2"),
        ("predict", ""),
        ("fantasies", "--dtype float64,float32"),
        ("batch", ""),
        ("bo", "--only tasks,outputs,qMES,samples,loop"),
        ("threshold", "--n 850 --dtype float64"),
        ("peers", "--kernel matern"),
        ("accuracy", "--dtype float64"),
        ("limits", "--dtype float64"),
    ],
)
def test_question(question, words, tmp_path, monkeypatch, capsys):
    if question == "bo":
        pytest.importorskip("botorch", reason="BoTorch is not installed")
    monkeypatch.setattr(Options, "seconds", 0.0)
    monkeypatch.setattr(measuring, "SETTLE", 0)
    with gpytorch.settings.fast_computations(True, True, True):  # importing BoTorch switches them off for good
        status = main([question, "--quick", "--n", "12", *shlex.split(words), "--output", str(tmp_path)])
    assert status == 0
    rows = record.read(tmp_path / f"{question}.json")
    assert {"stock", "tensors"} <= {row.provider for row in rows}
    assert {row.case.question for row in rows} == {question}
    assert all(row.p20 <= row.p50 <= row.p80 for row in rows if row.p50 is not None)
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(path.read_bytes()[:4] == PNG for path in pictures)
    assert QUESTIONS[question] and capsys.readouterr().out


def test_pictures_are_of_all_rows_on_record(tmp_path):
    shown = []
    question = SimpleNamespace(tables=lambda rows: [], pictures=lambda rows, folder: shown.extend(rows) or [])
    recorded = make_rows(sizes=(20, 40))
    record.write(tmp_path / "uci.json", recorded)
    run.show(question, [row for row in recorded if row.case.n == 20], Options(output=tmp_path))
    assert shown == recorded


@pytest.mark.parametrize("outputs", [1, 2])
def test_posterior_by_hand_is_the_posterior(outputs):
    """At candidates alone and behind the training points, whole and by rows."""
    pytest.importorskip("botorch", reason="BoTorch is not installed")
    from benchmarks.questions import bo

    case = Case("bo", bo.STEP, 12, bo.D, "float64", "cpu")
    x, y = bo._observations(case, outputs)
    by_hand, model = bo._GPByHand(x, y).eval(), bo.SingleTaskGP(x, y).eval()
    by_hand.observed = x
    candidates = torch.rand(5, 3, bo.D, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for points in (candidates, torch.cat([x.expand(5, -1, -1), candidates], dim=-2)):
        for noise in (False, True):
            ours, theirs = (m.posterior(points, observation_noise=noise) for m in (by_hand, model))
            for name in ("mean", "variance"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-8, atol=1e-8)
            covar, expected = (p.distribution.lazy_covariance_matrix for p in (ours, theirs))
            torch.testing.assert_close(covar.to_dense(), expected.to_dense(), rtol=1e-8, atol=1e-8)
            if outputs == 1:
                torch.testing.assert_close(covar[..., -3:, :].to_dense(), expected.to_dense()[..., -3:, :])


def test_posterior_by_hand_of_a_list_of_models_is_the_posterior():
    pytest.importorskip("botorch", reason="BoTorch is not installed")
    from benchmarks.questions import bo

    x, y = bo._observations(Case("bo", bo.STEP, 12, bo.D, "float64", "cpu"), 2)
    by_hand, models = (bo._model_list(kind, x, y).eval() for kind in (bo._GPByHand, bo.SingleTaskGP))
    candidates = torch.rand(5, 3, bo.D, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for observed in (None, x):
        for model in by_hand.models:
            model.observed = observed
        for points in (candidates, torch.cat([x.expand(5, -1, -1), candidates], dim=-2)):
            ours, theirs = (m.posterior(points).distribution.lazy_covariance_matrix for m in (by_hand, models))
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=1e-8, atol=1e-8)
            rows = ours.base_linear_op[..., -3:, :].to_dense()
            torch.testing.assert_close(rows, theirs.base_linear_op.to_dense()[..., -3:, :], rtol=1e-8, atol=1e-8)


def test_only_picks_cases_by_their_names(capsys):
    cases = [Case("toy", name, 1, 1, "float64", "cpu") for name in ("a fit", "LogEI", "qLogEI")]
    assert run._chosen(cases, None) == cases
    assert run._chosen(cases, ("logei",)) == cases[1:]
    assert run._chosen(cases, ("fit", "qlog")) == [cases[0], cases[2]]
    with pytest.raises(InputError, match="No case is called anything with loop in it; there are a fit; LogEI; qLogEI"):
        run._chosen(cases, ("loop",))


class TestAx:
    def test_left_out_by_name(self, monkeypatch, capsys):
        monkeypatch.setattr(ax, "find_spec", lambda name: None)
        assert main(["ax"]) == 2
        assert "ax is left out, as it needs Ax: python -m pip install ax-platform" in capsys.readouterr().err

    def test_time_is_of_the_innermost_package(self):
        scipy, botorch = (pytest.importorskip(name).__path__[0] for name in ("scipy", "botorch"))
        pytest.importorskip("ax")
        frames = [
            [f"f\0{folder}/x.py\x001" for folder in folders]
            for folders in ([botorch, scipy], [scipy, botorch, "/usr/lib"], ["/usr/lib"])
        ]
        frames.append([f"f\0{botorch}/x.py\x001", f"f\0{torch.autograd.graph.__file__}\x001"])
        shares = ax._shares([(stack, 0.5) for stack in frames])
        assert shares == {"GPyTorch": 0, "BoTorch": 0.25, "SciPy": 0.25, "Ax": 0.25, ax.BACKWARD: 0.25}

    def test_rows_of_both_ways(self, tmp_path, monkeypatch):
        pytest.importorskip("ax")
        asked = []

        def run_apart(work, space, trials, seed, is_profiled, environment):
            asked.append((space, is_profiled, environment))
            speed = 1 if environment["GPYTORCH_USE_TORCH_TENSORS"] == "on" else 2
            shares = dict.fromkeys((*ax.PACKAGES, ax.BACKWARD), 0.2) if is_profiled else {}
            return ax.Loop([0.5 * speed] * 5 + [9.0] + [speed] * 8, 5, 1.0, shares)

        monkeypatch.setattr(ax, "run_apart", run_apart)
        monkeypatch.setattr(ax, "find_spec", lambda name: name)
        (case,) = [c for c in ax.cases(Options()) if c.case == "mixed space with OPENBLAS_NUM_THREADS=1"]
        rows = ax.measure(case, Options(), lambda fraction: None)
        assert [(row.provider, row.mode, row.p50) for row in rows] == [
            ("stock", ax.FIRST, 9),
            ("stock", ax.OTHERS, 21),
            ("tensors", ax.FIRST, 9),
            ("tensors", ax.OTHERS, 10.5),
        ]
        assert len(asked) == 2 * ax.ROUNDS + 2
        assert all(space == ax.MIXED and said["OPENBLAS_NUM_THREADS"] == "1" for space, _, said in asked)
        first, others, shares = ax.tables(rows)
        assert [table.lines[0][-1] for table in (first, others)] == ["1.00", "2.00"] and len(shares.lines) == 2
        assert "2.00 times as fast" in ax.remarks(rows)[0] and len(ax.pictures(rows, tmp_path)) == 1

    def test_loop(self):
        for name in ("ax", "pyinstrument"):
            pytest.importorskip(name)
        ran = run_apart(ax.loop, ax.MIXED, 7, 0, True, environment={"GPYTORCH_USE_TORCH_TENSORS": "on"})
        assert len(ran.seconds) == 7 and 0 < ran.first < 6
        assert 0 < ran.best < 3.33 and sum(ran.shares.values()) == pytest.approx(1)
        assert ran.shares["GPyTorch"] > 0.05 and ran.shares["BoTorch"] > 0.05


@pytest.mark.parametrize("way, border", [("stock", False), ("tensors", True)])
def test_fantasies_border_a_factor_in_one_of_the_ways(way, border):
    (case, query) = fantasies.cases(Options(sizes=(12,)))
    assert (case.case, query.case) == (fantasies.MAKING, fantasies.FIRST)
    with gpytorch.settings.fast_computations(True, True, True):
        make = fantasies.maker_of(case, way)
        assert ways.takes_tensors(make) == border
        assert make().train_inputs[0].shape == (16, 13, 6)


def test_crossover_of_the_threshold_is_named():
    rows = TestReport.rows({1000: 2.0, 2000: 1.1, 4000: 0.8})
    (said,) = threshold.remarks(rows)
    assert "makes a step faster up to n = 2,000" in said and "between n = 2,000 and 4,000" in said
    (said,) = threshold.remarks(TestReport.rows({1000: 0.9}))
    assert "makes a step faster at none" in said


class TestReport:
    @staticmethod
    def rows(gains: dict[int, float]) -> list[Row]:
        rows = make_rows("train", sizes=gains)
        return [
            dataclasses.replace(row, p50=row.p50 * 2 / gains[row.case.n]) if row.provider == "tensors" else row
            for row in rows
        ]

    @pytest.mark.parametrize(
        "gains, words",
        [
            ({20: 3.0, 100: 2.0}, ["Switch it on.", "faster at n = 20 to 100 (2.00 to 3.00 times", "no crossover"]),
            ({20: 0.5, 100: 2.0}, ["only where it is faster", "slower at n = 20 (0.50", "between n = 20 and 100"]),
            ({20: 1.0, 100: 1.01}, ["It makes no difference here", "about as fast at n = 20 to 100"]),
            ({20: 0.5, 100: 0.9}, ["Leave it off", "slower at n = 20 to 100"]),
        ],
    )
    def test_verdict(self, gains, words):
        (verdict,) = report.verdicts(self.rows(gains))
        assert all(word in verdict for word in words), verdict

    def test_what_one_thread_of_openblas_gains_is_said(self):
        medians = {("", "stock"): 1.2, ("", "tensors"): 0.3, (pools.VARIABLE, "stock"): 0.2}
        said = pools.sentence({**medians, (pools.VARIABLE, "tensors"): 0.1}, torchs=2, openblas=4)
        assert f"set `{pools.VARIABLE}`" in said and "torch's of 2 threads and OpenBLAS's of 4" in said
        assert "6.0 times as fast with the flag off and 3.0 times with it on; both together 12.0 times" in said
        same = dict.fromkeys([*medians, (pools.VARIABLE, "tensors")], 1.0)
        assert "gains nothing here" in pools.sentence(same, torchs=2, openblas=2)

    def test_one_pool_is_not_measured(self, monkeypatch):
        monkeypatch.setattr(pools, "in_turn", None)  # whatever is timed fails
        with threadpool_limits(1, user_api="blas"):
            assert pools.remarks(1.0) == []

    def test_n_for_which_stock_had_no_memory_is_named(self):
        rows = [row for row in self.rows({20: 3.0, 100: 2.0}) if (row.case.n, row.provider) != (100, "stock")]
        (verdict,) = report.verdicts(rows)
        assert "faster at n = 20 (3.00" in verdict and "At n = 100 only tensors had memory enough." in verdict
        assert report.speed(rows) == [
            "- step: 3.00 times as fast with the flag on; only with it on was there memory for n = 100."
        ]

    def test_whether_to_switch_it_on(self):
        text = report.in_short({"train": self.rows({20: 3.0, 100: 2.0}), "predict": self.rows({20: 1.5})})
        assert text.startswith("**Switch it on.** Of 3 comparisons") and "favourable is 1.50 times" in text
        assert "GPYTORCH_USE_TORCH_TENSORS=on" in text and "max_cholesky_size" in text
        assert "only where it is faster" in report.in_short({"train": self.rows({20: 0.5, 100: 2.0})})
        assert "nothing to advise" in report.in_short({})

    def test_memory_saved(self):
        rows = [
            dataclasses.replace(row, values={"buffers": held})
            for row, held in zip(make_rows("memory", (20,)), (8, 2), strict=True)
        ]
        (line,) = report.memory_saved(rows)
        assert (
            "2.0 n x n matrices with the flag on and of 8.0 with it off" in line and "2.0 times as many points" in line
        )

    def test_page(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Options, "seconds", 0.0)
        monkeypatch.setattr(measuring, "SETTLE", 0)
        monkeypatch.setattr(report, "SECTIONS", {"train": "Training", "memory": "Memory"})
        assert (
            main(["report", "--quick", "--n", "12", "--kernel", "rbf", "--dtype", "float64", "--output", str(tmp_path)])
            == 0
        )
        page = (tmp_path / "report.md").read_text()
        assert "## Training" in page and "## Memory" in page and "| n |" in page
        for line in page.splitlines():
            if line.startswith("!["):
                assert (tmp_path / line[line.index("(") + 1 : -1]).exists()


class TestParagraphs:
    """What is to be quoted is made of the rows."""

    @staticmethod
    def rows(question: str, n: int, found: dict[str, float | dict]) -> list[Row]:
        """Return rows of one case: times in milliseconds, or values."""
        (row, _) = make_rows(question, (n,))
        times = {name: value / 1e3 for name, value in found.items() if not isinstance(value, dict)}
        return [
            dataclasses.replace(row, provider=name, p50=times.get(name), values={} if name in times else value)
            for name, value in found.items()
        ]

    def test_attribution(self):
        names = ["stock", ways.NO_COPY, ways.LOG_PROB, "tensors"]
        names += [attribution.BARE, attribution.BARE_CLOSED, attribution.BARE_KERNEL]
        milliseconds = {100: (10, 9, 7, 4, 8, 7, 4), 20: (10, 10, 9, 5, 6, 6, 6), 50: (10, 10, 10, 11, 9, 9, 9)}
        rows = []
        for n, values in milliseconds.items():
            rows += self.rows("attribution", n, dict(zip(names, values, strict=True)))
        (table,) = attribution.tables(rows)
        assert table.lines[0] == ["100", "10", "4", "6", "1 (17%)", "1 (17%)", "1 (17%)", "3 (50%)", "3 (50%)"]
        (said,) = attribution.remarks(rows)
        for words in (
            "at n = 50 the flag gains nothing",
            "at n = 20 and 100 a step on tensors is 2.00 and 2.50 times as fast",
            "100% and 17% is overhead of Python and operators",
            "The largest part is Python and operators at n = 20 and kernel at n = 100.",
            "stock saves 0% to 10% of its step",
            "pull request #2682, saves 20% to 50% of",
        ):
            assert words in said, said

    def test_accuracy(self):
        errors = {"stock": dict.fromkeys(accuracy.WHAT, 1e-10), "tensors": dict.fromkeys(accuracy.WHAT, 2e-10)}
        rows = self.rows("accuracy", 20, errors)
        rows = [dataclasses.replace(row, case=dataclasses.replace(row.case, case="noise 0.1")) for row in rows]
        worse = dataclasses.replace(rows[0].case, case="noise 0.01")
        rows += [
            dataclasses.replace(rows[0], case=worse, values={"failed": "not positive definite"}),
            dataclasses.replace(rows[1], case=worse, values=errors["tensors"] | {"jitter": True}),
        ]
        (said,) = accuracy.remarks(rows)
        for words in (
            "from 0.1 to 0.01",
            "stock times 2.00 in the loss, 2.00 in the gradient",
            "Jitter was added at noise 0.01 by tensors.",
            "not positive definite at noise 0.01 by stock.",
        ):
            assert words in said, said
        assert ["noise 0.01", "stock", "failed", "failed", "failed", "failed", "yes"] in accuracy.tables(rows)[0].lines


def test_way_without_memory_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    """Room for 6 matrices: for tensors, and for nobody else."""
    monkeypatch.setattr(measuring, "available_bytes", lambda device: 6 * 30**2 * 8)
    monkeypatch.setattr(Options, "seconds", 0.0)
    monkeypatch.setattr(measuring, "SETTLE", 0)
    words = ["train", "--quick", "--n", "30", "--kernel", "rbf", "--dtype", "float64", "--output", str(tmp_path)]
    with gpytorch.settings.fast_computations(True, True, True):
        assert main(words) == 0
    out = capsys.readouterr().out
    for way in ("stock", "stock without copy", "log_prob only"):
        assert f"train, n = 30, float64: {way} is left out" in out
    assert [row.provider for row in record.read(tmp_path / "train.json")] == ["tensors", "potrf + potri"]


def test_help_lists_every_question(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in QUESTIONS)
