"""The overlay rule, tried on a small stand-in for GPyTorch: no torch, hence on every Python that the machine has."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, run

STAND_IN = {
    "__init__.py": "from . import distributions, means, settings\n",
    "version.py": "version = __version__ = '1.15.2'\n",
    "settings.py": """
        class _feature_flag:
            _default, _state = False, None

            @classmethod
            def on(cls):
                return cls._default if cls._state is None else cls._state

            def __init__(self, state=True):
                self.state, self.previous = state, self._state

            def __enter__(self):
                type(self)._state = self.state

            def __exit__(self, *exception):
                type(self)._state = self.previous

        __all__ = ["_feature_flag"]
        """,
    "means.py": "class Mean: ...\n",
    "distributions/__init__.py": "from .normal import Normal, Student\n",
    "distributions/delta.py": "class Delta: ...\n",
    "distributions/normal.py": '''
        class Normal:
            """Bell-shaped."""

            def log_prob(self, value, scale=1):
                """Return upstream's answer.

                :param value: Anything.
                """
                return "upstream"

            def draw(self):
                return "upstream"

            def draw_many(self):
                """Return a list."""

        class Student(Normal):
            def draw_many(self):
                return super().draw_many()
        ''',
}
OVERLAY = {
    "_internals.py": "missing = []\n",
    "_tested.py": "SOURCES = {}\n",
    "operators/__init__.py": "",
    "operators/cholesky.py": "",
    "models/__init__.py": "",
    "models/dense_prediction_strategy.py": "",
    "distributions/__init__.py": "from .. import _upstream\n_upstream.extend(__name__)\n",
    "distributions/normal.py": '''
        from .. import _upstream

        _upstream.extend(__name__)

        class Ours: ...

        @_upstream.replaces(Normal)
        def log_prob(self, value: float, scale=1) -> str:
            """Ours is faster."""
            return "ours"

        @_upstream.replaces(Normal)
        def draw_many(self):
            """A short one."""

        @_upstream.replaces(Student, "draw_many")
        def _draw_many_of_student(self):
            """A long one."""

        @_upstream.replaces(Normal, "draw")
        def _draw_fast(self):
            return "ours"
        ''',
}
REPORT = """
import json, logging, warnings
logged = []
logging.getLogger("gpytorch").addHandler(logging.NullHandler())
logging.getLogger("gpytorch").setLevel(logging.INFO)
logging.getLogger("gpytorch").handlers[0].handle = lambda record: logged.append(record.getMessage())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {statement}
import gpytorch.distributions
normal = gpytorch.distributions.Student()
with gpytorch.settings.use_torch_tensors():
    flag = gpytorch.settings.use_torch_tensors.on()
print(json.dumps(dict(
    log_prob=normal.log_prob(0), draw=normal.draw(), flag=flag, default=gpytorch.settings.use_torch_tensors.on(),
    loaded=hasattr(gpytorch.distributions.normal, "Ours"), logged=logged,
    warnings=[[w.category.__name__, str(w.message), w.filename] for w in caught],
)))
"""
PYTHONS = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable} | {
    minor: found
    for minor in ("3.10", "3.11", "3.12", "3.13")
    if (found := shutil.which(f"python{minor}"))
    and minor != f"{sys.version_info[0]}.{sys.version_info[1]}"
    and not subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode
}


def write(folder: Path, files: dict[str, str | None]) -> Path:
    for name, text in files.items():
        if text is not None:
            file = folder / "gpytorch" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = text.lstrip("\n").splitlines()
            indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
            file.write_text("".join(line[indent:] + "\n" for line in lines))
    return folder


@dataclass
class Machine:
    """A folder with an upstream and overlays in it, and a Python to import them with."""

    folder: Path
    python: str

    def upstream(self, **changed: str | None) -> Path:
        return write(self.folder / "upstream", STAND_IN | changed)

    def overlay(self, name: str = "overlay", **changed: str) -> Path:
        folder = write(self.folder / name, OVERLAY | changed)
        for module in ("__init__.py", "_upstream.py", "settings.py"):
            shutil.copy(ROOT / "gpytorch" / module, folder / "gpytorch")
        return folder

    def attempt(self, code: str, path: list[Path]) -> subprocess.CompletedProcess:
        variables = {"PYTHONPATH": ":".join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
        return run([self.python, "-S", "-c", code], self.folder, **variables)  # -S: no site-packages

    def run(self, code: str, path: list[Path]) -> str:
        result = self.attempt(code, path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def report(self, path: list[Path], statement: str = "import gpytorch") -> dict:
        return json.loads(self.run(REPORT.format(statement=statement), path))


@pytest.fixture(params=PYTHONS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, PYTHONS[request.param])


def is_in_effect(report: dict) -> bool:
    return report["log_prob"] == report["draw"] == "ours"


def is_stock(report: dict) -> bool:
    return report["log_prob"] == report["draw"] == "upstream"


FIRST_IMPORTS = ["gpytorch", "gpytorch.settings", "gpytorch.means", "gpytorch.distributions.normal", "gpytorch.version"]


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_overlay_is_in_effect_whatever_is_imported_first(machine: Machine, first: str) -> None:
    report = machine.report([machine.overlay(), machine.upstream()], f"import {first}")
    assert is_in_effect(report)
    assert report["flag"] is True
    assert report["default"] is False
    assert report["warnings"] == []


def test_upstream_in_front_is_left_alone(machine: Machine) -> None:
    code = "import gpytorch.distributions as d; print(d.Normal().log_prob(0), hasattr(d.normal, 'Ours'))"
    upstream, overlay = machine.upstream(), machine.overlay()
    assert machine.run(code, [upstream, overlay]) == "upstream False\n"
    assert machine.run(code, [overlay, upstream]) == "ours True\n"


def test_modules_and_classes_keep_their_names_and_sources(machine: Machine) -> None:
    overlay, upstream = machine.overlay(), machine.upstream()
    code = """
