"""The overlay rule: this package lies over the installed GPyTorch and holds only what differs.

1. The overlay's ``gpytorch`` comes first on ``sys.path``. :func:`lay_over` continues its ``__path__`` with the
   installed package's, so that every module the overlay lacks is the installed one.
2. Each module the overlay does have begins with ``_upstream.extend(__name__)``, which runs the installed module of
   that name in the same namespace. There is one ``gpytorch.settings``, one ``MultivariateNormal``: the same names,
   the same pickles.
3. What the overlay changes it changes by assigning methods on the installed classes. :func:`replaces` notes each
   assignment and :func:`install` makes them all at once, or none of them.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

SUPPORTED = ("1.15", "1.15.2")  # the first and the last release of GPyTorch that the test suite ran against

_HERE = Path(__file__).resolve().parent
_REQUIREMENT = "gpytorch>={},<={}".format(*SUPPORTED)
_TESTED = "this overlay was tested with {} to {}".format(*SUPPORTED)

_replacements: list[tuple[type, str, Callable]] = []


def _find() -> ModuleSpec:
    """Return the spec of the installed GPyTorch: the first ``gpytorch`` on the path that is not an overlay."""
    for finder in sys.meta_path:
        # PathFinder would stop at the overlay, so it looks at one entry of the path at a time. The others (an editable
        # install has its own) know of one package only.
        for path in [[entry] for entry in sys.path] if finder is PathFinder else [None]:
            spec = finder.find_spec("gpytorch", path) if hasattr(finder, "find_spec") else None
            if spec and spec.origin and not (Path(spec.origin).parent / Path(__file__).name).exists():
                return spec
    raise ImportError(
        "gpytorch-tensors lies over an installed GPyTorch, and none was found. Install it with "
        f"`pip install '{_REQUIREMENT}'`.",
        name="gpytorch",
    )


_ROOT = Path(_find().origin).parent


def _run(file: Path, name: str) -> None:
    module = sys.modules[name]
    module.__file__ = str(file)  # inspect.getsource(cls) looks here; functions know their own file
    spec_from_file_location(name, file).loader.exec_module(module)


def upstream_version() -> str | None:
    """Return the version that the installed GPyTorch gives itself, or None where it gives none."""
    try:
        return import_module("gpytorch.version").version
    except (ImportError, AttributeError):  # a checkout that was never built
        return None


def is_supported(version: str | None) -> bool:
    """Return whether `version` is a release in the range that the test suite ran against.

    :param version: A version of GPyTorch, or None for an unknown one.
    """

    def numbers(release: str) -> list[int]:
        parts = [int(part) for part in release.partition("+")[0].split(".")]
        return parts + [0] * (4 - len(parts))  # 1.15 is 1.15.0

    try:
        return version is not None and numbers(SUPPORTED[0]) <= numbers(version) <= numbers(SUPPORTED[1])
    except ValueError:  # a pre-release or development version
        return False


def lay_over(package: str) -> None:
    """Lay the overlay's top-level `package` over the installed one, and run the installed one in its namespace.

    The flag exists whether or not the overlay takes effect, so that a script which sets it goes on working.

    :param package: The name of the package: "gpytorch".
    """
    path = sys.modules[package].__path__
    path[:] = [str(_HERE), str(_ROOT)]
    import_module(f"{package}.settings")
    version = upstream_version()
    if is_supported(version):
        _run(_ROOT / "__init__.py", package)
        misfit = install()
    else:
        path.remove(str(_HERE))
        _run(_ROOT / "__init__.py", package)
        misfit = "its version is not one of them"
    if misfit:
        warnings.warn(
            f"gpytorch-tensors has no effect: the installed GPyTorch is {version or 'of unknown version'}, {_TESTED}, "
            f"and {misfit}. GPyTorch runs as it is, and settings.use_torch_tensors changes nothing. Install "
            f"{_REQUIREMENT}, or a release of gpytorch-tensors that was tested with yours.",
            RuntimeWarning,
            stacklevel=3,  # whoever imports the package; Python leaves its own import frames out
        )


def extend(name: str) -> None:
    """Run the installed GPyTorch's module `name` in the namespace of the overlay's module of the same name.

    :param name: The ``__name__`` of the overlay's module.
    """
    module = sys.modules[name]
    file = _ROOT.joinpath(*name.split(".")[1:])
    if hasattr(module, "__path__"):
        module.__path__.append(str(file))
        _run(file / "__init__.py", name)
    else:
        _run(file.with_suffix(".py"), name)


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


def _parameters(function: Callable) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.replace(annotation=parameter.empty) for parameter in parameters]


def install() -> str | None:
    """Make every noted replacement, or, if one of them does not fit what it replaces, none.

    :return: What does not fit, or None.
    """
    noted = list(_replacements)
    _replacements.clear()  # a reload of the package notes nothing anew, and must not replace a replacement
    for owner, name, function in noted:
        original = getattr(owner, name, None)
        if not callable(original) or _parameters(original) != _parameters(function):
            return f"its {owner.__qualname__}.{name} has other parameters than theirs"
    # As a user sees them, inherited or not, and before one replacement shows in the docstring of the next.
    docs = [inspect.getdoc(getattr(owner, name)) for owner, name, _ in noted]
    for (owner, name, function), doc in zip(noted, docs, strict=True):
        parts = (inspect.cleandoc(part) for part in (doc, function.__doc__) if part)
        function.__doc__ = "\n\n".join(parts) or None
        function.__name__, function.__qualname__ = name, f"{owner.__qualname__}.{name}"  # a bound method's pickle
        setattr(owner, name, function)
    return None
