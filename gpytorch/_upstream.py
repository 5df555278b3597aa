"""The overlay rule: this package lies over the installed GPyTorch and holds only what differs.

1. The overlay's ``gpytorch`` comes first on ``sys.path``. :func:`lay_over` continues its ``__path__`` with the
   installed package's, so that every module the overlay lacks is the installed one.
2. Each module the overlay does have begins with ``_upstream.extend(__name__)``, which runs the installed module of
   that name in the same namespace. There is one ``gpytorch.settings``, one ``MultivariateNormal``: the same names,
   the same pickles.
3. What the overlay changes it changes by assigning methods on the installed classes. :func:`replaces` notes each
   assignment and :func:`install` makes them all at once, or none of them.
4. Whether it takes effect is decided by what was tested: the parameters and sources of the functions that it replaces,
   or computes in its own way (:func:`stands_for`), and the private names of torch (:mod:`gpytorch._internals`).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path

from ._tested import SOURCES

SUPPORTED = ("1.15", "1.15.2")  # the first and the last release of GPyTorch that the test suite ran against

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_REQUIREMENT = "gpytorch>={},<={}".format(*SUPPORTED)
_TESTED = "this overlay was tested with {} to {}".format(*SUPPORTED)

_replacements: list[tuple[type, str, Callable]] = []
#: The functions that are replaced or stood for, as in :data:`gpytorch._tested.SOURCES`.
checked: set[str] = set()


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


def _numbers(version: str | None) -> list[int] | None:
    # Of a release; None for what is none, such as a pre-release or development version
    try:
        parts = [int(part) for part in (version or "").partition("+")[0].split(".")]
    except ValueError:
        return None
    return parts + [0] * (4 - len(parts))  # 1.15 is 1.15.0


def is_tested(version: str | None) -> bool:
    """Return whether `version` is a release in the range that the test suite ran against.

    :param version: A version of GPyTorch, or None for an unknown one.
    """
    numbers = _numbers(version)
    return numbers is not None and _numbers(SUPPORTED[0]) <= numbers <= _numbers(SUPPORTED[1])


def is_patch(version: str | None) -> bool:
    """Return whether `version` is, or leads to, a release that differs in its last number only from those tested.

    :param version: A version of GPyTorch, or None for an unknown one.
    """
    return version is not None and version.split(".")[:2] == SUPPORTED[1].split(".")[:2]


def lay_over(package: str, *rooms: str) -> None:
    """Lay the overlay's top-level `package` over the installed one, and run the installed one in its namespace.

    The flag exists whether or not the overlay takes effect, so that a script which sets it goes on working.

    :param package: The name of the package: "gpytorch".
    :param rooms: Modules that replace methods and have no namesake in the installed package, which would import it.
    """
    path = sys.modules[package].__path__
    path[:] = [str(_HERE), str(_ROOT)]
    import_module(f"{package}.settings")
    internals = import_module(f"{package}._internals")
    version = upstream_version()
    found, requirement = f"the installed GPyTorch is {version or 'of unknown version'}, {_TESTED}, and ", _REQUIREMENT
    misfit = None
    if not is_patch(version):
        misfit = "its version is not one of them"
    elif changed := _changed():
        misfit = f"its {changed.partition(':')[2]} is not what it was in these"
    elif internals.missing:
        found, requirement = "", internals.REQUIREMENT
        misfit = f"{internals.installed()} has no {', '.join(internals.missing)}"
    if misfit:
        path.remove(str(_HERE))
    _run(_ROOT / "__init__.py", package)
    if not misfit:
        for room in rooms:
            import_module(f"{package}.{room}")
        misfit = install()
    if misfit:
        warnings.warn(
            f"gpytorch-tensors has no effect: {found}{misfit}. GPyTorch runs as it is, and settings.use_torch_tensors "
            f"changes nothing. Install {requirement}, or a release of gpytorch-tensors that was tested with yours.",
            RuntimeWarning,
            stacklevel=3,  # whoever imports the package; Python leaves its own import frames out
        )
    elif not is_tested(version):
        logger.info("GPyTorch %s takes the overlay: %s, and all that is replaced is as it was there.", version, _TESTED)


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


def stands_for(*functions: Callable | property) -> None:
    """Note that the overlay computes in its own way what these functions of upstream's do.

    :param functions: Functions, methods or properties of the installed GPyTorch or linear_operator.
    """
    checked.update(_name(function.fget if isinstance(function, property) else function) for function in functions)


def _name(function: Callable) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _source(text: str, cls: str, function: str) -> str:
    # A method's lines in the text of a module, without parsing all of that: once more if the class is defined twice
    found = []
    for indent, body in re.findall(rf"^( *)class {cls}\b.*\n((?:\1 +.*\n|\s*\n)*)", text, re.MULTILINE):
        head = rf"(?:^{indent}    @.*\n)*^{indent}    def {function}\("
        found += re.findall(rf"{head}(?:.*\n)(?:{indent}    [ )].*\n|\s*\n)*", body, re.MULTILINE)
    return "".join(found).rstrip()


def digests(names: Iterable[str]) -> dict[str, str]:
    """Return digests of the sources of methods, which are read and not run.

    :param names: The methods' modules and names, as in "gpytorch.kernels.kernel:Kernel.forward".
    :return: Their digests; "" for one that there is not.
    """
    found: dict[str, str] = {}
    for module, of_module in groupby(sorted(names), key=lambda name: name.partition(":")[0]):
        package, *parts = module.split(".")
        root = _ROOT if package == "gpytorch" else Path(find_spec(package).origin).parent
        file = root.joinpath(*parts).with_suffix(".py")
        text = file.read_text("utf-8") if file.exists() else ""
        for name in of_module:
            source = _source(text, *name.partition(":")[2].split("."))
            found[name] = hashlib.sha256(source.encode()).hexdigest()[:16] if source else ""
    return found


def _changed() -> str | None:
    # The first of the functions that were tested which the installed GPyTorch does not have as it was
    found = digests(SOURCES)
    return next((name for name, tested in SOURCES.items() if found[name] not in tested), None)


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
        stands_for(original)
    # As a user sees them, inherited or not, and before one replacement shows in the docstring of the next.
    docs = [inspect.getdoc(getattr(owner, name)) for owner, name, _ in noted]
    for (owner, name, function), doc in zip(noted, docs, strict=True):
        parts = (inspect.cleandoc(part) for part in (doc, function.__doc__) if part)
        function.__doc__ = "\n\n".join(parts) or None
        function.__name__, function.__qualname__ = name, f"{owner.__qualname__}.{name}"  # a bound method's pickle
        setattr(owner, name, function)
    return None
