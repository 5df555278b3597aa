"""Fantasies with the flag on, against upstream's: the numbers, the gradients, the route, and what is factorized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from both_ways import GP, assert_near, exact_gp, inputs, routes, targets
from botorch.acquisition import qKnowledgeGradient
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import SobolQMCNormalSampler
from linear_operator.utils.errors import NanError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, settings
from gpytorch.models import ExactGP
from gpytorch.models.dense_prediction_strategy import DensePredictionStrategy
from gpytorch.models.posterior_covariance import PosteriorCovariance
from gpytorch.settings import use_torch_tensors

N, D, M = 12, 2, 2


@dataclass
class Fantasies:
    """The batch shapes of a model, of its fantasies' inputs and targets at one or more levels, and of test points."""

    model: tuple = ()
    levels: tuple = (((), ()),)
    test: tuple = ()


CASES = {
    "one": Fantasies(),
    "at points of their own": Fantasies(levels=(((4,), (4,)),), test=(4,)),
    "at points of their own, shared test points": Fantasies(levels=(((4,), (4,)),)),
    "many observations at the same points": Fantasies(levels=(((), (4,)),)),
    "many observations at the same points, each with its test points": Fantasies(levels=(((), (4,)),), test=(4,)),
    "a grid": Fantasies(levels=(((5,), (4, 5)),), test=(4, 5)),
    "one, then one": Fantasies(levels=(((), ()), ((), ()))),
    "many, then one each": Fantasies(levels=(((4,), (4,)), ((4,), (4,))), test=(4,)),
    "many, then many": Fantasies(levels=(((4,), (4,)), ((4,), (5, 4))), test=(5, 4)),
    "many at the same points, then many": Fantasies(levels=(((), (4,)), ((5, 4), (5, 4))), test=(5, 4)),
    "three levels": Fantasies(levels=(((4,), (4,)), ((4,), (4,)), ((4,), (4,)))),
    "batch of models": Fantasies(model=(3,), levels=(((3,), (3,)),), test=(3,)),
    "batch of models, many": Fantasies(model=(3,), levels=(((4, 3), (4, 3)),), test=(4, 3)),
    "batch of models, many at the same points": Fantasies(model=(3,), levels=(((3,), (4, 3)),), test=(1, 3)),
}
LIKELIHOODS = {
    "one noise": lambda batch: likelihoods.GaussianLikelihood(batch_shape=torch.Size(batch)),
    "fixed noise": lambda batch: likelihoods.FixedNoiseGaussianLikelihood(_noise((*batch, N))),
    "fixed and learned noise": lambda batch: likelihoods.FixedNoiseGaussianLikelihood(
        _noise((*batch, N)), learn_additional_noise=True, batch_shape=torch.Size(batch)
    ),
}
KERNELS = {
    "matern 5/2": lambda batch: k.ScaleKernel(k.MaternKernel(2.5, batch_shape=batch), batch_shape=batch),
    "sum on one dimension each": lambda batch: k.RBFKernel(active_dims=[0]) + k.RQKernel(active_dims=[1]),
    "active dimension": lambda batch: k.RBFKernel(active_dims=[1]),
    "without closed form": lambda batch: k.ScaleKernel(k.PiecewisePolynomialKernel()),
}


def _noise(shape: tuple) -> Tensor:
    return torch.linspace(0.02, 0.3, shape[-1], dtype=torch.float64).expand(shape).clone()


def model_of(case: Fantasies, likelihood: str = "one noise", kernel: str = "matern 5/2", n: int = N) -> GP:
    batch = torch.Size(case.model)
    mll = exact_gp(
        KERNELS[kernel](batch),
        inputs(n, D, batch),
        likelihood=LIKELIHOODS[likelihood](batch),
        mean=means.ConstantMean(batch_shape=batch),
    )
    return mll.model.eval()


def noise_of(model: ExactGP, y: Tensor) -> dict[str, Tensor]:
    fixed = isinstance(model.likelihood, likelihoods.FixedNoiseGaussianLikelihood)
    return {"noise": _noise(y.shape) / 2} if fixed else {}


def fantasized(model: ExactGP, case: Fantasies, leaves: list[Tensor] | None = None) -> ExactGP:
    """Return the model with the fantasies of the case, whose inputs and targets are added to `leaves`."""
    model(inputs(1, D, case.model, seed=3)).variance  # noqa: B018 (fills upstream's caches)
    for level, (batch, target_batch) in enumerate(case.levels):
        x = inputs(M, D, batch, seed=10 + level).requires_grad_(leaves is not None)
        y = targets(inputs(M, D, target_batch, seed=20 + level)).requires_grad_(leaves is not None)
        if leaves is not None:
            leaves += [x, y]
        model = model.get_fantasy_model(x, y, **noise_of(model, y))
    return model


