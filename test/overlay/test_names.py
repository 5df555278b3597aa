"""The reach of the patch: what `gpytorch` offers under the overlay, against what the installed one offers alone."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, Environment

# The modules that upstream has too offer upstream's names, and these.
ADDITIONS = {
    "gpytorch.settings": {"use_torch_tensors"},
    "gpytorch.functions": {"TensorInvQuadLogdet"},
}
SURVEY = r"""
import __future__, importlib, inspect, json, pkgutil, re, sys, types, warnings

warnings.simplefilter("ignore")
import gpytorch

def describe(thing):
    try:
        parameters = inspect.signature(thing).parameters.values()
        bare = [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]
        signature = re.sub(r"0x[0-9a-f]+", "0x", ", ".join(bare))
    except (TypeError, ValueError):
        signature = None
    return [type(thing).__name__, signature, inspect.getdoc(thing)]

def is_public(name, thing):
    # A function that is a method by its full name is one that an overlay's module assigned to a class.
    is_method = isinstance(thing, types.FunctionType) and "." in thing.__qualname__
    return not (name.startswith("_") or is_method or isinstance(thing, (types.ModuleType, __future__._Feature)))

def is_offered(module, thing):
    # What a module merely imports is its own business; what a package imports it hands on.
    return hasattr(module, "__path__") or getattr(thing, "__module__", module.__name__) == module.__name__

def home(thing):
    # Whether a class or function is the one that its own module has under its name.
    names = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return isinstance(thing, (type, types.FunctionType)) and getattr(sys.modules.get(names[0]), names[1], None) is thing

survey = {}
for found in pkgutil.walk_packages(gpytorch.__path__, "gpytorch."):
    try:
        importlib.import_module(found.name)
    except ImportError as error:  # of an optional dependency
        survey[found.name] = dict(error=str(error))
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] != "gpytorch":
        continue
    names = {key: thing for key, thing in vars(module).items() if is_public(key, thing)}
    classes = {key: thing for key, thing in names.items() if isinstance(thing, type)}
    members = {
        f"{key}.{member}": describe(getattr(thing, member))
        for key, thing in classes.items() for member in dir(thing) if not member.startswith("_")
    }
    survey[name] = dict(
        all=getattr(module, "__all__", None),
        offered=[key for key, thing in names.items() if is_offered(module, thing)],
        names={key: [*describe(thing), home(thing)] for key, thing in names.items()},
        members=members,
        bases={key: [base.__qualname__ for base in thing.__mro__] for key, thing in classes.items()},
    )
print(json.dumps(survey))
"""


@pytest.fixture(scope="module")
def stock_survey(stock: Environment) -> dict:
    return json.loads(stock.run(SURVEY))


@pytest.fixture(scope="module")
def survey(overlaid: Environment) -> dict:
    return json.loads(overlaid.run(SURVEY))


def is_stock_plus_ours(documented: list, stock: list) -> bool:
    """Whether type and signature are stock's, and the docstring begins with stock's."""
    return documented[:2] == stock[:2] and (documented[2] or "").startswith(stock[2] or "")


def test_every_module_of_stock_is_there_and_new_ones_are_files_of_ours(survey: dict, stock_survey: dict) -> None:
    files = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "gpytorch").rglob("*.py")]
    ours = {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert set(stock_survey) <= set(survey)
    assert set(survey) - set(stock_survey) <= ours
    assert len(stock_survey) > 100


def test_modules_offer_the_names_of_stock_and_the_intended_additions(survey: dict, stock_survey: dict) -> None:
    added = {
        module: difference
        for module, stock in stock_survey.items()
        if (difference := set(survey[module].get("offered", ())) - set(stock.get("names", ())))
    }
    assert added == ADDITIONS
    for module, stock in stock_survey.items():
        assert set(stock.get("names", ())) <= set(survey[module].get("names", ())), module
        assert survey[module].get("error") == stock.get("error")
        if stock.get("all") is not None:
            assert survey[module]["all"] == [*stock["all"], *sorted(ADDITIONS.get(module, ()))]


def test_names_keep_signature_docstring_bases_and_identity(survey: dict, stock_survey: dict) -> None:
    compared = 0
    for module, stock in stock_survey.items():
        for name, described in stock.get("names", {}).items():
            ours = survey[module]["names"][name]
            assert is_stock_plus_ours(ours[:3], described[:3]), (module, name, ours, described)
            assert ours[3] == described[3], (module, name)
            compared += 1
        assert survey[module].get("bases", {}).items() >= stock.get("bases", {}).items()
    assert compared > 1000


def test_members_of_classes_keep_signature_and_docstring(survey: dict, stock_survey: dict) -> None:
    compared = 0
    for module, stock in stock_survey.items():
        ours = survey[module].get("members", {})
        added = {name for name in set(ours) - set(stock.get("members", {})) if name.split(".")[0] in stock["names"]}
        assert added == set(), module
        for name, described in stock.get("members", {}).items():
            assert is_stock_plus_ours(ours[name], described), (module, name, ours[name], described)
            compared += 1
    assert compared > 10_000
