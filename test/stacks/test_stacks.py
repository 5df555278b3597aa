"""That a row can fail: on a failure of ours, on a suite that does not end. Stock's own failures are not ours."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
stacks = runpy.run_path(str(Path(__file__).parent), run_name="stacks")

SUITE = "def test_holds():\n    assert {suite}\n"
UPSTREAM = """
import sys
from pathlib import Path

CASE = '<testcase classname="test.test_kernel" name="{{}}">{{}}</testcase>'

def report(way, failing):
    cases = "".join(CASE.format(name, "<failure/>" if name in failing else "") for name in ("a", "b", "c"))
    Path(sys.argv[sys.argv.index("--reports") + 1], f"{{way}}.xml").write_text(f"<testsuites>{{cases}}</testsuites>")

failing = {upstream}
for way in ["stock"] if "--stock" in sys.argv else ["off", "on"]:
    if way in failing:
        report(way, failing[way])
"""


def outcome(folder: Path, suite: str = "True", **upstream: str) -> dict:
    """Return what is made of a checkout whose suite asserts `suite`, and of upstream's tests that fail each way."""
    files = {
        "test/test_ours.py": SUITE.format(suite=suite),
        "test/upstream/__main__.py": UPSTREAM.format(upstream=upstream),
    }
    for name, text in files.items():
        file = folder / "checkout" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "checkout" / "pytest.ini").touch()  # pytest looks no further for a configuration
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    steps = stacks["Steps"](folder / "checkout", logs, dict(os.environ))
    return stacks["run_suites"](sys.executable, steps, processes=1)


def test_nothing_fails_and_stock_is_not_asked(tmp_path: Path) -> None:
    found = outcome(tmp_path, off="", on="")
    assert found["failures"] == {"suite": [], "off": [], "on": []}
    assert found["counts"]["suite"]["passed"] == 1
    assert found["counts"]["on"] == {"passed": 3, "failed": 0, "errors": 0, "skipped": 0, "excused": 0}
    assert "stock" not in found["counts"]


def test_what_fails_without_the_overlay_alike_is_not_ours(tmp_path: Path) -> None:
    found = outcome(tmp_path, "1 == 2", off="a", on="ab", stock="ac")
    assert found["failures"] == {
        "suite": ["test.test_ours::test_holds"],
        "off": [],
        "on": ["test.test_kernel::b"],
    }
    assert found["stock"] == ["test.test_kernel::a", "test.test_kernel::c"]
    assert found["counts"]["on"]["failed"] == 2


DIES = """
import os

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os._exit(0)
"""


@pytest.mark.parametrize(
    ("conftest", "upstream", "missing"),
    [
        (DIES, {"off": "", "on": ""}, "suite.xml"),
        ("", {"off": ""}, "on.xml"),
        ("", {"off": "a", "on": "a"}, "stock.xml"),
    ],
)
def test_suite_that_does_not_come_to_an_end_is_an_error(
    conftest: str, upstream: dict[str, str], missing: str, tmp_path: Path
) -> None:
    outcome(tmp_path, off="a", on="a", stock="a")  # whose reports must not be taken for the next run's
    (tmp_path / "checkout" / "test" / "conftest.py").write_text(conftest)
    with pytest.raises(stacks["StepError"], match=missing):
        outcome(tmp_path, **upstream)


def test_step_that_fails_is_an_error_and_has_a_log(tmp_path: Path) -> None:
    steps = stacks["Steps"](tmp_path, tmp_path, dict(os.environ))
    with pytest.raises(stacks["StepError"], match="install failed with status 3"):
        steps.run("install", sys.executable, "-c", "print('no such release'); raise SystemExit(3)")
    assert (tmp_path / "install.log").read_text() == "no such release\n"


def test_missing_python_is_named() -> None:
    with pytest.raises(stacks["InputError"], match=r"python2\.99 is needed"):
        stacks["python_of"](stacks["Row"]("2.99"))


def test_rows_begin_where_the_requirements_begin() -> None:
    lowest, first = (
        ast.literal_eval(
            re.search(r"^SUPPORTED = (\(.*?\))", (ROOT / "gpytorch" / module).read_text(), re.MULTILINE)[1]
        )[0]
        for module in ("_internals.py", "_upstream.py")
    )
    pins = {pin for row in stacks["ROWS"].values() for pin in row.pins}
    assert {f"torch=={lowest}.*", f"gpytorch=={first}"} <= pins


def test_new_summary_takes_the_place_of_the_rows_old_one(tmp_path: Path) -> None:
    first, second = list(stacks["ROWS"])[:2]
    file = tmp_path / "stacks.json"
    stacks["write"](file, [{"name": second, "commit": "old"}, {"name": "gone"}])
    stacks["write"](file, [*stacks["read"](file), {"name": first}, {"name": second, "commit": "new"}])
    assert stacks["read"](file) == [{"name": first}, {"name": second, "commit": "new"}]
