"""Installing, importing and uninstalling the overlay beside the real GPyTorch, in fresh environments."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import Environment

LOOK = """
import json, sys, warnings
from importlib import metadata, util
warnings.simplefilter("error", RuntimeWarning)
import gpytorch
overlay = sys.modules.get("gpytorch._upstream")
print(json.dumps(dict(
    overlay=overlay and overlay.__file__, flag=hasattr(gpytorch.settings, "use_torch_tensors"),
    upstream=util.find_spec("gpytorch.version").origin, versions=[gpytorch.__version__, metadata.version("gpytorch")],
)))
"""


def look(environment: Environment, cwd: Path | None = None, **variables: str) -> dict:
    return json.loads(environment.run(LOOK, cwd, **variables))


def version_of(distribution: str, environment: Environment) -> str:
    return environment.run(f"from importlib import metadata; print(metadata.version({distribution!r}))").strip()


@pytest.fixture
def empty(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment").create()


HOW = ["wheel", "source", "editable"]


@pytest.mark.parametrize("how", HOW)
def test_install_puts_the_overlay_first_and_uninstall_leaves_stock_gpytorch(
    empty: Environment, wheel: Path, checkout: Path, how: str
) -> None:
    before = look(empty)
    assert before["overlay"] is None
    assert not before["flag"]

    empty.install(*{"wheel": [wheel], "source": [checkout], "editable": ["--editable", checkout]}[how])
    during = look(empty)
    home = checkout if how == "editable" else empty.site / "gpytorch_tensors"
    assert during["overlay"] == str(home / "gpytorch" / "_upstream.py")
    assert during["flag"]
    assert during["versions"] == before["versions"]
    assert Path(during["upstream"]).samefile(before["upstream"])
    assert version_of("gpytorch-tensors", empty) == "0.1.0"

    empty.pip("uninstall", "--yes", "gpytorch-tensors")
    assert look(empty) == before
    left = [item for item in empty.site.glob("*tensors*") if item.is_file() or any(item.iterdir())]
    assert left == []  # old releases of pip leave an empty folder


def test_checkout_needs_no_installation(stock: Environment, checkout: Path) -> None:
    assert look(stock, cwd=checkout)["overlay"] == str(checkout / "gpytorch" / "_upstream.py")
    assert look(stock, PYTHONPATH=str(checkout))["overlay"] == str(checkout / "gpytorch" / "_upstream.py")
    assert look(stock)["overlay"] is None


def test_checkout_comes_before_the_installed_copy(overlaid: Environment, checkout: Path) -> None:
    installed = look(overlaid)
    worked_on = look(overlaid, cwd=checkout)
    assert worked_on["overlay"] == str(checkout / "gpytorch" / "_upstream.py") != installed["overlay"]
    assert worked_on["upstream"] == installed["upstream"]


ORDERS = [
    "gpytorch.settings",
    "gpytorch.kernels",
    "gpytorch.functions",
    "gpytorch.distributions.multivariate_normal",
    "gpytorch.models.exact_gp",
    "linear_operator",
    "botorch",
    "botorch.models",
]


@pytest.mark.parametrize("first", ORDERS)
def test_overlay_is_in_effect_whatever_is_imported_first(overlaid: Environment, first: str) -> None:
    code = f"""
import warnings
warnings.simplefilter("error", RuntimeWarning)
import {first}
import botorch, gpytorch
from botorch.models import SingleTaskGP
from gpytorch import settings
assert botorch.settings.__name__ == "botorch.settings"
assert issubclass(SingleTaskGP, gpytorch.models.ExactGP)
assert gpytorch.distributions.MultivariateNormal is botorch.posteriors.gpytorch.MultivariateNormal
assert settings is gpytorch.settings
print(settings.use_torch_tensors.off(), settings.use_torch_tensors.__module__)
"""
    assert overlaid.run(code) == "True gpytorch.settings\n"


def test_missing_gpytorch_says_what_to_install(overlaid: Environment, wheel: Path, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "bare").create()
    (bare.site / "gpytorch").unlink()
    bare.install(wheel)
    code = """
try:
    import gpytorch.kernels
except ImportError as error:
    print(error.name, error)
