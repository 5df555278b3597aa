"""Try this checkout on the releases that users have: `python test/stacks [--list] [--rows NAME ...]`.

A row is a Python, and the releases that pip is held to; all else is the newest that pip finds for them. In a fresh
virtual environment, on a clean clone of the last commit: the README's test command, and GPyTorch's own suite with the
flag off and on. Where that fails, it runs without the overlay too: what fails there as well is not ours.
The environment is removed; the summary goes where `python -m benchmarks readme` makes the README's table of it.

The Pythons are those on the PATH, as `python3.10` and so on. A row takes up to 6 GB of disk and an hour or two.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "stacks.json"
LOGS = ROOT / "build" / "stacks"
outcomes: Callable[[Path], dict[str, list[str]]] = runpy.run_path(str(ROOT / "test" / "upstream"))["outcomes"]


class InputError(Exception):
    """What cannot be run as asked; the message says why."""


class StepError(Exception):
    """A step that did not come to an end of its own."""


@dataclass(frozen=True)
class Row:
    """What to try.

    :param python: The Python, as "3.12".
    :param pins: What pip is held to.
    """

    python: str
    pins: tuple[str, ...] = ()


ROWS = {
    "lowest-3.10": Row("3.10", ("torch==2.4.*",)),
    "lowest-3.11": Row("3.11", ("torch==2.4.*",)),
    "2.13-3.12": Row("3.12", ("torch==2.13.0",)),
    "newest-3.13": Row("3.13"),
    "gpytorch-1.15": Row("3.11", ("torch==2.13.0", "gpytorch==1.15")),
    "gpytorch-1.15.1": Row("3.11", ("torch==2.13.0", "gpytorch==1.15.1")),
}

VERSIONS = """
import json, platform
from importlib.metadata import version
names = ["torch", "gpytorch", "linear_operator", "botorch", "numpy"]
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""


@dataclass(frozen=True)
class Steps:
    """Runs the steps of a row, each with a log of its own.

    :param checkout: The working directory.
    :param logs: Where the logs and the JUnit reports go.
    :param variables: The steps' environment variables.
    """

    checkout: Path
    logs: Path
    variables: dict[str, str]

    def run(self, name: str, *command: str | Path, may_fail: bool = False) -> None:
        """Run a step.

        :param name: The name of its log.
        :param command: The program and its arguments.
        :param may_fail: Whether another exit status than 0 is an answer as well.
        """
        print(f"  {name} ...", flush=True)
        log, start = self.logs / f"{name}.log", time.monotonic()
        with log.open("w") as output:
            words = [str(word) for word in command]
            options = {"cwd": self.checkout, "env": self.variables, "stdout": output, "stderr": subprocess.STDOUT}
            status = subprocess.run(words, check=False, **options).returncode
        if status and not may_fail:
            raise StepError(f"{name} failed with status {status}; see {log}")
        print(f"  {name}: {(time.monotonic() - start) / 60:.0f} min", flush=True)

    def outcomes(self, way: str) -> dict[str, list[str]]:
        """Return the outcomes of the tests of which pytest left a report.

        :param way: The report's name.
        """
        report = self.logs / f"{way}.xml"
        if not report.exists():
            raise StepError(f"pytest did not come to an end, and left no {report}")
        return outcomes(report)


def failures(found: dict[str, list[str]]) -> set[str]:
    """Return the ids of the tests that failed, or could not be run."""
    return {*found["failed"], *found["errors"]}


def judge(found: dict[str, dict[str, list[str]]]) -> dict[str, object]:
    """Return how many tests had each outcome, and the failures that stock does not have.

    :param found: The outcomes of our "suite", of upstream's with the flag "off" and "on", and of upstream's without the
        overlay ("stock") if these had failures.
    """
    stock = failures(found["stock"]) if "stock" in found else set()
    ours = {way: sorted(failures(found[way]) - stock) for way in ("off", "on")}
    counts = {way: {outcome: len(tests) for outcome, tests in each.items()} for way, each in found.items()}
    return {"counts": counts, "failures": {"suite": sorted(failures(found["suite"])), **ours}, "stock": sorted(stock)}


def run_suites(python: Path | str, steps: Steps, processes: int) -> dict[str, object]:
    """Run both suites, and return what :func:`judge` makes of them.

    :param python: A Python in whose environment this checkout is installed.
    :param steps: Where to run them.
    :param processes: On how many processes.
    """
    for report in steps.logs.glob("*.xml"):
        report.unlink()
    parallel = ["-n", str(processes)]
    report = ["--junitxml", steps.logs / "suite.xml"]
    steps.run("suite", python, "-m", "pytest", *parallel, *report, may_fail=True)
    found = {"suite": steps.outcomes("suite")}
    upstream = [python, steps.checkout / "test" / "upstream", "--reports", steps.logs, *parallel]
    steps.run("upstream", *upstream, may_fail=True)
    found |= {way: steps.outcomes(way) for way in ("off", "on")}
    if failures(found["off"]) or failures(found["on"]):
        steps.run("stock", *upstream, "--stock", may_fail=True)
        found["stock"] = steps.outcomes("stock")
    return judge(found)