import inspect, json, pickle
import gpytorch
from gpytorch.distributions import Normal, Student, delta, normal
print(json.dumps(dict(
    lacking=[gpytorch.means.__file__, delta.__file__],
    extended=normal.__file__, package=gpytorch.distributions.__file__,
    path=gpytorch.__path__, locations=gpytorch.__spec__.submodule_search_locations,
    module=Normal.__module__, same=Normal is gpytorch.distributions.Normal and Student.__mro__[1] is Normal,
    pickled=type(pickle.loads(pickle.dumps(Normal()))) is Normal and pickle.loads(pickle.dumps(Normal().draw))(),
    sources=[inspect.getsource(x) for x in (Normal, Normal.log_prob, gpytorch.means.Mean, normal)],
    documentation=Normal.log_prob.__doc__, inherited=Student.draw_many.__doc__, undocumented=Normal.draw.__doc__,
    names=[Normal.log_prob.__qualname__, Normal.draw.__qualname__, Normal.draw.__name__, Normal.draw.__module__],
)))
"""
    seen = json.loads(machine.run(code, [overlay, upstream]))
    files = {name: str(upstream / "gpytorch" / name) for name in STAND_IN}
    assert seen["lacking"] == [files["means.py"], files["distributions/delta.py"]]
    assert seen["extended"] == files["distributions/normal.py"]
    assert seen["package"] == files["distributions/__init__.py"]
    assert seen["path"] == seen["locations"] == [str(overlay / "gpytorch"), str(upstream / "gpytorch")]
    assert seen["module"] == "gpytorch.distributions.normal"
    assert seen["same"]
    assert seen["pickled"] == "ours"
    beginnings = ["class Normal:", "@_upstream.replaces(Normal)", "class Mean", "class Normal"]
    assert [s.startswith(b) for s, b in zip(seen["sources"], beginnings, strict=True)] == [True] * 4, seen["sources"]
    assert seen["documentation"] == "Return upstream's answer.\n\n:param value: Anything.\n\nOurs is faster."
    assert seen["inherited"] == "Return a list.\n\nA long one."
    assert seen["undocumented"] is None
    assert seen["names"] == ["Normal.log_prob", "Normal.draw", "draw", "gpytorch.distributions.normal"]


def test_copies_of_the_overlay_do_not_take_each_other_for_upstream(machine: Machine) -> None:
    first, second, third = (machine.overlay(name) for name in ("first", "second", "third"))
    upstream = machine.upstream()
    path = [first, second, upstream, third]
    assert is_in_effect(machine.report(path))
    code = "import gpytorch, sys; print(sys.modules['gpytorch._upstream'].__file__, *gpytorch.__path__, sep='\\n')"
    expected = [first / "gpytorch" / "_upstream.py", first / "gpytorch", upstream / "gpytorch"]
    assert machine.run(code, path).split() == [str(file) for file in expected]


def test_upstream_behind_a_finder_of_its_own_is_found(machine: Machine) -> None:
    root = machine.upstream() / "gpytorch"
    install = f"""
    import importlib.util, sys
    class Editable:
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name == "gpytorch":
                return importlib.util.spec_from_file_location(name, {str(root / "__init__.py")!r})
    class Old:  # a finder as they were before find_spec, which Python 3.11 still knows
        @classmethod
        def find_module(cls, name, path=None):
            return None
    sys.meta_path += [Editable] if sys.version_info >= (3, 12) else [Old, Editable]
    import gpytorch"""
    assert is_in_effect(machine.report([machine.overlay()], install.strip()))


MISSING = {
    "nothing": {},
    "only a folder of that name": {"notes/README": "not a package"},
    "only another overlay": OVERLAY | {"_upstream.py": "", "__init__.py": ""},
}


@pytest.mark.parametrize("files", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("first", ["gpytorch", "gpytorch.distributions.normal"])
def test_missing_upstream_says_what_to_install(machine: Machine, files: dict[str, str], first: str) -> None:
    overlay, other = machine.overlay(), write(machine.folder / "other", files)
    result = machine.attempt(f"import {first}", [overlay, other])
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: gpytorch-tensors lies over an installed GPyTorch, and none was found.")
    assert "`pip install 'gpytorch>=1.15,<=1.15.2'`" in last_line
    machine.run(f"import {first}", [overlay, other, machine.upstream()])


# Whether each is in the tested range, takes the overlay where nothing has changed in it, or does not by its number.
VERSIONS = {
    "1.15": True,
    "1.15.0": True,
    "1.15.1": True,
    "1.15.2": True,
    "1.15.2.0": True,
    "1.15.2+local": True,
    "1.14.9": False,
    "1.15.2.1": None,
    "1.15.3": None,
    "1.15.3.dev4+g82adcaa": None,
    "1.15.2rc1": None,
    "1.16": False,
    "1.150": False,
    "2.0.0": False,
    "Unknown": False,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_one_warning_names_both_versions_of_another_minor_release(machine: Machine, version: str) -> None:
    path = [machine.overlay(), machine.upstream(**{"version.py": f"version = {version!r}\n"})]
    report = machine.report(path, "import gpytorch; import gpytorch.means, gpytorch.distributions.normal")
    assert report["flag"] is True
    if VERSIONS[version] is not False:
        assert report["warnings"] == []
        assert is_in_effect(report)
        untested = (
            f"GPyTorch {version} takes the overlay: this overlay was tested with 1.15 to 1.15.2, and all that is "
        )
        assert report["logged"] == ([] if VERSIONS[version] else [untested + "replaced is as it was there."])
    else:
        assert is_stock(report)
        assert not report["loaded"]
        [(category, message, file)] = report["warnings"]
        assert category == "RuntimeWarning"
        assert f"the installed GPyTorch is {version}, this overlay was tested with 1.15 to 1.15.2" in message
        assert "has no effect" in message and "Install gpytorch>=1.15,<=1.15.2" in message
        assert file == "<string>"  # the warning points to the user's own line


@pytest.mark.parametrize("file", [None, "", "raise ImportError('never built')"])
def test_upstream_without_a_version_is_outside_the_tested_range(machine: Machine, file: str | None) -> None:
    report = machine.report([machine.overlay(), machine.upstream(**{"version.py": file})])
    assert is_stock(report)
    [(_, message, _)] = report["warnings"]
    assert "the installed GPyTorch is of unknown version" in message


def changed(before: str, after: str) -> str:
    text = STAND_IN["distributions/normal.py"]
    assert before in text
    return text.replace(before, after)


FITTING = {
    "same": changed("", ""),
    "annotated": changed("value, scale=1", "value: object, scale: int = 1"),
    "another body": changed('return "upstream"', 'return "up" + "stream"'),
}
MISFITS = {
    "renamed": changed("value, scale=1", "values, scale=1"),
    "added": changed("value, scale=1", "value, scale=1, sample=None"),
    "removed": changed("value, scale=1", "value"),
    "another default": changed("value, scale=1", "value, scale=2"),
    "keyword only": changed("value, scale=1", "value, *, scale=1"),
    "method renamed": changed(
        "def log_prob(", "def __getattr__(self, name): return self.log_p\n\n            def log_p("
    ),
    "no longer a method": changed(
        "def log_prob(", "log_prob = property(lambda self: self.log_p)\n\n            def log_p("
    ),
}


@pytest.mark.parametrize("normal", FITTING.values(), ids=FITTING)
def test_method_with_the_same_parameters_is_replaced(machine: Machine, normal: str) -> None:
    report = machine.report([machine.overlay(), machine.upstream(**{"distributions/normal.py": normal})])
    assert is_in_effect(report)
    assert report["warnings"] == []


@pytest.mark.parametrize("normal", MISFITS.values(), ids=MISFITS)
def test_one_method_with_other_parameters_leaves_all_as_they_are(machine: Machine, normal: str) -> None:
    report = machine.report([machine.overlay(), machine.upstream(**{"distributions/normal.py": normal})])
    assert is_stock(report)
    assert report["flag"] is True
    [(category, message, file)] = report["warnings"]
    assert category == "RuntimeWarning"
    assert "Normal.log_prob has other parameters" in message
    assert "the installed GPyTorch is 1.15.2, this overlay was tested with 1.15 to 1.15.2" in message
    assert file == "<string>"


RECORD = """
from gpytorch import _upstream
names = ["gpytorch.distributions.normal:Normal.log_prob", "gpytorch.distributions.normal:Normal.draw_many",
    "gpytorch.distributions.normal:Normal.gone"]
