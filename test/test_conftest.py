"""That a test marked `alone` runs in a process of its own, and fails where it fails there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = """
import os
import pytest

OUTER = int(os.environ.setdefault("OUTER", str(os.getpid())))

def test_in_the_process_of_the_others():
    assert os.getpid() == OUTER

@pytest.mark.alone
@pytest.mark.parametrize("name", ["a::b c"])
def test_in_a_process_of_its_own(name):
    assert os.getppid() == OUTER

@pytest.mark.alone
def test_fails():
    assert os.getpid() == OUTER, "not there"
"""


def test_marked_test_is_alone_and_can_fail(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_processes.py").write_text(TESTS)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GPYTORCH"))}
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_processes.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=inherited | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "AssertionError: not there" in done.stdout
