"""Releases to come: the installed GPyTorch with a change in it, and torch with a name less."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, run

from gpytorch import _upstream

STEP = """
import json, logging, sys, warnings
logged = []
class Handler(logging.Handler):
    def emit(self, record): logged.append(record.getMessage())
logging.getLogger("gpytorch").addHandler(Handler())
logging.getLogger("gpytorch").setLevel(logging.INFO)
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import gpytorch

class GP(gpytorch.models.ExactGP):
    def __init__(self, x, y):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

x = torch.linspace(0, 1, 40, dtype=torch.float64).unsqueeze(-1)
model = GP(x, torch.sin(6 * x.squeeze(-1))).double()
mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
found = {{}}
for flag in (False, True):
    mll.train().zero_grad()
    with gpytorch.settings.use_torch_tensors(flag):
        loss = -mll(model(x), model.train_targets)
        loss.backward()
        model.eval()
        variance = model(x[:3] + 0.01).variance
        found[flag] = [loss.item(), *(p.grad.sum().item() for p in mll.parameters()), *variance.tolist()]
dense = sys.modules.get("gpytorch.dense")
print(json.dumps(dict(
    off=found[False], on=found[True], routes=dense and dict(dense.routes), logged=logged,
    warnings=[str(w.message) for w in caught if "gpytorch-tensors" in str(w.message)],
)))
"""


def step(folder: Path, *path: Path, before: str = "") -> dict:
    """Return what a training step and a prediction say, with the flag off and on, in a process of their own."""
    paths = [ROOT, *path, *(entry for entry in sys.path if entry.endswith("-packages"))]
    code = STEP.format(before=before)
    done = run([sys.executable, "-c", code], folder, PYTHONPATH=":".join(map(str, paths)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed GPyTorch, one patch release further on."""
    shutil.copytree(_upstream._ROOT, tmp_path / "copy" / "gpytorch", ignore=shutil.ignore_patterns("__pycache__"))
    first, second = _upstream.SUPPORTED[1].split(".")[:2]
    version = tmp_path / "copy" / "gpytorch" / "version.py"
    version.write_text(f"version = __version__ = '{first}.{second}.99'\n")
    return tmp_path / "copy"


def test_patch_release_that_leaves_alone_what_is_replaced_takes_effect(copy: Path, tmp_path: Path) -> None:
    found = step(tmp_path, copy)
    assert found["warnings"] == []
    [line] = found["logged"]
    assert line.startswith("GPyTorch 1.15.99 takes the overlay: this overlay was tested with ")
    assert found["routes"] == {"tensors": 2}
    assert found["on"] == pytest.approx(found["off"], rel=1e-8)


CHANGED = {
    "a replaced method": ("mlls/exact_marginal_log_likelihood.py", "ExactMarginalLogLikelihood.forward"),
    "a kernel with a closed form": ("kernels/rq_kernel.py", "RQKernel.forward"),
    "a method of the strategy": ("models/exact_prediction_strategies.py", "DefaultPredictionStrategy._mean_cache"),
}


@pytest.mark.parametrize(("file", "method"), CHANGED.values(), ids=CHANGED)
def test_release_that_changed_it_has_no_effect_and_says_which_method(
    copy: Path, tmp_path: Path, file: str, method: str
) -> None:
    module = copy / "gpytorch" / file
    text = module.read_text()
    body = _upstream._source(text, *method.split("."))
    module.write_text(text.replace(body, body + "\n        # as before, in other words"))
    found = step(tmp_path, copy)
    assert found["routes"] is None
    assert found["on"] == found["off"]
    [message] = found["warnings"]
    assert (
        f"the installed GPyTorch is 1.15.99, this overlay was tested with 1.15 to {_upstream.SUPPORTED[1]}" in message
    )
    assert f"and its {method} is not what it was in these" in message


@pytest.mark.parametrize("name", ["_functorch.is_functorch_wrapped_tensor", "_functorch.is_legacy_batchedtensor"])
def test_torch_without_a_private_name_has_no_effect_and_a_step_is_stocks(tmp_path: Path, name: str) -> None:
    found = step(tmp_path, before=f"del torch._C.{name}")
    assert found["routes"] is None
    assert found["on"] == found["off"]
    [message] = found["warnings"]
    assert f" has no torch._C.{name}. " in message and "torch 2." in message
    assert "Install torch>=2.4" in message


def test_torch_without_the_names_that_only_save_work_takes_effect(tmp_path: Path) -> None:
    names = "_will_engine_execute_node", "_AutoDispatchBelowAutograd", "_autograd._get_current_graph_task_keep_graph"
    before = ""
    for place, name in (f"torch._C.{name}".rsplit(".", 1) for name in names):
        before += f"if hasattr({place}, {name!r}): del {place}.{name}\n"
    found = step(tmp_path, before=before)
    assert found["warnings"] == []
    assert found["routes"] == {"tensors": 2}
    assert found["on"] == pytest.approx(found["off"], rel=1e-8)


def test_all_that_is_replaced_or_stood_for_is_recorded() -> None:
    for file in (ROOT / "gpytorch").rglob("*.py"):
        import_module(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    of_torch = {name for name in _upstream.checked if name.startswith("torch.")}
    of_some = {
        "gpytorch.likelihoods.likelihood:Likelihood.__call__",  # which there is where Pyro is installed
        "gpytorch.models.exact_gp:ExactGP._get_test_prior_mean_and_covariances",  # from 1.15.2 on
    }
    assert _upstream.checked - of_torch | of_some == set(_upstream.SOURCES)
    assert len(_upstream.SOURCES) > 40
