"""The overlay rule: this package lies over the installed GPyTorch and holds only what differs.

1. The overlay's ``gpytorch`` comes first on ``sys.path``. :func:`lay_over` continues its ``__path__`` with the
   installed package's, so that every module the overlay lacks is the installed one.
2. Each module the overlay does have begins with ``_upstream.extend(__name__)``, which runs the installed module of that name in
   the same namespace. There is one ``gpytorch.settings``, one ``MultivariateNormal``: the same names, the same pickles.
3. What the overlay changes it changes by assigning methods on the installed classes. :func:`replaces` notes each
   assignment and :func:`install` makes them all at once, or none of them.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

SUPPORTED = ("1.15", "1.15.2")  # the first and the last release of GPyTorch that the test suite ran against

_HERE = Path(__file__).resolve().parent
_ADVICE = "Install gpytorch>={},<={}, or a release of gpytorch-tensors that was tested with yours".format(*SUPPORTED)

_replacements: list[tuple[type, str, Callable]] = []


def _find() -> ModuleSpec:
    """Return the spec of the installed GPyTorch: the first ``gpytorch`` on the path that is not an overlay."""
    for finder in list(sys.meta_path):
        for path in [[entry] for entry in sys.path] if finder is PathFinder else [None]:
            spec = finder.find_spec("gpytorch", path) if hasattr(finder, "find_spec") else None
            if spec and spec.origin and not (Path(spec.origin).parent / Path(__file__).name).exists():
                return spec
    raise ImportError(
        "gpytorch-tensors lies over an installed GPyTorch, and none was found. Install it with "
        f"`pip install 'gpytorch>={SUPPORTED[0]},<={SUPPORTED[1]}'`.",
        name="gpytorch",
    )


_ROOT = Path(_find().origin).parent


def _run(file: Path, name: str) -> None:
    spec = spec_from_file_location(name, file)
    spec.loader.exec_module(sys.modules[name])
    sys.modules[name].__file__ = str(file)  # inspect.getsource(cls) looks here; functions know their own file


def upstream_version() -> str:
    """Return the version that the installed GPyTorch gives itself."""
    namespace: dict = {}
    version = _ROOT / "version.py"
    if version.exists():
        exec(compile(version.read_text(), str(version), "exec"), namespace)
    return namespace.get("version", "of unknown version")


def is_supported(version: str) -> bool:
    """Return whether `version` lies in the range of releases that the test suite ran against."""
    numbers = version.split("+")[0].split(".")
    if len(numbers) < 2 or not all(part.isdigit() for part in numbers):
        return False
    low, high = (tuple(int(part) for part in (bound + ".0").split(".")[:3]) for bound in SUPPORTED)
    return low <= tuple(int(part) for part in (numbers + ["0"])[:3]) <= high


def lay_over(package: str) -> None:
    """Lay the overlay's top-level `package` over the installed one, and run the installed one in its namespace.

    The flag exists whether or not the overlay takes effect, so that a script which sets it goes on working.

    :param package: The name of the package: "gpytorch".
    """
    module = sys.modules[package]
    module.__path__ = [str(_HERE), str(_ROOT)]
    __import__(f"{package}.settings")
    version = upstream_version()
    supported = is_supported(version)
    if not supported:
        module.__path__.remove(str(_HERE))
        _refuse(f"the installed GPyTorch is {version}, and this overlay was tested with {' to '.join(SUPPORTED)}")
    _run(_ROOT / "__init__.py", package)
    if supported:
        install(version)


def extend(name: str) -> None:
    """Run the installed GPyTorch's module `name` in the namespace of the overlay's module of the same name.

    :param name: The ``__name__`` of the overlay's module.
    """
    module = sys.modules[name]
    relative = Path(*name.split(".")[1:])
    if hasattr(module, "__path__"):
        module.__path__.append(str(_ROOT / relative))
        _run(_ROOT / relative / "__init__.py", name)
    else:
        _run((_ROOT / relative).with_suffix(".py"), name)


def replaces(owner: type, name: str | None = None) -> Callable[[Callable], Callable]:
    """Note that the decorated function is to take the place of the method of that name on `owner`.

    The function keeps the replaced method's docstring in front of its own.

    :param owner: A class of the installed GPyTorch.
    :param name: The method's name (Default: the function's).
    """

    def note(function: Callable) -> Callable:
        _replacements.append((owner, name or function.__name__, function))
        return function

    return note


def _parameters(function: Callable) -> list[tuple]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def install(version: str) -> None:
    """Make every noted replacement, or, if one of them no longer fits what it replaces, none.

    :param version: The installed GPyTorch's version, for the warning.
    """
    for owner, name, function in _replacements:
        original = getattr(owner, name, None)
        if original is None or _parameters(original) != _parameters(function):
            return _refuse(
                f"{owner.__qualname__}.{name} of the installed GPyTorch {version} has other parameters than in the "
                f"releases that this overlay was tested with ({' to '.join(SUPPORTED)})"
            )
    for owner, name, function in _replacements:
        original = getattr(owner, name)
        docs = (inspect.cleandoc(doc) for doc in (original.__doc__, function.__doc__) if doc)
        function.__doc__ = "\n\n".join(docs) or None
        function.__qualname__ = f"{owner.__qualname__}.{name}"
        setattr(owner, name, function)


def _refuse(reason: str) -> None:
    warnings.warn(
        f"gpytorch-tensors has no effect: {reason}. GPyTorch runs as it is, and settings.use_torch_tensors changes "
        f"nothing. {_ADVICE}.",
        RuntimeWarning,
        stacklevel=4,
    )