print({name: [digest] for name, digest in _upstream.digests(names).items()})
"""
CHANGES = {
    "nothing": (changed("", ""), None),
    "a method that is not replaced": (changed("return super()", "return 1 * super()"), None),
    "a comment elsewhere": (changed("class Student", "# A comment\n        class Student"), None),
    "the body of a method": (changed("Return upstream's answer", "Return an answer"), "log_prob"),
    "its decorator": (changed("def log_prob(", "@staticmethod\n            def log_prob("), "log_prob"),
    "its name": (changed("def log_prob(", "def log_p("), "log_prob"),
    "a method that there was not": (
        changed("def draw(self)", "def gone(self): ...\n\n            def draw(self)"),
        "gone",
    ),
    "all of the module": ("class Normal: ...\nclass Student: ...\n", "draw_many"),
}


@pytest.mark.parametrize("version", ["1.15.2", "1.15.3"])
@pytest.mark.parametrize(("normal", "misfit"), CHANGES.values(), ids=CHANGES)
def test_release_takes_effect_as_long_as_what_is_replaced_has_not_changed(
    machine: Machine, normal: str, misfit: str | None, version: str
) -> None:
    sources = machine.run(RECORD, [machine.overlay("plain"), machine.upstream()])
    overlay = machine.overlay(**{"_tested.py": f"SOURCES = {sources}"})
    upstream = machine.upstream(**{"version.py": f"version = {version!r}\n", "distributions/normal.py": normal})
    if misfit is None:
        report = machine.report([overlay, upstream])
        assert is_in_effect(report)
        assert report["warnings"] == []
        assert len(report["logged"]) == (version == "1.15.3")
        return
    result = machine.attempt(
        "import gpytorch.distributions.normal as n; print(hasattr(n, 'Ours'))", [overlay, upstream]
    )
    assert result.stdout == "False\n"
    assert result.stderr.count("RuntimeWarning: gpytorch-tensors has no effect") == 1
    assert f"the installed GPyTorch is {version}, this overlay was tested with 1.15 to 1.15.2" in result.stderr
    assert f"its Normal.{misfit} is not what it was in these" in result.stderr


def test_missing_private_name_leaves_all_as_they_are_and_says_what_to_install(machine: Machine) -> None:
    internals = "missing = ['torch._C._gone']\nREQUIREMENT = 'torch>=2.4'\ninstalled = lambda: 'torch 3.0'\n"
    report = machine.report([machine.overlay(**{"_internals.py": internals}), machine.upstream()])
    assert is_stock(report)
    assert report["flag"] is True
    assert not report["loaded"]
    [(category, message, file)] = report["warnings"]
    assert category == "RuntimeWarning"
    assert message.startswith("gpytorch-tensors has no effect: torch 3.0 has no torch._C._gone. ")
    assert "Install torch>=2.4, or a release of gpytorch-tensors that was tested with yours." in message
    assert file == "<string>"


@pytest.mark.parametrize("module", ["gpytorch.settings", "gpytorch", "gpytorch.means"])
def test_reload_keeps_the_overlay_in_effect(machine: Machine, module: str) -> None:
    path = [machine.overlay(), machine.upstream()]
    again = f"import gpytorch, importlib, sys; importlib.reload(sys.modules[{module!r}])"
    report = machine.report(path, again)
    assert is_in_effect(report)
    assert report["flag"] is True
    assert report["warnings"] == []
    documentation = machine.run(f"{again}; print(gpytorch.distributions.Normal.log_prob.__doc__)", path)
    assert documentation.count("Ours is faster.") == 1
    assert machine.run(f"{again}; print(len(gpytorch.__path__))", path) == "2\n"


def test_warning_turned_into_an_error_does_not_stick(machine: Machine) -> None:
    path = [machine.overlay(), machine.upstream(**{"version.py": "version = '1.16'"})]
    statement = """
    warnings.simplefilter("error")
    try:
        import gpytorch
    except RuntimeWarning:
        pass
    else:
        raise AssertionError("no warning")
    warnings.simplefilter("always")
    import gpytorch"""
    assert is_stock(machine.report(path, statement.strip()))
