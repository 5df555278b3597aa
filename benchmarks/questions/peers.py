"""How does GPyTorch, with the flag off and on, compare with other libraries?

The same kernel, hyperparameters and data; value and gradient of the negative log marginal likelihood with respect to
the logarithms of outputscale, lengthscales and noise, and mean and variance of a trained model's prediction. Nobody is
timed before everybody has computed the same numbers. A library that is not installed is left out by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import gpytorch

from ..shared import bare
from ..shared.measuring import Advance, Variant, cases_of, check_same, rows_in_turn, with_room
from ..shared.models import ExactGP, mean_and_variance, problem_of, test_points_of, training_step
from ..shared.options import Options
from ..shared.pictures import time_pictures
from ..shared.rows import Case, Row, grouped, setting_and_mode
from ..shared.tables import Table, ratio_tables, say, titled
from ..shared.ways import STOCK, TENSORS, run_in

TITLE = "Against other libraries"
GRADIENT, PREDICTION = "value and gradient", "prediction, later call"
OUTPUTSCALE, LENGTHSCALE, NOISE = 1.3, 0.7, 0.1
TEST_POINTS = 100
TORCH, SKLEARN, TINYGP = "plain torch", "scikit-learn", "tinygp"
MODULES = {"scikit-learn": "sklearn", "tinygp": "tinygp", "jax": "jax"}


@dataclass(frozen=True)
class Peer:
    """A provider's two calls, as they are timed, and how to read the first one's result.

    :param in_logarithms: Turns the result of `gradient` into the value, a point, and the gradient by logarithms of the
        outputscale, the lengthscales and the noise.
    """

    gradient: Callable[[], Any]  # value and gradient, of whatever parameters the library has
    prediction: Callable[[], Any]  # mean and variance
    in_logarithms: Callable[[Any], torch.Tensor]


cases = partial(cases_of, "peers", sizes=(20, 50, 100, 200, 500, 1000, 2000), quick=(20, 100, 500), m=TEST_POINTS)


def _gpytorch(way: str, case: Case, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor) -> Peer:
    def make() -> ExactGP:
        model = ExactGP(x, y, case.kernel).to(x)
        model.mean_module = gpytorch.means.ZeroMean()
        model.covar_module.outputscale = OUTPUTSCALE
        model.covar_module.base_kernel.lengthscale = LENGTHSCALE
        model.likelihood.noise = NOISE
        return model

    trained, asked = make(), make().eval()
    step = training_step(trained)
    scale, noise = trained.covar_module, trained.likelihood.noise_covar
    raw = [scale.raw_outputscale, scale.base_kernel.raw_lengthscale, noise.raw_noise]
    natural = [scale.outputscale, scale.base_kernel.lengthscale, noise.noise]
    # The constraints are softplus plus a constant: its slope is the logistic function.
    slopes = [
        (value / torch.sigmoid(parameter)).detach().reshape(-1) for value, parameter in zip(natural, raw, strict=True)
    ]

    def in_logarithms(loss: torch.Tensor) -> torch.Tensor:
        gradients = [parameter.grad.reshape(-1) * slope for parameter, slope in zip(raw, slopes, strict=True)]
        return torch.cat([loss.reshape(1), *gradients])

    return Peer(run_in(way, step), run_in(way, partial(mean_and_variance, asked, test_x)), in_logarithms)


def _plain_torch(case: Case, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor) -> Peer:
    scales = torch.tensor([OUTPUTSCALE, *[LENGTHSCALE] * case.d, NOISE], dtype=x.dtype, device=x.device)
    logarithms = scales.log().requires_grad_(True)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        natural = logarithms.exp()
        problem = bare.Problem(x, y, case.kernel, zero, natural[0], natural[1:-1], natural[-1])
        loss = bare.loss(problem, bare.by_autograd)
        return loss.detach(), torch.autograd.grad(loss, logarithms)[0]

    covariance = OUTPUTSCALE * bare.correlation(x, x, scales[1:-1], case.kernel)
    covariance.diagonal().add_(NOISE)
    factor = torch.linalg.cholesky(covariance)
    alpha = torch.cholesky_solve(y.unsqueeze(-1), factor)

    def prediction() -> torch.Tensor:
        cross = OUTPUTSCALE * bare.correlation(x, test_x, scales[1:-1], case.kernel)
        half = torch.linalg.solve_triangular(factor, cross, upper=False)
        return torch.cat([(cross.mT @ alpha).squeeze(-1), OUTPUTSCALE - half.square().sum(0)])

    return Peer(gradient, prediction, lambda found: torch.cat([found[0].reshape(1), found[1]]))


def _scikit_learn(case: Case, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor) -> Peer:
    from sklearn.gaussian_process import GaussianProcessRegressor, kernels

    lengthscales = np.full(case.d, LENGTHSCALE)
    base = kernels.RBF(lengthscales) if case.kernel == "rbf" else kernels.Matern(lengthscales, nu=2.5)
    kernel = kernels.ConstantKernel(OUTPUTSCALE) * base + kernels.WhiteKernel(NOISE)
    model = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(x.numpy(), y.numpy())
    theta, points = model.kernel_.theta, test_x.numpy()

    def prediction() -> np.ndarray:
        mean, deviation = model.predict(points, return_std=True)
        return np.concatenate([mean, deviation**2 - NOISE])  # its variance is that of an observation

    return Peer(
        lambda: model.log_marginal_likelihood(theta, eval_gradient=True, clone_kernel=False),
        prediction,
        lambda found: torch.as_tensor(np.append(found[0], found[1]) / -case.n),
    )


def _tinygp(case: Case, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor) -> Peer:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from tinygp import GaussianProcess, kernels, transforms
    from tinygp.kernels.distance import L2Distance

    points, targets, asked = (jnp.asarray(tensor.numpy()) for tensor in (x, y, test_x))
    base = kernels.ExpSquared() if case.kernel == "rbf" else kernels.Matern52(distance=L2Distance())

    def process(logarithms: jax.Array) -> GaussianProcess:
        natural = jnp.exp(logarithms)
        kernel = natural[0] * transforms.Linear(1 / natural[1:-1], base)
        return GaussianProcess(kernel, points, diag=natural[-1])

    logarithms = jnp.log(jnp.asarray([OUTPUTSCALE, *[LENGTHSCALE] * case.d, NOISE], dtype=points.dtype))
    gradient = jax.jit(jax.value_and_grad(lambda theta: -process(theta).log_probability(targets) / case.n))
    predict_at = jax.jit(lambda trained, at: jnp.concatenate(trained.predict(targets, at, return_var=True)))
    trained = jax.jit(process)(logarithms)
    return Peer(
        lambda: jax.block_until_ready(gradient(logarithms)),
        lambda: jax.block_until_ready(predict_at(trained, asked)),
        lambda found: torch.as_tensor(np.append(found[0], found[1])),
    )


def _left_out(name: str, case: Case) -> str | None:
    """Return why the library is left out, or None."""
    if case.device != "cpu":
        return "it runs on the CPU here"
    if name == SKLEARN and case.dtype != "float64":
        return "it computes in float64 only"
    return None if find_spec(MODULES[name]) else f"it is not installed: python -m pip install {name}"


def _peers(case: Case, x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor) -> dict[str, Peer]:
    made = {way: _gpytorch(way, case, x, y, test_x) for way in (STOCK, TENSORS)}
    made[TORCH] = _plain_torch(case, x, y, test_x)
    for name, make in ((SKLEARN, _scikit_learn), (TINYGP, _tinygp)):
        reason = _left_out(name, case)
        if reason is None:
            made[name] = make(case, x, y, test_x)
        else:
            say(f"{name} is left out: {reason}.")
    return made


def _vector(result: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(result.cpu() if isinstance(result, torch.Tensor) else result)).double()


@with_room()
def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Check that all peers compute the same numbers, then time them in turn."""
    rows = []
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's advice on bounds of parameters that stay fixed
        peers = _peers(case, *problem_of(case), test_points_of(case))
        values = {name: _vector(peer.in_logarithms(peer.gradient()).detach()) for name, peer in peers.items()}
        predictions = {name: _vector(peer.prediction()) for name, peer in peers.items()}
        for mode, call, numbers in ((GRADIENT, "gradient", values), (PREDICTION, "prediction", predictions)):
            check_same(numbers, case.dtype, f"{mode}, n = {case.n}")
            variants = {name: Variant(getattr(peer, call)) for name, peer in peers.items()}
            done = len(rows) / (2 * len(peers))
            rows += rows_in_turn(
                case, mode, variants, options, lambda part, done=done: advance(done + part / 2), with_memory=False
            )
    versions = {name: version(name) for name, module in MODULES.items() if find_spec(module)}
    return [replace(row, versions=row.versions | versions) for row in rows]


def tables(rows: list[Row]) -> list[Table]:
    caption = (
        "All compute the same numbers, checked before they are timed; plain torch goes back through Cholesky by "
        f"autograd. Prediction: mean and variance at {TEST_POINTS} points, with the factor where the library keeps it."
    )
    return [
        made
        for mode, group in grouped(rows, lambda row: row.mode).items()
        for made in ratio_tables(group, f"{TITLE}, {mode}", caption, (TENSORS,), base=TENSORS, inverse=True)
    ]


pictures = partial(
    time_pictures,
    title=titled(TITLE, with_mode=True),
    what="Time",
    base=TENSORS,
    key=setting_and_mode,
    part=lambda row: (row.mode,),
)