def try_out(name: str, row: Row, logs: Path, processes: int) -> dict[str, object]:
    """Return the summary of a row, of which nothing is kept but the logs.

    :param name: The row's name.
    :param row: What to try.
    :param logs: An empty folder for the logs.
    :param processes: On how many processes the tests run.
    """
    with TemporaryDirectory(prefix="stack-") as temporary:
        folder = Path(temporary).resolve()
        environment, pins = folder / "environment", folder / "pins.txt"
        pins.write_text("".join(f"{pin}\n" for pin in row.pins))
        (folder / "tmp").mkdir()
        programs = environment / ("Scripts" if os.name == "nt" else "bin")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GPYTORCH"))}
        variables = kept | {
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PIP_CONSTRAINT": str(pins),  # in place of whatever pip is held to otherwise
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_PROGRESS_BAR": "off",
            "OMP_NUM_THREADS": "1",  # the processes share the cores
            "TMPDIR": str(folder / "tmp"),
        }
        steps, python = Steps(folder / "checkout", logs, variables), programs / "python"
        clone(steps.checkout)
        steps.run("environment", python_of(row), "-m", "venv", environment)
        steps.run("install", python, "-m", "pip", "install", ".[test]")
        versions = subprocess.run(
            [python, "-c", VERSIONS], cwd=folder, env=variables, check=True, capture_output=True, text=True
        ).stdout
        commit = git("rev-parse", "--short", "HEAD", cwd=steps.checkout)
        result = run_suites(python, steps, processes)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")  # noqa: UP017 (Python 3.10 has no datetime.UTC)
    return {"name": name, "versions": json.loads(versions), **result, "commit": commit, "date": date}


def git(*words: str, cwd: Path = ROOT) -> str:
    """Return what git says."""
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def clone(folder: Path) -> None:
    """Put a clean clone of the last commit into `folder`."""
    if git("status", "--porcelain", "--", ".", f":!{RECORD.relative_to(ROOT).as_posix()}"):
        print("  (what is not committed is not tried)")
    git("clone", "--quiet", "--no-tags", str(ROOT), str(folder))


def python_of(row: Row) -> str:
    """Return the Python of a row, which has to be on the PATH and to run."""
    name = f"python{row.python}"
    found = shutil.which(name)
    # A version manager puts names on the PATH of Pythons that it does not run.
    if not found or subprocess.run([found, "-c", "import venv"], check=False, capture_output=True).returncode:
        raise InputError(f"{name} is needed, and there is none on the PATH that runs")
    return found


def read(file: Path) -> list[dict]:
    """Return the summaries on record."""
    return json.loads(file.read_text()) if file.exists() else []


def write(file: Path, summaries: list[dict]) -> None:
    """Write the summaries in the table's order, one a line; rows that are no more in the table go."""
    by_name = {summary["name"]: summary for summary in summaries}
    lines = [json.dumps(by_name[name]) for name in ROWS if name in by_name]
    draft = file.with_suffix(".part")
    draft.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    os.replace(draft, file)


def sentences(summary: dict) -> list[str]:
    """Return a summary in lines for the terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [f"{summary['name']}: {versions}; commit {summary['commit']}"]
    titles = {"suite": "our suite", "off": "upstream's, flag off", "on": "upstream's, flag on"}
    for way, title in {**titles, "stock": "upstream's, without the overlay"}.items():
        if way in summary["counts"]:
            counts = ", ".join(f"{number} {outcome}" for outcome, number in summary["counts"][way].items())
            lines += [f"  {title}: {counts}", *(f"    {test}" for test in summary["failures"].get(way, []))]
    return lines


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python test/stacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the rows and do no more")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="only these")
    parser.add_argument("--processes", type=int, default=2, help="run the tests on so many (default: 2)")
    arguments = parser.parse_args(words)
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name:16s} Python {row.python}, {', '.join(row.pins) or 'all of it the newest'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is temporary is removed
    failed = []
    try:
        for name in arguments.rows:
            python_of(ROWS[name])
        for name in arguments.rows:
            print(f"{name}:", flush=True)
            logs = LOGS / name
            shutil.rmtree(logs, ignore_errors=True)
            logs.mkdir(parents=True)
            try:
                summary = try_out(name, ROWS[name], logs, arguments.processes)
            except StepError as error:
                print(f"  {error}")
                failed.append(name)
                continue
            write(RECORD, [*read(RECORD), summary])
            print("\n".join(sentences(summary)), flush=True)
            if any(summary["failures"].values()):
                failed.append(name)
    except InputError as error:
        print(f"python test/stacks: error: {error}", file=sys.stderr)
        return 2
    print(f"failed: {', '.join(failed)}; their logs are in {LOGS}" if failed else "no failure that stock does not have")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