def everything(model: GP, case: Fantasies) -> list[Tensor]:
    """Return what a user reads of fantasies, and its gradients in their data, the test points and the parameters."""
    leaves: list[Tensor] = []
    fantasies = fantasized(model, case, leaves)
    leaves += [inputs(3, D, case.test, seed=5).requires_grad_(), *fantasies.parameters()]
    x = leaves[2 * len(case.levels)]
    latent = fantasies(x)
    normal = torch.randn(5, *latent.mean.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    read = [latent.mean, latent.variance, latent.covariance_matrix, latent.rsample(base_samples=normal)]
    grads = []
    for part in read:
        for grad, leaf in zip(
            torch.autograd.grad(part.square().sum(), leaves, retain_graph=True, allow_unused=True), leaves, strict=True
        ):
            grads.append(torch.zeros_like(leaf) if grad is None else grad)
    return [part.detach() for part in (*read, *grads)]


def both(function: Callable[[], list[Tensor]], model: ExactGP, rtol: float = 1e-8, **route: int) -> None:
    """Assert that the flag changes nothing that `function` returns, and which route the fantasies take."""
    with use_torch_tensors(False), routes():
        model.prediction_strategy = None
        expected = function()
    with use_torch_tensors(), routes(**route):
        model.prediction_strategy = None
        actual = function()
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a.detach(), b.detach(), str(i), rtol, atol=1e-10)


