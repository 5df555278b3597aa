"""A pytest plugin: see that tests run under the overlay, and that an excused test fails as its excuse says."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--excuses", type=Path, help="lines of: test id, two spaces or more, the reason")


def read_excuses(file: Path) -> dict[str, str]:
    """Return the reason of each excused test.

    :param file: Lines of a test id, two spaces or more, and a reason; `#` begins a comment.
    """
    lines = [line.split("#")[0].strip() for line in file.read_text("utf-8").splitlines()]
    entries = [line.split("  ", 1) for line in lines if line]
    if without := [entry[0] for entry in entries if len(entry) < 2]:
        raise pytest.UsageError(f"{file.name}: no reason is given for {', '.join(without)}")
    return {test: reason.strip() for test, reason in entries}


def pytest_configure(config: pytest.Config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the overlay's, where it has no effect
        import gpytorch

    flag = getattr(gpytorch.settings, "use_torch_tensors", None)
    if flag is None:
        raise pytest.UsageError(f"{gpytorch.__file__} is not under the overlay")
    if flag.on() != (os.environ.get("GPYTORCH_USE_TORCH_TENSORS") == "on"):
        raise pytest.UsageError("the flag's default is not what GPYTORCH_USE_TORCH_TENSORS says")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ["GPYTORCH_USE_TORCH_TENSORS"] != "on":
        return  # with the flag off there is nothing to excuse
    excuses = read_excuses(config.getoption("--excuses"))
    collected = {item.nodeid: item for item in items}
    if unknown := sorted(set(excuses) - set(collected)):
        raise pytest.UsageError(f"excused, but there is no such test: {', '.join(unknown)}")
    for test, reason in excuses.items():
        collected[test].add_marker(pytest.mark.xfail(reason=reason, strict=True))
