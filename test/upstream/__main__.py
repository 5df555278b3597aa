"""Run upstream's own tests under the overlay, with the flag off and on: `python test/upstream [options of pytest]`.

The tests come from the source distribution of the GPyTorch that is installed; nothing of it is kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


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


def run(folder: Path, flag: str, excuses: Path, options: list[str]) -> tuple[int, str]:
    """Run the tests in `folder` under this checkout's overlay.

    :param folder: Where a folder named "test" lies.
    :param flag: What `use_torch_tensors` is by default: "off" or "on".
    :param excuses: A file as `excuses.txt`.
    :param options: Further options of pytest.
    :return: pytest's exit status, and one line that sums up.
    """
    counts = folder / f"{flag}.json"
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),  # behind the working directory: `test` is upstream's
        "GPYTORCH_USE_TORCH_TENSORS": flag,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take several times as long on a busy machine
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "under_overlay"]
    command += ["--excuses", str(excuses), "--counts", str(counts), "--rootdir", str(folder), *options, "test"]
    start = time.monotonic()
    status = subprocess.run(command, cwd=folder, env=os.environ | variables, check=False).returncode
    if not counts.exists():
        return status or 1, f"flag {flag}: pytest did not come to an end"
    summary = ", ".join(f"{number} {outcome}" for outcome, number in json.loads(counts.read_text()).items())
    return status, f"flag {flag}: {summary} in {time.monotonic() - start:.0f} s"


def main(options: list[str]) -> int:
    version = metadata.version("gpytorch")
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        unpack(version, folder)
        passes = {flag: run(folder, flag, HERE / "excuses.txt", options) for flag in ("off", "on")}
    for _, line in passes.values():
        print(f"upstream's suite of GPyTorch {version}, {line}")
    return max(status for status, _ in passes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
