"""That the run of upstream's suite can fail: on a failure, on an excuse that is not needed, without the overlay."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

upstream = runpy.run_path(str(Path(__file__).with_name("__main__.py")), run_name="upstream")
run, outcomes = upstream["run"], upstream["outcomes"]

SUITE = """
import unittest
import gpytorch

class Counts(unittest.TestCase):
    def test_always_passes(self):
        pass

    def test_fails_with_the_flag_on(self):
        self.assertTrue(gpytorch.settings.use_torch_tensors.off())
"""
PASSES, FAILS = (
    f"test/test_counts.py::Counts::{name}" for name in ("test_always_passes", "test_fails_with_the_flag_on")
)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "__init__.py").touch()
    (tmp_path / "test" / "test_counts.py").write_text(SUITE)
    return tmp_path


@pytest.mark.parametrize(
    ("flag", "excuses", "status", "counts"),
    [
        ("off", "", 0, "2 passed, 0 failed, 0 errors, 0 skipped, 0 excused"),
        ("on", "# nothing\n", 1, "1 passed, 1 failed, 0 errors, 0 skipped, 0 excused"),
        ("on", f"{FAILS}  counts calls of a function\n", 0, "1 passed, 0 failed, 0 errors, 0 skipped, 1 excused"),
        (
            "on",
            f"{PASSES}  needed no more\n{FAILS}  as above\n",
            1,
            "0 passed, 1 failed, 0 errors, 0 skipped, 1 excused",
        ),
        ("off", f"{FAILS}  counts calls of a function\n", 0, "2 passed, 0 failed, 0 errors, 0 skipped, 0 excused"),
    ],
)
def test_excused_test_must_fail_and_any_other_pass(
    suite: Path, flag: str, excuses: str, status: int, counts: str
) -> None:
    (suite / "excuses.txt").write_text(excuses)
    result = run(suite, flag, suite / "excuses.txt", [])
    assert result[0] == status
    assert f"flag {flag}: {counts} in " in result[1]


@pytest.mark.parametrize(
    ("excuses", "complaint"),
    [
        ("test/test_counts.py::Counts::test_gone  was there once\n", "there is no such test"),
        (f"{FAILS}\n", "no reason is given"),
    ],
)
def test_excuse_needs_a_test_and_a_reason(
    suite: Path, excuses: str, complaint: str, capfd: pytest.CaptureFixture
) -> None:
    (suite / "excuses.txt").write_text(excuses)
    assert run(suite, "on", suite / "excuses.txt", [])[0] == pytest.ExitCode.USAGE_ERROR
    assert complaint in "".join(capfd.readouterr())


def test_run_without_the_overlay_is_refused(suite: Path, capfd: pytest.CaptureFixture) -> None:
    (suite / "gpytorch").mkdir()  # the working directory comes first, as in an unpacked source distribution
    (suite / "gpytorch" / "__init__.py").write_text("class settings: ...\n")
    assert run(suite, "off", suite / "excuses.txt", [])[0] == pytest.ExitCode.USAGE_ERROR
    assert "is not under the overlay" in "".join(capfd.readouterr())


def test_stock_is_without_the_overlay(suite: Path) -> None:
    text = (suite / "test" / "test_counts.py").read_text()
    (suite / "test" / "test_counts.py").write_text(text.replace("off()", "missing"))
    status, line = run(suite, "stock", suite / "excuses.txt", [])
    assert status == 1
    assert line.startswith("without the overlay: 1 passed, 1 failed, 0 errors, 0 skipped, 0 excused in ")
    assert "has no attribute 'use_torch_tensors'" in (suite / "stock.xml").read_text().replace("&#x27;", "'")


def test_outcomes_are_told_apart_by_test(suite: Path) -> None:
    (suite / "test" / "test_counts.py").write_text("""
import pytest

@pytest.fixture
def broken():
    raise OSError

def test_passes(): pass
def test_fails(): assert False
def test_has_no_fixture(broken): pass
def test_is_skipped(): pytest.skip()
@pytest.mark.xfail
def test_is_excused(): assert False
@pytest.mark.parametrize("name", ["a b::c"])
def test_takes(name): pass
""")
    run(suite, "stock", suite / "excuses.txt", [])
    assert outcomes(suite / "stock.xml") == {
        "passed": ["test.test_counts::test_passes", "test.test_counts::test_takes[a b::c]"],
        "failed": ["test.test_counts::test_fails"],
        "errors": ["test.test_counts::test_has_no_fixture"],
        "skipped": ["test.test_counts::test_is_skipped"],
        "excused": ["test.test_counts::test_is_excused"],
    }
