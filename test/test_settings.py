"""The flag `gpytorch.settings.use_torch_tensors`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpytorch
from gpytorch import settings
from gpytorch.settings import use_torch_tensors

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "GPYTORCH_USE_TORCH_TENSORS"


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The flag as a fresh process has it, whatever the environment of the tests says; and left so."""
    monkeypatch.setattr(use_torch_tensors, "_state", None)
    monkeypatch.setattr(use_torch_tensors, "_default", False)
    yield
    assert use_torch_tensors._state is None


def test_flag_is_off_by_default() -> None:
    assert use_torch_tensors.off()
    assert not use_torch_tensors.on()
    assert use_torch_tensors.is_default()


def test_flag_is_one_of_the_settings() -> None:
    assert "use_torch_tensors" in settings.__all__
    assert len(settings.__all__) == len(set(settings.__all__))
    assert gpytorch.settings.use_torch_tensors is use_torch_tensors
    assert use_torch_tensors.__mro__[1:] == settings.debug.__mro__[1:]
    assert use_torch_tensors.__doc__.strip().endswith("(Default: False)")
    assert VARIABLE in use_torch_tensors.__doc__


@pytest.mark.parametrize(("arguments", "state"), [((), True), ((True,), True), ((False,), False)])
def test_context_manager_sets_and_restores(arguments: tuple[bool, ...], state: bool) -> None:
    for outer in (None, True, False):
        use_torch_tensors._set_state(outer)
        with use_torch_tensors(*arguments):
            assert use_torch_tensors.on() is state
            assert use_torch_tensors.off() is not state
            assert not use_torch_tensors.is_default()
        assert use_torch_tensors._state is outer
    use_torch_tensors._set_state(None)


def test_context_managers_nest() -> None:
    with use_torch_tensors():
        with use_torch_tensors(False):
            with use_torch_tensors(True):
                assert use_torch_tensors.on()
            assert use_torch_tensors.off()
        assert use_torch_tensors.on()
    assert use_torch_tensors.is_default()


def test_exception_passes_through_and_the_flag_is_restored() -> None:
    with pytest.raises(KeyboardInterrupt), use_torch_tensors():
        assert use_torch_tensors.on()
        raise KeyboardInterrupt
    assert use_torch_tensors.is_default()
    assert use_torch_tensors.off()


def test_set_state_lasts_until_it_is_unset() -> None:
    use_torch_tensors._set_state(True)
    assert use_torch_tensors.on()
    assert not use_torch_tensors.is_default()
    use_torch_tensors._set_state(None)
    assert use_torch_tensors.off()


def test_flag_has_a_state_of_its_own() -> None:
    def others() -> dict:
        flags = {name: getattr(settings, name) for name in settings.__all__ if name != "use_torch_tensors"}
        return {name: flag.on() for name, flag in flags.items() if hasattr(flag, "on")}

    before = others()
    with use_torch_tensors():
        assert others() == before
    with settings.debug(not settings.debug.on()):
        assert others() != before
        assert use_torch_tensors.is_default()


def run(code: str, value: str | None) -> subprocess.CompletedProcess:
    variables = {name: text for name, text in os.environ.items() if name != VARIABLE}
    if value is not None:
        variables[VARIABLE] = value
    command = [sys.executable, "-c", f"from gpytorch.settings import use_torch_tensors as flag\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


VALUES = {None: False, "": False, "0": False, "off": False, "False": False, "1": True, "true": True, " ON ": True}


@pytest.mark.parametrize(("value", "default"), VALUES.items())
def test_environment_variable_sets_the_default_and_a_with_block_wins(value: str | None, default: bool) -> None:
    code = """
print(flag.on(), flag.is_default())
for state in (True, False):
    with flag(state):
        print(flag.on())
print(flag.on(), flag.is_default())
"""
    result = run(code, value)
    assert result.stdout.split() == [str(default), "True", "True", "False", str(default), "True"], result.stderr


@pytest.mark.parametrize("value", ["2", "yes", "on off"])
def test_environment_variable_of_another_value_is_an_error_at_import(value: str) -> None:
    result = run("", value)
    assert result.returncode == 1
    message = f"ValueError: {VARIABLE} is {value!r}; it must be one of 1/0, true/false, on/off."
    assert result.stderr.strip().splitlines()[-1] == message
