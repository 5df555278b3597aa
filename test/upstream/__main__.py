"""Run upstream's own tests under the overlay, with the flag off and on: `python test/upstream [options of pytest]`.

With `--stock` they run once, without the overlay: what fails there is upstream's own. The tests come from the source
distribution of the GPyTorch that is installed; nothing of it is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTCOMES = ("passed", "failed", "errors", "skipped", "excused")


def unpack(version: str, folder: Path) -> None:
    """Put the test folder of a release of GPyTorch into `folder`, and nothing that could pass for the package itself.

    :param version: The release.
    :param folder: An empty folder.
    """
    # --no-build-isolation: pip reads the metadata of what it downloads, for which the setuptools at hand are enough.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "gpytorch", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"gpytorch=={version}"], check=True)
    [archive] = folder.glob("gpytorch-*.tar.gz")
    with tarfile.open(archive) as tar:
        root = os.path.commonpath(tar.getnames())
        tests = [member for member in tar.getmembers() if member.name.startswith(f"{root}/test/")]
        for member in tests:
            member.name = member.name.removeprefix(f"{root}/")
        tar.extractall(folder, members=tests, filter="data")
    archive.unlink()


def outcomes(report: Path) -> dict[str, list[str]]:
    """Return the ids of the tests that had each outcome.

    :param report: A JUnit report of pytest's.
    """
    found: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for case in ElementTree.parse(report).iter("testcase"):
        parts = {part.tag: part for part in case}
        if "failure" in parts:
            outcome = "failed"
        elif "error" in parts:
            outcome = "errors"
        elif "skipped" in parts:
            outcome = "excused" if parts["skipped"].get("type") == "pytest.xfail" else "skipped"
        else:
            outcome = "passed"
        found[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def run(folder: Path, way: str, excuses: Path, options: list[str]) -> tuple[int, str]:
    """Run the tests in `folder`; the JUnit report goes into `folder` too, under the name of the way.

    :param folder: Where a folder named "test" lies.
    :param way: What `use_torch_tensors` is by default under this checkout's overlay, "off" or "on", or "stock": without
        the overlay.
    :param excuses: A file as `excuses.txt`.
    :param options: Further options of pytest.
    :return: pytest's exit status, and one line that sums up.
    """
    report = folder / f"{way}.xml"
    stock = way == "stock"
    variables = {
        # Behind the working directory: `test` is upstream's.
        "PYTHONPATH": os.pathsep.join([*([] if stock else [str(ROOT)]), str(HERE)]),
        "GPYTORCH_USE_TORCH_TENSORS": way,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take several times as long on a busy machine
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    command += ["-p", "without_overlay"] if stock else ["-p", "under_overlay", "--excuses", str(excuses)]
    command += ["--rootdir", str(folder), *options, "test"]
    start = time.monotonic()
    status = subprocess.run(command, cwd=folder, env=os.environ | variables, check=False).returncode
    name = "without the overlay" if stock else f"flag {way}"
    if not report.exists():
        return status or 1, f"{name}: pytest did not come to an end"
    summary = ", ".join(f"{len(tests)} {outcome}" for outcome, tests in outcomes(report).items())
    return status, f"{name}: {summary} in {time.monotonic() - start:.0f} s"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python test/upstream", allow_abbrev=False, epilog="The rest is pytest's.")
    parser.add_argument("--stock", action="store_true", help="once, without the overlay")
    parser.add_argument("--reports", type=Path, help="a folder in which to leave the JUnit reports")
    arguments, options = parser.parse_known_args(words)
    version = metadata.version("gpytorch")
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        unpack(version, folder)
        ways = ("stock",) if arguments.stock else ("off", "on")
        passes = [run(folder, way, HERE / "excuses.txt", options) for way in ways]
        if arguments.reports:
            arguments.reports.mkdir(parents=True, exist_ok=True)
            for report in folder.glob("*.xml"):
                shutil.copy(report, arguments.reports)
    for _, line in passes:
        print(f"upstream's suite of GPyTorch {version}, {line}")
    return max(status for status, _ in passes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
