"""Packages the overlay so that it can be installed beside GPyTorch: see `gpytorch/_upstream.py`."""

import ast
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDER = "gpytorch_tensors"  # site-packages/gpytorch is GPyTorch's own
BUILD = ROOT / "build"
BUILD.mkdir(exist_ok=True)


def supported(module: str) -> tuple[str, str]:
    """Return the first and the last release that a module of the overlay says it was tested with.

    :param module: The module's file.
    """
    text = (ROOT / "gpytorch" / module).read_text("utf-8")
    return ast.literal_eval(re.search(r"^SUPPORTED = (\(.*?\))", text, re.MULTILINE)[1])


class build_overlay(build_py):
    """Builds the packages, and the line which puts the folder that holds them at the front of `sys.path`."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, FOLDER), ignore_errors=True)  # modules since removed from the checkout
        super().run()
        if self.editable_mode:
            site, folder = self.get_finalized_command("install").install_lib, repr(str(ROOT))
        else:
            site, folder = self.build_lib, f"os.path.join(sitedir, {FOLDER!r})"  # `site` runs the line: sitedir is its
        line = f"import os, sys; sys.path.insert(0, {folder})\n"
        Path(site).mkdir(parents=True, exist_ok=True)
        Path(site, f"{FOLDER}.pth").write_text(line, "utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, f"{FOLDER}.pth"))]


BENCHMARKS = ["botorch", "matplotlib", "mpmath", "pandas", "psutil", "rich", "scikit-learn", "threadpoolctl"]

packages = find_packages(str(ROOT), include=["gpytorch", "gpytorch.*"])

setup(
    name="gpytorch-tensors",
    version="0.1.0",
    description="A drop-in patch for GPyTorch: exact GPs on plain torch tensors, behind one flag",
    author="the gpytorch-tensors developers",
    license="MIT",
    python_requires=">=3.10",
    packages=[f"{FOLDER}.{package}" for package in packages],
    package_dir={f"{FOLDER}.gpytorch": "gpytorch"},
    cmdclass={"build_py": build_overlay},
    # An editable install has the checkout in front of site-packages. Metadata lying there would hide the installed
    # distribution's own from pip, which then could not uninstall it.
    options={"egg_info": {"egg_base": str(BUILD)}},
    zip_safe=False,
    install_requires=[
        f"torch>={supported('_internals.py')[0]}",
        f"gpytorch=={supported('_upstream.py')[0]}.*",  # of later patches the overlay itself decides
        "linear_operator",
    ],
    extras_require={
        "test": [*BENCHMARKS, "pytest", "pytest-xdist", "hypothesis", "ruff", "pip>=22.3", "setuptools>=70.1"],
        "benchmarks": BENCHMARKS,
        "fully_bayesian": ["botorch[fully_bayesian]"],  # tests that are skipped without it
        "peers": ["tinygp", "jax"],
        "ax": ["ax-platform", "pyinstrument"],
    },
)