@pytest.mark.parametrize("fast_pred_var", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_predictions_and_gradients_match_upstream(case: str, detach: bool, fast_pred_var: bool) -> None:
    case = CASES[case]
    model = model_of(case)
    with settings.detach_test_caches(detach), settings.fast_pred_var(fast_pred_var):
        both(lambda: everything(model, case), model, tensors=1 + len(case.levels))


@pytest.mark.parametrize("fast_pred_var", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_likelihoods_match_upstream(kernel: str, likelihood: str, fast_pred_var: bool) -> None:
    case = CASES["many, then one each"]
    model = model_of(case, likelihood, kernel)
    # Upstream takes the noise that fantasies come with for the learned one too, but later no more.
    route = {"tensors": 1, "upstream": 1} if likelihood == "fixed and learned noise" else {"tensors": 3}
    with settings.detach_test_caches(False), settings.fast_pred_var(fast_pred_var):
        both(lambda: everything(model, case), model, **route)


def test_gradients_reach_the_kernel_that_the_fantasies_were_made_with() -> None:
    case = CASES["at points of their own"]
    model = model_of(case)

    def grads() -> list[Tensor]:
        prediction = fantasized(model, case)(inputs(3, D, seed=5))
        read = prediction.mean.sum() + prediction.variance.square().sum()
        return list(torch.autograd.grad(read, list(model.covar_module.parameters())))

    with settings.detach_test_caches(False):
        both(grads, model, tensors=2)


def test_predictions_of_fantasies_stay_on_tensors() -> None:
    case = CASES["many, then many"]
    model = model_of(case)
    with use_torch_tensors():
        fantasies = fantasized(model, case)
        prediction = fantasies(inputs(3, D, seed=5))
    assert type(fantasies.prediction_strategy) is DensePredictionStrategy
    assert isinstance(prediction.lazy_covariance_matrix, PosteriorCovariance)


def test_fantasies_alone_are_factorized_and_share_the_factor_of_the_training_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["at points of their own"]
    model = model_of(case)
    with use_torch_tensors(), torch.no_grad():
        model(inputs(1, D)).variance  # noqa: B018 (factorizes the training covariance)
        shapes, cholesky_ex = [], torch.linalg.cholesky_ex
        monkeypatch.setattr(
            torch.linalg, "cholesky_ex", lambda a, **kwargs: shapes.append(a.shape) or cholesky_ex(a, **kwargs)
        )
        fantasies = fantasized(model, case)
        for seed in range(2):
            prediction = fantasies(inputs(3, D, seed=seed))
            assert prediction.mean.isfinite().all() and prediction.variance.isfinite().all()
        whole, shared = (m.prediction_strategy.factor().blocks[0] for m in (model, fantasies))
    assert shapes == [(4, M, M)]
    assert whole.data_ptr() == shared.data_ptr()


def test_factor_of_fantasies_is_that_of_their_covariance() -> None:
    case = CASES["many, then many"]
    model = model_of(case)
    with use_torch_tensors(), torch.no_grad():
        strategy = fantasized(model, case).prediction_strategy
        factor, covar = strategy.factor(), strategy.train_covar().to_dense()
        whole = torch.linalg.cholesky(covar)
        rhs = inputs(N + 2 * M, 3, (5, 4))
        assert factor.num_rows == N + 2 * M
        assert_near(factor.half_solve(rhs), torch.linalg.solve_triangular(whole, rhs, upper=False))
        assert_near(factor.back_solve(rhs), torch.linalg.solve_triangular(whole.mT, rhs, upper=True))
        assert_near(factor.solve(rhs), torch.linalg.solve(covar, rhs))


def test_second_backward_finds_no_freed_graph() -> None:
    case = CASES["at points of their own"]
    model, x = model_of(case), inputs(3, D, seed=5)
    for read in ("mean", "variance"):
        with use_torch_tensors(), settings.detach_test_caches(False):
            fantasies = fantasized(model, case)
            first, second = [], []
            for grads in (first, second):
                model.zero_grad()
                getattr(fantasies(x), read).sum().backward()
                grads += [parameter.grad for parameter in model.covar_module.parameters()]
        for a, b in zip(first, second, strict=True):
            assert_near(b, a)


CHANGES: dict[str, Callable[[GP], object]] = {
    "noise in place": lambda model: model.prediction_strategy.likelihood.noise_covar.raw_noise.detach().add_(1.0),
    "train and eval": lambda model: (model.train(), model.eval()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["one", "many observations at the same points", "batch of models, many"])
def test_changes_and_copies_are_followed_as_upstream_follows_them(case: str, change: str) -> None:
    case = CASES[case]
    model, x = model_of(case), inputs(3, D, case.test, seed=5)

    def read() -> list[Tensor]:
        with torch.no_grad():
            fantasies = fantasized(model, case)
            fantasies(x)
            changed = CHANGES[change](fantasies)
            fantasies = changed if isinstance(changed, ExactGP) else fantasies
            prediction = fantasies(x)
            return [prediction.mean, prediction.variance]

    model.prediction_strategy = None
    with use_torch_tensors(False):
        expected = read()
    model.prediction_strategy = None
    with use_torch_tensors():
        for a, b in zip(read(), expected, strict=True):
            assert_near(a, b)


def test_flag_takes_effect_on_fantasies_that_exist() -> None:
    case = CASES["many, then many"]
    model, x = model_of(case), inputs(3, D, seed=5)
    with torch.no_grad():
        for made_with in (False, True):
            model.prediction_strategy = None
            with use_torch_tensors(made_with):
                fantasies = fantasized(model, case)
            found = []
            for flag in (made_with, not made_with):
                with use_torch_tensors(flag):
                    found.append(fantasies(x).covariance_matrix)
                    assert isinstance(fantasies(x).lazy_covariance_matrix, PosteriorCovariance) == (made_with and flag)
            assert_near(*found, atol=1e-11)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("num_fantasies", [0, 1])
def test_no_fantasies_and_inference_mode_match_upstream(num_fantasies: int, batch: tuple, mode: type) -> None:
    model = model_of(CASES["one"])

    def read() -> list[Tensor]:
        with mode():
            model(inputs(1, D)).variance  # noqa: B018 (fills upstream's caches)
            x = inputs(num_fantasies, D, seed=10)
            prediction = model.get_fantasy_model(x, torch.ones(*batch, num_fantasies).double())(inputs(3, D, seed=5))
            return [prediction.mean, prediction.variance]

    both(read, model, tensors=2)


class OwnNoise(likelihoods.GaussianLikelihood):
    """A likelihood of the user's own making."""

    def marginal(self, function_dist, *params, **kwargs):
        return super().marginal(function_dist, *params, **kwargs)


def test_what_cannot_border_a_factor_is_left_to_upstream() -> None:
    one = CASES["one"]
    x, y = inputs(M, D, seed=10), targets(inputs(M, D, seed=20))

    def made_with(model: ExactGP, **kwargs: Tensor) -> Callable[[], list[Tensor]]:
        def read() -> list[Tensor]:
            model(inputs(1, D)).variance  # noqa: B018 (fills upstream's caches)
            prediction = model.get_fantasy_model(x, y, **kwargs)(inputs(3, D, seed=5))
            return [prediction.mean, prediction.variance]

        return read

    model = model_of(one)
    both(made_with(model, noise=torch.full_like(y, 0.7)), model, tensors=1, upstream=1)
    with settings.max_cholesky_size(N + 1):
        both(made_with(model), model, tensors=1, upstream=1)
    own = exact_gp(k.RBFKernel(), inputs(N, D), likelihood=OwnNoise()).model.eval()
    both(made_with(own), own, tensors=1, upstream=1)
    with use_torch_tensors():
        model(x)
        with settings.observation_nan_policy("mask"):
            assert model.get_fantasy_model(x, y).prediction_strategy._has_roots
    structured = exact_gp(k.LinearKernel(), inputs(N, D)).model.eval()
    with use_torch_tensors(), routes():
        structured(x)
        assert not isinstance(structured.prediction_strategy, DensePredictionStrategy)
        assert not isinstance(structured.get_fantasy_model(x, y).prediction_strategy, DensePredictionStrategy)


ERRORS = {
    "targets of too many batch dimensions": (inputs(M, D), torch.zeros(2, 3, M, dtype=torch.float64)),
    "targets of another batch": (inputs(M, D, (4,)), torch.zeros(5, M, dtype=torch.float64)),
    "inputs of another dimension": (inputs(M, D + 1), torch.zeros(M, dtype=torch.float64)),
    "targets of another number": (inputs(M, D), torch.zeros(M + 1, dtype=torch.float64)),
    "not a number": (torch.full((M, D), torch.nan, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_upstreams(error: str) -> None:
    model, raised = model_of(CASES["one"]), []
    for flag in (False, True):
        model.prediction_strategy = None
        with use_torch_tensors(flag), torch.no_grad():
            model(inputs(1, D)).variance  # noqa: B018 (fills upstream's caches)
            with pytest.raises(Exception) as caught:
                model.get_fantasy_model(*ERRORS[error])(inputs(3, D)).mean  # noqa: B018
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]
    if error == "not a number":
        assert raised[0][0] is NanError


def test_jitter_of_repeated_fantasies_is_warned_of_as_upstream_does() -> None:
    model = exact_gp(
        k.RBFKernel(), inputs(N, D), likelihood=likelihoods.FixedNoiseGaussianLikelihood(_noise((N,)))
    ).model.eval()
    x, y = inputs(1, D, seed=10).expand(6, D), torch.zeros(6, dtype=torch.float64)
    for flag in (False, True):
        model.prediction_strategy = None
        with use_torch_tensors(flag), torch.no_grad(), settings.min_fixed_noise(double_value=0.0):
            model(inputs(1, D)).variance  # noqa: B018 (fills upstream's caches)
            with pytest.warns(NumericalWarning, match="not p.d., added jitter"):
                model.get_fantasy_model(x, y, noise=torch.zeros_like(y))


def botorch_model(outputs: int, fixed_noise: bool = False) -> SingleTaskGP:
    x = inputs(N, D)
    y = torch.stack([targets(x), 3 + 10 * targets(x, seed=3)], -1)[:, :outputs]
    noise = _noise((N,)).unsqueeze(-1).expand(N, outputs) if fixed_noise else None
    transforms = {"input_transform": Normalize(D), "outcome_transform": Standardize(outputs)}
    return SingleTaskGP(10 * x, y, noise, **transforms).eval()


@pytest.mark.parametrize("fixed_noise", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
def test_botorch_fantasies_match_upstream(outputs: int, fixed_noise: bool) -> None:
    model, x = botorch_model(outputs, fixed_noise), 10 * inputs(3, D, seed=5)

    def read() -> list[Tensor]:
        model.posterior(x)
        new = (10 * inputs(2, D, (4,), seed=6)).requires_grad_()
        fantasies = model.fantasize(new, SobolQMCNormalSampler(torch.Size([3]), seed=1))
        newer = (new[..., :1, :] + 1).expand(3, 4, 1, D)
        again = fantasies.fantasize(newer, SobolQMCNormalSampler(torch.Size([2]), seed=2))
        read = [part for m in (fantasies, again) for part in (m.posterior(x).mean, m.posterior(x).variance)]
        return [*read, *(torch.autograd.grad(part.sum(), new, retain_graph=True)[0] for part in read)]

    both(read, model, tensors=3)


def test_knowledge_gradient_and_its_gradient_match_upstream() -> None:
    model = botorch_model(1)

    def read() -> list[Tensor]:
        x = (10 * inputs(1 + 3, D, (5,), seed=6)).requires_grad_()
        value = qKnowledgeGradient(model, num_fantasies=3)(x)
        return [value, *torch.autograd.grad(value.sum(), x)]

    def seeded() -> list[Tensor]:
        torch.manual_seed(0)
        return read()

    both(seeded, model, tensors=2)