"""
    assert bare.run(code).startswith("gpytorch gpytorch-tensors lies over an installed GPyTorch, and none was found.")
    assert "pip install 'gpytorch>=1.15" in bare.run(code)
    assert overlaid.run(code) == ""


def put_other_upstream(environment: Environment, file: str, before: str, after: str) -> None:
    """Put a GPyTorch in which one file differs in place of the environment's."""
    folder = environment.site / "gpytorch"
    original = folder.resolve()
    folder.unlink()
    shutil.copytree(original, folder, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert re.search(before, text)
    (folder / file).unlink()
    (folder / file).write_text(re.sub(before, after, text))


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gpytorch, gpytorch.models, botorch
ours = [str(w.message) for w in caught if "gpytorch-tensors" in str(w.message)]
import torch
with gpytorch.settings.use_torch_tensors():
    assert gpytorch.settings.use_torch_tensors.on()
    normal = gpytorch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    print(len(ours), round(normal.log_prob(torch.zeros(2)).item(), 4), *ours)
"""


VERSION = r"(__version__ = version) = .*"
METHOD = r"def log_prob\(self, value: Tensor\)"
OTHERS = {
    "a tested release": ("version.py", VERSION, r"\1 = '1.15'", "0 -1.8379\n"),
    "a newer release": (
        "version.py",
        VERSION,
        r"\1 = '1.99.0'",
        "1 -1.8379 gpytorch-tensors has no effect: the installed GPyTorch is 1.99.0, this overlay was tested with 1.15",
    ),
    "a method that takes more": (
        "distributions/multivariate_normal.py",
        METHOD,
        "def log_prob(self, value: Tensor, scale=1)",
        "1 -1.8379 gpytorch-tensors has no effect: the installed GPyTorch is 1.15",
    ),
    "a method with other annotations": (
        "distributions/multivariate_normal.py",
        METHOD,
        "def log_prob(self, value)",
        "1 -1.8379 gpytorch-tensors has no effect: the installed GPyTorch is 1.15",
    ),
}


@pytest.mark.parametrize(("file", "before", "after", "printed"), OTHERS.values(), ids=OTHERS)
def test_upstream_that_does_not_fit_works_as_stock_after_one_warning(
    empty: Environment, wheel: Path, file: str, before: str, after: str, printed: str
) -> None:
    put_other_upstream(empty, file, before, after)
    empty.install(wheel)
    assert empty.run(USE).startswith(printed)


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, checkout: Path) -> None:
    modules = {file.relative_to(checkout) for file in (checkout / "gpytorch").rglob("*.py")}
    expected = {f"gpytorch_tensors/{module.as_posix()}" for module in modules} | {"gpytorch_tensors.pth"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_removed_module_does_not_come_back_from_an_earlier_build(
    stock: Environment, checkout: Path, tmp_path: Path
) -> None:
    def build(folder: str) -> list[str]:
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / folder]
        stock.pip("wheel", *options, checkout)
        return zipfile.ZipFile(next((tmp_path / folder).glob("*.whl"))).namelist()

    extra = checkout / "gpytorch" / "passing.py"
    extra.touch()
    try:
        assert "gpytorch_tensors/gpytorch/passing.py" in build("with")
    finally:
        extra.unlink()
    assert "gpytorch_tensors/gpytorch/passing.py" not in build("without")


def test_requirements_state_the_range_of_the_version_guard(wheel: Path, checkout: Path) -> None:
    lowest = {}
    for module in ("_upstream", "_internals"):
        tree = ast.parse((checkout / "gpytorch" / f"{module}.py").read_text())
        [lowest[module], _] = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "SUPPORTED"
        )
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    requirements = re.findall(r"^Requires-Dist: ([^;\n]+)$", text, re.MULTILINE)
    assert sorted(requirement.replace("-", "_") for requirement in requirements) == [  # older tools write a hyphen
        f"gpytorch=={lowest['_upstream']}.*",
        "linear_operator",
        f"torch>={lowest['_internals']}",
    ]
    assert re.search(r"^Name: gpytorch-tensors$", text, re.MULTILINE)
    assert re.search(r"^License-File: LICENSE$", text, re.MULTILINE)
