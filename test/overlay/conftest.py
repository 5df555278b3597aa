"""Virtual environments in which to install, import and uninstall the overlay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("gpytorch_tensors", "__editable__")


def run(command: list, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command without what the environment says to Python, to pip and to the overlay.

    :param command: The program and its arguments.
    :param cwd: The working directory.
    :param variables: Environment variables of the command's own.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "GPYTORCH"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | variables, capture_output=True, text=True, check=False
    )


@dataclass(frozen=True)
class Environment:
    """A virtual environment that links to every package of the one that runs the tests, except the overlay.

    Upstream lies in site-packages itself, where an installed overlay has to get past it.
    """

    folder: Path

    @property
    def python(self) -> Path:
        return next(self.folder.glob("*/python")) if os.name != "nt" else self.folder / "Scripts" / "python.exe"

    @property
    def site(self) -> Path:
        return next(self.folder.rglob("site-packages"))

    def create(self) -> Environment:
        venv.create(self.folder, with_pip=False, symlinks=True)
        for outer in (Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")):
            for item in outer.iterdir():
                link = self.site / item.name
                if item.suffix != ".pth" and not item.name.startswith(OURS) and not link.exists():
                    link.symlink_to(item)
        return self

    def run(self, code: str, cwd: Path | None = None, **variables: str) -> str:
        """Return what `code` prints, run in a folder that holds no package."""
        result = run([self.python, "-c", code], cwd or self.folder, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def pip(self, *arguments: object) -> None:
        # This environment's own pip works on the other one, from where no metadata of the checkout is in sight.
        result = run([sys.executable, "-m", "pip", "--python", self.python, *arguments], self.folder)
        assert result.returncode == 0, result.stdout + result.stderr

    def install(self, *arguments: object) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *arguments)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from: builds leave files behind."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "gpytorch", folder / "gpytorch", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (item for item in ROOT.iterdir() if item.is_file()):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with GPyTorch and no overlay."""
    return Environment(tmp_path_factory.mktemp("stock")).create()


@pytest.fixture(scope="session")
def wheel(stock: Environment, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    stock.pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    return next(folder.glob("gpytorch_tensors-*.whl"))


@pytest.fixture(scope="session")
def overlaid(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with GPyTorch and the overlay, installed from a wheel."""
    environment = Environment(tmp_path_factory.mktemp("overlaid")).create()
    environment.install(wheel)
    return environment
