"""Predictions of exact GPs with the flag on, against upstream's: the numbers, the route, and what is computed."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from both_ways import GP, assert_near, both, exact_gp, inputs, routes, scatter, targets
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import SobolQMCNormalSampler
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, settings
from gpytorch.closed_form.covariance import ClosedFormPrior
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.models import ExactGP, cross_covariance
from gpytorch.models.dense_prediction_strategy import DensePredictionStrategy
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from gpytorch.models.posterior_covariance import Conditional, PosteriorCovariance
from gpytorch.settings import use_torch_tensors

N, D = 15, 2
BATCH = torch.Size([3])

KERNELS: dict[str, Callable[[], k.Kernel]] = {
    "rbf ard": lambda: k.ScaleKernel(k.RBFKernel(ard_num_dims=D)),
    "matern 5/2": lambda: k.ScaleKernel(k.MaternKernel(2.5)),
    "matern 3/2 on one dimension": lambda: k.MaternKernel(1.5, active_dims=[1]),
    "periodic times rational quadratic": lambda: k.ScaleKernel(k.PeriodicKernel() * k.RQKernel()),
    "sum": lambda: k.ScaleKernel(k.RBFKernel()) + k.ScaleKernel(k.MaternKernel(2.5, active_dims=[0])),
    "without closed form": lambda: k.ScaleKernel(k.PiecewisePolynomialKernel()),
}
TEST_SHAPES = [(), (4,), (2, 3)]


def model_of(kernel: k.Kernel, n: int = N, batch: tuple = (), **kwargs) -> GP:
    return exact_gp(kernel, inputs(n, D, batch), **kwargs).model.eval()


def everything(model: ExactGP, x: Tensor) -> list[Tensor]:
    """Return all that a user reads of a prediction, and the gradients of it in the test points."""
    x = x.clone().requires_grad_()
    latent, observed = model(x), model.likelihood(model(x))
    normal = torch.randn(5, *latent.mean.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    read = [latent.mean, latent.variance, latent.stddev, latent.covariance_matrix]
    read += [observed.mean, observed.variance, observed.covariance_matrix]
    read += [latent.rsample(base_samples=normal), observed.rsample(base_samples=normal)]
    grads = [torch.autograd.grad(part.square().sum(), x, retain_graph=True)[0] for part in read]
    region = latent.confidence_region()  # which upstream computes in place
    return [*(part.detach() for part in (*read, *region)), *grads]


@pytest.mark.parametrize("fast_pred_var", [False, True])
@pytest.mark.parametrize("shape", TEST_SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_prediction_matches_upstream(kernel: str, shape: tuple, fast_pred_var: bool) -> None:
    model = model_of(KERNELS[kernel]())
    x = inputs(4, D, shape, seed=5)
    with settings.fast_pred_var(fast_pred_var):
        both(lambda: everything(model, x), model)
    assert type(model.prediction_strategy) is DensePredictionStrategy


@pytest.mark.parametrize("num_train", [1, 2])
@pytest.mark.parametrize("num_test", [1, 40])
def test_few_points_match_upstream(num_train: int, num_test: int) -> None:
    # A rougher kernel: of a smooth one points so near have a covariance that is singular but for rounding, and samples
    # have the root of it in them.
    model = model_of(k.ScaleKernel(k.MaternKernel(1.5, ard_num_dims=D)), num_train)
    both(lambda: everything(model, inputs(num_test, D, seed=5)), model)


def test_training_inputs_among_test_inputs_match_upstream() -> None:
    model = model_of(KERNELS["rbf ard"]())
    x = torch.cat([model.train_inputs[0][:3], inputs(2, D, seed=5)])
    both(lambda: everything(model, x), model)


@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_batch_of_models_matches_upstream(shape: tuple) -> None:
    kernel = k.ScaleKernel(k.RBFKernel(batch_shape=BATCH), batch_shape=BATCH)
    likelihood = likelihoods.GaussianLikelihood(batch_shape=BATCH)
    model = model_of(kernel, batch=BATCH, likelihood=likelihood, mean=means.ConstantMean(batch_shape=BATCH))
    both(lambda: everything(model, inputs(4, D, shape, seed=5)), model)


class DeepGP(GP):
    """A GP that transforms its inputs by what they are together."""

    def forward(self, x: Tensor) -> MultivariateNormal:
        x = torch.tanh(x - x.mean(-2, keepdim=True)) * 2
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_model_that_transforms_its_inputs_together_matches_upstream() -> None:
    x = inputs(N, D)
    model = scatter(DeepGP(x, targets(x), k.RBFKernel(), likelihoods.GaussianLikelihood()).double()).eval()
    both(lambda: everything(model, inputs(4, D, seed=5)), model)
    assert type(model.prediction_strategy) is DensePredictionStrategy


@pytest.mark.parametrize("kernel", ["rbf ard", "without closed form"])
@pytest.mark.parametrize(("detach", "fast_pred_var"), [(False, False), (False, True), (True, True)])
def test_gradients_in_hyperparameters_match_upstream(kernel: str, detach: bool, fast_pred_var: bool) -> None:
    model = model_of(KERNELS[kernel]())

    def grads() -> list[Tensor]:
        prediction = model(inputs(4, D, seed=5))
        read = prediction.mean.sum() + prediction.variance.square().sum()
        found = torch.autograd.grad(read, list(model.parameters()), allow_unused=True)
        return [torch.zeros(1) if grad is None else grad for grad in found]

    with settings.detach_test_caches(detach), settings.fast_pred_var(fast_pred_var):
        both(grads, model)


def test_caches_with_a_gradient_are_cleared_by_the_backward() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with use_torch_tensors(), settings.detach_test_caches(False):
        first = model(x)
        (first.mean.sum() + first.variance.sum()).backward()
        second = model(x)
        (second.mean.sum() + second.variance.sum()).backward()  # raises if the freed graph is still cached
    assert torch.equal(first.mean, second.mean)


def count_factorizations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    shapes, cholesky_ex = [], torch.linalg.cholesky_ex

    def counted(matrix: Tensor, **kwargs):
        shapes.append(matrix.shape)
        return cholesky_ex(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    return shapes


def test_training_covariance_is_factorized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(KERNELS["rbf ard"]())
    shapes = count_factorizations(monkeypatch)
    with use_torch_tensors():
        for seed in range(3):
            prediction = model(inputs(4, D, seed=seed))
            assert prediction.mean.isfinite().all() and prediction.variance.isfinite().all()
    assert shapes == [(N, N)]
    with use_torch_tensors(False):
        model.train().eval()
        for seed in range(3):
            model(inputs(4, D, seed=seed))
    assert len(shapes) > 2  # which upstream does at every call


@pytest.mark.parametrize("num_test", [4, 50])
def test_only_what_is_read_is_computed(monkeypatch: pytest.MonkeyPatch, num_test: int) -> None:
    model, done = model_of(KERNELS["rbf ard"]()), []
    for name in ("diagonal", "whole"):
        original = getattr(Conditional, name)
        spy = lambda self, *args, _name=name, _original=original: done.append(_name) or _original(self, *args)  # noqa: E731
        monkeypatch.setattr(Conditional, name, spy)
    with use_torch_tensors(), torch.no_grad():
        prediction = model(inputs(num_test, D, seed=5))
        assert prediction.mean.shape == (num_test,) and done == []
        assert prediction.variance.shape == prediction.stddev.shape == (num_test,) and set(done) == {"diagonal"}
        assert prediction.covariance_matrix.shape == (num_test, num_test) and "whole" in done


@pytest.mark.parametrize("at_training_inputs", [False, True])
@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2"])
def test_large_test_sets_go_through_in_blocks(
    monkeypatch: pytest.MonkeyPatch, kernel: str, at_training_inputs: bool
) -> None:
    model = model_of(KERNELS[kernel]())
    x = model.train_inputs[0] if at_training_inputs else inputs(100, D, seed=5)

    def read() -> list[Tensor]:
        prediction = model(x)
        return [prediction.mean, prediction.variance, model.likelihood(prediction).variance]

    monkeypatch.setattr(cross_covariance, "BLOCK_ELEMENTS", 7 * N)
    both(read, model)


def test_memory_of_many_test_points_is_not_quadratic() -> None:
    model = model_of(KERNELS["rbf ard"](), 50)
    with use_torch_tensors(), torch.no_grad():
        prediction = model(inputs(200_000, D, seed=5))  # whose covariance would take 300 GB
        assert prediction.mean.isfinite().all() and prediction.variance.gt(0).all()


CHANGES: dict[str, Callable[[GP], object]] = {
    "train and eval": lambda model: (scatter(model, seed=7), model.train(), model.eval()),
    "set_train_data": lambda model: model.set_train_data(inputs(N, D, seed=9), targets(inputs(N, D)), strict=True),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value + 0.3 if value.isfinite().all() else value for name, value in model.state_dict().items()}
    ),
    "noise in place": lambda model: model.likelihood.noise_covar.raw_noise.detach().add_(1.0),
    "noise set": lambda model: model.likelihood.initialize(noise=0.7),
    "kernel in place": lambda model: model.covar_module.raw_outputscale.detach().add_(1.0),
    "kernel set": lambda model: model.covar_module.base_kernel.initialize(lengthscale=0.9),
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed_as_upstream_follows_them(change: str, fast: bool) -> None:
    x = inputs(4, D, seed=5)

    def read() -> list[Tensor]:
        model = model_of(KERNELS["rbf ard"]())
        with settings.fast_pred_var(fast), torch.no_grad():
            model(x).variance  # noqa: B018 (fills the caches)
            CHANGES[change](model)
            prediction = model(x)
            return [prediction.mean, prediction.variance]

    both(read)


@pytest.mark.parametrize("fast", [False, True])
def test_changes_of_a_kernel_without_closed_form_are_followed_as_upstream_follows_them(fast: bool) -> None:
    x = inputs(4, D, seed=5)

    def read() -> list[Tensor]:
        model = model_of(k.PolynomialKernel(2) + k.RBFKernel())
        with settings.fast_pred_var(fast), torch.no_grad():
            model(x).variance  # noqa: B018 (fills the caches)
            for parameter in model.parameters():
                parameter.add_(0.3)
            prediction = model(x)
            return [prediction.mean, prediction.variance]

    both(read)


@pytest.mark.parametrize("num_test", [1, 4, 40])
@pytest.mark.parametrize("blocks", [False, True])
def test_prediction_that_is_read_late_is_of_what_was_when_it_was_made(
    blocks: bool, num_test: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        monkeypatch.setattr(cross_covariance, "BLOCK_ELEMENTS", 7 * N)

    def read() -> list[Tensor]:
        model, x = model_of(KERNELS["rbf ard"]()), inputs(num_test, D, seed=5)
        with torch.no_grad():
            early, late = model(x), model(x)
            early = [early.variance, early.covariance_matrix]
            for tensor in (x, *model.parameters()):
                tensor.add_(0.3)
            late = [late.variance, late.covariance_matrix]
        for ours, theirs in zip(late, early, strict=True):
            assert_near(ours, theirs)
        return late

    both(read)


def test_fixed_noise_that_is_changed_is_followed_as_upstream_follows_it() -> None:
    def read() -> list[Tensor]:
        likelihood = FixedNoiseGaussianLikelihood(torch.full((N,), 0.1).double())
        model = model_of(KERNELS["rbf ard"](), likelihood=likelihood)
        model(inputs(4, D)).variance  # noqa: B018 (fills the caches)
        model.likelihood.noise_covar.noise = torch.full((N,), 0.4).double()
        return [model(inputs(4, D)).variance]

    both(read)


def test_factors_of_parameters_that_were_are_not_kept() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with use_torch_tensors(), torch.no_grad():
        for _ in range(3):
            model.likelihood.noise_covar.raw_noise.add_(0.1)
            model(x).variance  # noqa: B018 (fills the caches)
    assert sum(key[0] == "factor" for key in model.prediction_strategy._memoize_cache) == 1


def test_setting_the_flag_takes_effect_on_a_model_that_has_predicted() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with use_torch_tensors():
        tensors = model(x)
        assert isinstance(tensors.lazy_covariance_matrix, PosteriorCovariance)
    with use_torch_tensors(False):
        upstream = model(x)
        assert not isinstance(upstream.lazy_covariance_matrix, PosteriorCovariance)
    assert_near(upstream.covariance_matrix.detach(), tensors.covariance_matrix.detach(), atol=1e-11)


def test_prediction_made_without_gradients_is_read_without() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(50, D, seed=5)
    with use_torch_tensors(), torch.no_grad():
        prediction = model(x)
    assert not prediction.variance.requires_grad and not prediction.covariance_matrix.requires_grad


def test_model_made_in_inference_mode_matches_upstream() -> None:
    x = inputs(4, D, seed=5)

    def read() -> list[Tensor]:
        with torch.inference_mode():
            model = model_of(KERNELS["rbf ard"]())
            before = model(x).variance
            model.likelihood.noise_covar.raw_noise.add_(1.0)
            return [before, model(x).variance]

    both(read)


def test_settings_of_upstream_hold() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with settings.skip_posterior_variances():
        both(lambda: [model(x).mean, model(x).variance], model)
    with settings.prior_mode():
        both(lambda: [model(x).mean, model(x).covariance_matrix], model)
    model.train_targets = torch.where(torch.arange(N) == 3, torch.nan, model.train_targets)
    for policy in ("mask", "fill"):
        with settings.observation_nan_policy(policy):
            both(lambda: [model(x).mean], model)
            assert type(model.prediction_strategy) is DefaultPredictionStrategy


STRUCTURED: dict[str, Callable[[], k.Kernel]] = {
    "linear": lambda: k.LinearKernel(),
    "inducing points": lambda: k.InducingPointKernel(k.RBFKernel(), inputs(4, D), likelihoods.GaussianLikelihood()),
    "random features": lambda: k.RFFKernel(num_samples=4, num_dims=D),
    "grid interpolation": lambda: k.GridInterpolationKernel(k.RBFKernel(), grid_size=8, num_dims=D),
}


@pytest.mark.parametrize("kernel", STRUCTURED)
def test_structured_strategies_stay_upstream(kernel: str) -> None:
    model, x = model_of(STRUCTURED[kernel]()), inputs(4, D, seed=5)
    both(lambda: [model(x).mean, model(x).variance], model)
    assert type(model.prediction_strategy) is not DensePredictionStrategy


def test_more_rows_than_max_cholesky_size_stay_upstream() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with settings.max_cholesky_size(N - 1), use_torch_tensors(), routes(upstream=1):
        model(x)
    assert type(model.prediction_strategy) is DefaultPredictionStrategy


def test_copies_and_pickles_after_a_prediction_predict_the_same() -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with use_torch_tensors(), torch.no_grad():
        prediction = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert_near(other(x).covariance_matrix, prediction.covariance_matrix, atol=1e-12)
        again = pickle.loads(pickle.dumps(prediction))
        assert_near(again.covariance_matrix, prediction.covariance_matrix)


def botorch_model(outputs: int) -> SingleTaskGP:
    x = inputs(N, D)
    y = torch.stack([targets(x), 3 + 10 * targets(x, seed=3)], -1)[:, :outputs]
    transforms = {"input_transform": Normalize(D), "outcome_transform": Standardize(outputs)}
    return SingleTaskGP(10 * x, y, **transforms).eval()


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("shape", [(16, 1), (16, 4), (5, 40)])
def test_botorch_posteriors_match_upstream(outputs: int, shape: tuple) -> None:
    model = botorch_model(outputs)

    def read() -> list[Tensor]:
        x = (10 * inputs(shape[1], D, shape[:1], seed=5)).requires_grad_()
        posterior, observed = model.posterior(x), model.posterior(x, observation_noise=True)
        samples = SobolQMCNormalSampler(torch.Size([8]), seed=1)(posterior)
        read = [posterior.mean, posterior.variance, observed.variance, samples]
        return [*read, *(torch.autograd.grad(part.square().sum(), x, retain_graph=True)[0] for part in read)]

    # Samples of nearly repeated points have the root of a rounding error in them.
    both(read, model, rtol=1e-7)
    assert type(model.prediction_strategy) is DensePredictionStrategy


@pytest.mark.parametrize("outputs", [1, 2])
def test_botorch_fantasies_and_conditioning_match_upstream(outputs: int) -> None:
    model, x = botorch_model(outputs), 10 * inputs(4, D, seed=5)

    def read() -> list[Tensor]:
        model.posterior(x)
        new = (10 * inputs(2, D, seed=6)).requires_grad_()
        once = model.condition_on_observations(new, inputs(2, outputs, seed=7))
        twice = once.condition_on_observations(10 * inputs(1, D, seed=8), inputs(1, outputs, seed=9))
        fantasies = model.fantasize(new, SobolQMCNormalSampler(torch.Size([3]), seed=1))
        read = [part for m in (once, twice, fantasies) for part in (m.posterior(x).mean, m.posterior(x).variance)]
        return [*read, *(torch.autograd.grad(part.sum(), new, retain_graph=True)[0] for part in read)]

    both(read, model)


def test_botorch_multitask_posterior_matches_upstream() -> None:
    x = inputs(N, D)
    task = torch.cat([x, (torch.arange(N) % 2).double().unsqueeze(-1)], -1)
    model = MultiTaskGP(task, targets(x).unsqueeze(-1), task_feature=-1).eval()
    both(lambda: [(p := model.posterior(inputs(4, D, seed=5))).mean, p.variance], model)


OTHER_INPUTS: dict[str, tuple[Tensor, ...]] = {
    "fewer coordinates": (inputs(4, 1),),
    "more coordinates": (inputs(4, D + 1),),
    "no coordinates' dimension": (inputs(4, 1)[:, 0],),
    "one input more": (inputs(4, D), inputs(4, D)),
}


@pytest.mark.parametrize("kernel", [k.RBFKernel, k.MaternKernel, lambda: k.PolynomialKernel(2)])
@pytest.mark.parametrize("case", OTHER_INPUTS)
def test_test_inputs_unlike_the_training_inputs_are_upstreams_error(case: str, kernel: Callable[[], k.Kernel]) -> None:
    errors = []
    for flag in (False, True):
        with use_torch_tensors(flag), pytest.raises((RuntimeError, ValueError)) as error:
            model_of(kernel())(*OTHER_INPUTS[case])
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("kernel", [k.RBFKernel, k.MaternKernel, lambda: k.PolynomialKernel(2)])
@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_test_inputs_of_another_type_are_taken_to_that_of_the_training_inputs(
    dtype: torch.dtype, kernel: Callable[[], k.Kernel]
) -> None:
    def read() -> list[Tensor]:
        with torch.no_grad():
            prediction = model_of(kernel())((2 * inputs(4, D, seed=5)).to(dtype))
            return [prediction.mean, prediction.variance, prediction.covariance_matrix]

    both(read)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_test_point_that_is_not_finite_spoils_no_other(value: float) -> None:
    model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5)
    with use_torch_tensors(), torch.no_grad():
        expected = [model(x).mean, model(x).variance]
        x[1, 0] = value
        spoilt = model(x)
        prior = torch.stack([model.mean_module(x)[1], model.covar_module.outputscale])
    for i, (actual, before) in enumerate(zip([spoilt.mean, spoilt.variance], expected, strict=True)):
        assert_near(actual[[0, 2, 3]], before[[0, 2, 3]])
        assert actual[1].isnan() if math.isnan(value) else torch.isclose(actual[1], prior[i])


SCALES = {
    "each point": lambda batch: torch.rand(*batch, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "each point of each batch": lambda batch: inputs(1, 4, (2, *batch)).squeeze(-2),  # broadcast by upstream
}


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("scale", SCALES)
def test_products_with_diagonal_matrices_match_upstream(scale: str, batch: tuple) -> None:
    model = model_of(KERNELS["rbf ard"]())
    x, scale = inputs(4, D, batch, seed=5).requires_grad_(), SCALES[scale](batch).requires_grad_()

    def read() -> list[Tensor]:
        covar = model(x).lazy_covariance_matrix
        diagonal = DiagLinearOperator(scale)
        products = [diagonal @ covar, covar @ diagonal, diagonal @ covar @ diagonal, (diagonal @ covar).mT]
        products += [(diagonal @ covar @ diagonal).mT, diagonal @ products[2], products[0] @ products[2].mT]
        values = [part for product in products for part in (product.to_dense(), product.diagonal(dim1=-1, dim2=-2))]
        values += [products[2].cholesky().to_dense(), products[0] @ x, products[2][..., :2, :2].to_dense()]
        values += [x.mT @ products[2], products[2].sum(-2), (products[2] @ x).mT @ products[0]]
        grads = [torch.autograd.grad(value.square().sum(), [x, scale], retain_graph=True) for value in values]
        return [*values, *(grad for pair in grads for grad in pair)]

    both(read, model)


def test_product_with_diagonal_matrices_is_as_lazy_as_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = model_of(KERNELS["rbf ard"]()), []
    original = Conditional.whole
    monkeypatch.setattr(Conditional, "whole", lambda self: done.append(self) or original(self))
    diagonal = DiagLinearOperator(torch.ones(4, dtype=torch.float64))
    with use_torch_tensors(), torch.no_grad():
        product = diagonal @ model(inputs(4, D, seed=5)).lazy_covariance_matrix @ diagonal
    assert product.shape == (4, 4) and product.diagonal().shape == (4,) and not done
    assert product.to_dense().shape == (4, 4) and done


def test_product_with_a_diagonal_matrix_of_another_dtype_is_upstreams() -> None:
    model, found = model_of(KERNELS["rbf ard"]()), []
    for flag in (False, True):
        model.prediction_strategy = None
        with use_torch_tensors(flag), torch.no_grad():
            covar = model(inputs(4, D, seed=5)).lazy_covariance_matrix
            found.append((covar @ DiagLinearOperator(torch.ones(4, dtype=torch.float32))).dtype)
    assert found[0] == found[1]


IN_PLACE: dict[str, Callable[[LinearOperator], object]] = {
    "detached": lambda covar: covar.detach_(),
    "differentiable": lambda covar: covar.requires_grad_(True),
    "differentiable by assignment": lambda covar: setattr(covar, "requires_grad", True),
}


@pytest.mark.parametrize("num_test", [1, 4])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("change", IN_PLACE)
def test_operator_that_is_changed_in_place_leaves_the_model_alone(change: str, is_scaled: bool, num_test: int) -> None:
    model = model_of(KERNELS["rbf ard"]())
    x = inputs(num_test, D, seed=5)
    diagonal = DiagLinearOperator(1 + torch.arange(num_test, dtype=torch.float64))

    def read() -> list[Tensor]:
        model.zero_grad()
        with settings.detach_test_caches(False):
            with torch.set_grad_enabled(change == "detached"):
                covar = model(x).lazy_covariance_matrix
                covar = diagonal @ covar @ diagonal if is_scaled else covar
                IN_PLACE[change](covar)
            product = (diagonal @ covar).to_dense()
            needs = [each.requires_grad for each in (covar, covar.to_dense(), covar.diagonal(), product)]
            values = [product, torch.tensor(needs).double(), covar.to_dense(), covar.diagonal(), covar.cpu().to_dense()]
            variance = model(x).variance
            assert variance.requires_grad
            variance.sum().backward()
            grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        return [each.detach().double().clone() for each in (*values, *grads)]

    both(read, model)


def test_diagonal_of_a_product_read_first_without_gradients_is_what_upstreams_is() -> None:
    def read() -> list[Tensor]:
        model, x = model_of(KERNELS["rbf ard"]()), inputs(4, D, seed=5).requires_grad_()
        diagonal = DiagLinearOperator(torch.ones(4, dtype=torch.float64))
        product = diagonal @ model(x).lazy_covariance_matrix @ diagonal
        with torch.no_grad():
            needs = [product.diagonal().requires_grad]
        needs.append(product.diagonal().requires_grad)
        return [torch.tensor(needs).double(), torch.autograd.grad(product.diagonal().sin().sum(), x)[0]]

    both(read)


def test_variance_of_untransformed_outcomes_may_be_written_to() -> None:
    def read() -> list[Tensor]:
        x = inputs(N, D)
        model = SingleTaskGP(x, targets(x).unsqueeze(-1), outcome_transform=Standardize(1)).eval()
        with torch.no_grad():
            posterior = model.posterior(inputs(4, D, seed=5))
            posterior.variance.add_(1.0)
            return [posterior.variance, posterior.distribution.stddev, posterior.distribution.covariance_matrix]

    both(read)


def test_untransformed_outcomes_of_botorch_build_no_matrix_for_a_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(N, D)
    model, done = SingleTaskGP(x, targets(x).unsqueeze(-1), outcome_transform=Standardize(1)).eval(), []
    monkeypatch.setattr(Conditional, "whole", lambda self: done.append(self))
    with use_torch_tensors():
        posterior = model.posterior(inputs(4, D, (3,), seed=5))
        assert posterior.mean.shape == posterior.variance.shape == (3, 4, 1) and not done


def test_model_that_transforms_its_inputs_predicts_in_closed_form() -> None:
    model = DeepGP(inputs(N, D), targets(inputs(N, D)), KERNELS["rbf ard"](), likelihoods.GaussianLikelihood())
    with use_torch_tensors(), routes(tensors=1):
        covar = scatter(model.double()).eval()(inputs(4, D, seed=5)).lazy_covariance_matrix
    assert type(covar.source.prior) is ClosedFormPrior
