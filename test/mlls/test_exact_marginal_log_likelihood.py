"""A training step of every exact GP: the loss and its gradients with the flag on, against upstream's."""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from both_ways import (
    GP,
    assert_near,
    compare,
    compare_step,
    evaluate,
    exact_gp,
    inputs,
    loss,
    routes,
    scatter,
    targets,
)
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from sklearn.datasets import load_diabetes
from torch import Tensor

from gpytorch import dense, likelihoods, means, priors, settings
from gpytorch import kernels as k
from gpytorch.beta_features import checkpoint_kernel
from gpytorch.closed_form import matrix as kernel_matrix
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.functions import kernel_log_prob
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.mlls import AddedLossTerm, ExactMarginalLogLikelihood, MarginalLogLikelihood, SumMarginalLogLikelihood
from gpytorch.models import ExactGP, IndependentModelList
from gpytorch.settings import use_torch_tensors

N = 15
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def rbf(batch: tuple[int, ...] = (), d: int = 2, **options) -> Kernel:
    batch = torch.Size(batch)
    return k.ScaleKernel(k.RBFKernel(ard_num_dims=d, batch_shape=batch, **options), batch_shape=batch)


class Network(torch.nn.Module):
    """Features that a kernel is learned on."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DeepGP(GP):
    """An exact GP on the outputs of a network."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.network = Network()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return super().forward(self.network(x))


class OfAUser(Kernel):
    """A kernel without a closed form."""

    has_lengthscale = True

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        return torch.exp(-self.covar_dist(x1 / self.lengthscale, x2 / self.lengthscale, diag=diag).pow(1.5))


KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf ard": rbf,
    "matern 5/2 ard": lambda: k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)),
    "matern 3/2": lambda: k.ScaleKernel(k.MaternKernel(1.5)),
    "rational quadratic": lambda: k.ScaleKernel(k.RQKernel()),
    "periodic": lambda: k.ScaleKernel(k.PeriodicKernel()),
    "without scale": k.RBFKernel,
    "scale of scale": lambda: k.ScaleKernel(k.ScaleKernel(k.RBFKernel())),
    "sum": lambda: rbf() + k.ScaleKernel(k.PeriodicKernel(active_dims=[0])),
    "product": lambda: k.ScaleKernel(k.RBFKernel(active_dims=[0]) * k.MaternKernel(2.5, active_dims=[1])),
    "of a user": lambda: k.ScaleKernel(OfAUser()),
    "user's and closed form": lambda: rbf() * OfAUser(),
    "polynomial": lambda: k.ScaleKernel(k.PolynomialKernel(2)),
    "spectral mixture": lambda: k.SpectralMixtureKernel(2, ard_num_dims=2),
}

MEANS: dict[str, Callable[[], means.Mean]] = {
    "zero": means.ZeroMean,
    "constant": means.ConstantMean,
    "constant with prior": lambda: means.ConstantMean(constant_prior=priors.NormalPrior(0.0, 1.0)),
    "linear": lambda: means.LinearMean(2),
}

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "gaussian": GaussianLikelihood,
    "gaussian, constrained": lambda: GaussianLikelihood(noise_constraint=Interval(1e-6, 0.9)),
    "fixed noise": lambda: FixedNoiseGaussianLikelihood(torch.linspace(0.1, 1, N).double()),
    "fixed and learned noise": lambda: FixedNoiseGaussianLikelihood(
        torch.linspace(0.1, 1, N).double(), learn_additional_noise=True
    ),
    "fixed noise of one size": lambda: FixedNoiseGaussianLikelihood(torch.full((N,), 0.3).double()),
    "missing observations allowed": likelihoods.GaussianLikelihoodWithMissingObs,
    "noise prior": lambda: GaussianLikelihood(noise_prior=priors.GammaPrior(1.1, 0.05)),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_step_of_every_kernel_matches_upstream(kernel: str) -> None:
    compare_step(exact_gp(KERNELS[kernel](), inputs(N)))


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_step_of_every_mean_and_likelihood_matches_upstream(mean: str, likelihood: str) -> None:
    compare_step(exact_gp(rbf(), inputs(N), likelihood=LIKELIHOODS[likelihood](), mean=MEANS[mean]()))


@pytest.mark.parametrize("kernel", ["rbf ard", "sum", "of a user"])
@pytest.mark.parametrize("d", [0.1, 1.0])
def test_priors_and_constraints_match_upstream(kernel: str, d: float) -> None:
    covar = k.ScaleKernel(
        k.MaternKernel(
            2.5,
            ard_num_dims=2,
            lengthscale_prior=priors.GammaPrior(3.0, 6.0),
            lengthscale_constraint=GreaterThan(d, transform=None, initial_value=2.0),
        ),
        outputscale_prior=priors.LogNormalPrior(0.0, 1.0),
        outputscale_constraint=LessThan(5.0),
    )
    mll = exact_gp(covar + KERNELS[kernel](), inputs(N), likelihood=LIKELIHOODS["noise prior"]())
    with torch.no_grad():
        covar.base_kernel.raw_lengthscale.clamp_min_(d + 0.5)
    compare_step(mll)


@pytest.mark.parametrize("batch", [(4,), (2, 3), (1,)])
@pytest.mark.parametrize("likelihood", ["homoskedastic", "batch", "fixed"])
def test_batch_models_match_upstream(batch: tuple[int, ...], likelihood: str) -> None:
    x = inputs(N, batch=batch)
    made = {
        "homoskedastic": GaussianLikelihood,
        "batch": lambda: GaussianLikelihood(batch_shape=torch.Size(batch)),
        "fixed": lambda: FixedNoiseGaussianLikelihood(0.1 + x[..., 0]),
    }[likelihood]()
    mean = means.ConstantMean(batch_shape=torch.Size(batch))
    compare_step(exact_gp(rbf(batch), x, likelihood=made, mean=mean))
    # The same inputs for the whole batch, and the same kernel for a batch of inputs.
    shared = x.reshape(-1, N, 2)[0]
    if likelihood != "fixed":
        compare_step(exact_gp(rbf(batch), shared, y=targets(x), likelihood=made, mean=mean))
    compare_step(exact_gp(rbf(), x, likelihood=made, mean=mean))
    compare_step(exact_gp(rbf(batch), x, likelihood=made))


@pytest.mark.parametrize("kernel_batch", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("targets_batch", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("n", [2, N])
def test_targets_that_share_a_covariance_match_upstream(
    kernel_batch: tuple[int, ...], targets_batch: tuple[int, ...], n: int
) -> None:
    y = targets(inputs(n, batch=targets_batch, seed=2))
    mll = exact_gp(rbf(kernel_batch), inputs(n), y)
    compare_step(mll)
    with torch.no_grad():
        compare_step(mll)


def test_batch_models_with_priors_match_upstream() -> None:
    batch = torch.Size([3])
    kernel = k.ScaleKernel(
        k.RBFKernel(batch_shape=batch, ard_num_dims=2, lengthscale_prior=priors.GammaPrior(3.0, 6.0)), batch_shape=batch
    )
    likelihood = GaussianLikelihood(batch_shape=batch, noise_prior=priors.GammaPrior(1.1, 0.05))
    compare_step(exact_gp(kernel, inputs(N, batch=(3,)), likelihood=likelihood))


@pytest.mark.parametrize("likelihood", ["fixed noise", "fixed and learned noise"])
def test_noise_given_with_the_call_matches_upstream(likelihood: str) -> None:
    mll = exact_gp(rbf(), inputs(N), likelihood=LIKELIHOODS[likelihood]())
    noise = torch.linspace(0.5, 1, N).double().requires_grad_()
    model = mll.model

    def step() -> Tensor:
        return mll(model(*model.train_inputs), model.train_targets, noise=noise)

    compare(step, {**dict(mll.named_parameters()), "noise": noise})


def test_heteroskedastic_noise_matches_upstream() -> None:
    x = inputs(N)
    noise_gp = exact_gp(rbf(), x, y=targets(x, seed=5)).model
    noise_model = likelihoods.noise_models.HeteroskedasticNoise(noise_gp.eval())
    mll = exact_gp(rbf(), x, likelihood=likelihoods.gaussian_likelihood._GaussianLikelihoodBase(noise_model))

    def step() -> Tensor:
        noise_gp.train()  # else the noise model keeps the graph of the last prediction
        noise_gp.eval()
        return loss(mll, [x])

    compare(step, dict(mll.named_parameters()), times=2)  # the noise model's prediction and the loss


@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2 ard", "periodic", "sum", "product", "of a user"])
def test_deep_kernel_learning_matches_upstream(kernel: str) -> None:
    x = inputs(N)
    likelihood = GaussianLikelihood()
    model = DeepGP(x, targets(x), KERNELS[kernel](), likelihood).double()
    mll = scatter(ExactMarginalLogLikelihood(likelihood, model))
    result = compare_step(mll)
    assert any(grad.any() for name, grad in result.grads.items() if "network" in name)


@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2 ard", "rational quadratic", "periodic", "sum", "product"])
def test_gradients_of_the_inputs_match_upstream(kernel: str) -> None:
    x = inputs(N).requires_grad_()
    mll = exact_gp(KERNELS[kernel](), x, y=targets(x.detach()))
    compare_step(mll, leaves={"x": x})


def test_gradients_of_the_targets_match_upstream() -> None:
    y = targets(inputs(N)).requires_grad_()
    compare_step(exact_gp(rbf(), inputs(N), y=y), leaves={"y": y})


@pytest.mark.parametrize(
    "frozen", ["covar_module", "mean_module", "likelihood", "raw_lengthscale", "raw_outputscale", ""]
)
def test_frozen_parameters_match_upstream(frozen: str) -> None:
    mll = exact_gp(rbf(), inputs(N))
    for name, parameter in mll.named_parameters():
        parameter.requires_grad_(frozen not in name)
    compare_step(mll)


class HalfLengthscale(k.RBFKernel):
    """A kernel whose lengthscale is not what its constraint makes of it."""

    @property
    def lengthscale(self) -> Tensor:
        return super().lengthscale / 2


class Steep(GreaterThan):
    def transform(self, tensor: Tensor) -> Tensor:
        return super().transform(3 * tensor)


# How a lengthscale comes from what is optimized.
LENGTHSCALES: dict[str, Callable[[], Kernel]] = {
    "softplus": k.RBFKernel,
    "above a bound": lambda: k.RBFKernel(lengthscale_constraint=GreaterThan(0.3)),
    "above several bounds": lambda: k.RBFKernel(
        ard_num_dims=2, lengthscale_constraint=GreaterThan(torch.tensor([0.1, 0.4]))
    ),
    "below a bound": lambda: k.RBFKernel(lengthscale_constraint=LessThan(5.0)),
    "in an interval": lambda: k.RBFKernel(lengthscale_constraint=Interval(0.1, 5.0)),
    "exponential": lambda: k.RBFKernel(lengthscale_constraint=Positive(torch.exp, torch.log)),
    "sharper softplus": lambda: k.RBFKernel(
        lengthscale_constraint=Positive(torch.nn.Softplus(beta=2.0), lambda y: torch.log(torch.expm1(2.0 * y)) / 2.0)
    ),
    "without transform": lambda: k.RBFKernel(
        lengthscale_constraint=GreaterThan(0.1, transform=None, initial_value=1.0)
    ),
    "constraint of a user": lambda: k.RBFKernel(lengthscale_constraint=Steep(0.1)),
    "property of a user": HalfLengthscale,
}


@pytest.mark.parametrize("raw", [None, -30.0, 19.0, 21.0, 50.0])
@pytest.mark.parametrize("case", LENGTHSCALES)
def test_lengthscale_is_what_its_constraint_makes_of_it(case: str, raw: float | None) -> None:
    mll = exact_gp(k.ScaleKernel(LENGTHSCALES[case]()), inputs(N))
    if raw is not None and "softplus" in case:
        with torch.no_grad():
            mll.model.covar_module.base_kernel.raw_lengthscale.fill_(raw)
            mll.likelihood.noise_covar.raw_noise.fill_(abs(raw))
    compare_step(mll)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["rbf ard", "matern 3/2", "sum", "of a user"])
def test_smallest_data_sets_match_upstream(kernel: str, n: int) -> None:
    compare_step(exact_gp(KERNELS[kernel](), inputs(n)))


class PointsOfAUser(Tensor):
    """A tensor, with nothing to it."""


@pytest.mark.parametrize("prior", [None, priors.GammaPrior(3.0, 6.0)], ids=["", "prior"])
def test_inputs_of_a_class_of_a_users_own_match_upstream(prior: priors.Prior | None) -> None:
    mll = exact_gp(k.ScaleKernel(k.RBFKernel(lengthscale_prior=prior)), inputs(N))
    mll.model.set_train_data(inputs(N).as_subclass(PointsOfAUser), strict=False)
    compare(lambda: loss(mll).as_subclass(Tensor), dict(mll.named_parameters()))


@pytest.mark.parametrize("of_a_user", ["inputs", "targets", "neither"])
def test_loss_may_be_written_to(of_a_user: str) -> None:
    mll = exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(N))
    (x,), y = mll.model.train_inputs, mll.model.train_targets
    if of_a_user == "inputs":
        mll.model.set_train_data(x.as_subclass(PointsOfAUser), strict=False)
    elif of_a_user == "targets":
        y = y.as_subclass(PointsOfAUser)
    losses = []
    for flag in (False, True):
        with use_torch_tensors(flag), routes(**({"tensors": 1} if flag else {})):
            written = mll(mll.model(*mll.model.train_inputs), y)
        written.mul_(-2)
        written.backward()
        losses.append(written.detach().as_subclass(Tensor))
    assert_near(losses[1], losses[0])


@pytest.mark.parametrize("kernel", ["rbf", "matern 3/2"])
def test_points_without_coordinates_match_upstream(kernel: str) -> None:
    made = {"rbf": k.RBFKernel, "matern 3/2": lambda: k.MaternKernel(1.5)}[kernel]()
    compare_step(exact_gp(k.ScaleKernel(made), inputs(N, 0), torch.linspace(0.0, 1.0, N, dtype=torch.float64)))


@pytest.fixture
def blocks_of_four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every matrix were a large one."""
    monkeypatch.setattr(kernel_log_prob, "_AT_ONCE", {"cpu": 0})
    monkeypatch.setattr(kernel_matrix, "_ELEMENTS", {"cpu": (0, 0)})
    monkeypatch.setattr(kernel_matrix, "_LEAST_ROWS", 4)


@pytest.mark.usefixtures("blocks_of_four_rows")
@pytest.mark.parametrize("n", [4, 13])
@pytest.mark.parametrize("kernel", KERNELS)
def test_matrices_worked_through_in_blocks_match_upstream(kernel: str, n: int) -> None:
    compare_step(exact_gp(KERNELS[kernel](), inputs(n)))
    x = inputs(n).requires_grad_()
    compare_step(exact_gp(KERNELS[kernel](), x, y=targets(x.detach())), leaves={"x": x}, rtol=1e-7)


@pytest.mark.usefixtures("blocks_of_four_rows")
def test_batches_worked_through_in_blocks_match_upstream() -> None:
    compare_step(exact_gp(rbf((3,)), inputs(13, batch=(3,))))


@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2 ard"])
def test_large_matrices_match_upstream(kernel: str) -> None:
    with settings.max_cholesky_size(1100):
        compare_step(exact_gp(KERNELS[kernel](), inputs(1100)))


@pytest.mark.parametrize(("n", "route"), [(800, "tensors"), (801, "upstream")])
def test_size_limit_is_upstreams(n: int, route: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conjugate gradients that have not converged
        compare_step(exact_gp(rbf(), inputs(n)), route=route)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: k.ScaleKernel(k.LinearKernel()),
        lambda: k.InducingPointKernel(rbf(), inputs(4), GaussianLikelihood()),
        lambda: k.GridInterpolationKernel(k.RBFKernel(), grid_size=12, num_dims=2),
        lambda: k.RFFKernel(3, num_dims=2),
    ],
    ids=["linear", "inducing points", "interpolated grid", "random features"],
)
def test_structured_models_stay_upstream(kernel: Callable[[], Kernel]) -> None:
    compare_step(exact_gp(kernel(), inputs(N)), route="upstream")


# What a user may do to the prior, and what must then be done to it here.
PRIORS: dict[str, Callable[[GP, MultivariateNormal, Tensor], MultivariateNormal]] = {
    "scaled": lambda model, prior, x: MultivariateNormal(2 * prior.mean, prior.lazy_covariance_matrix * 2.0),
    "shifted": lambda model, prior, x: prior + 1.0,
    "multiplied": lambda model, prior, x: prior * 2.0,
    "added to itself": lambda model, prior, x: prior + prior,
    "as a tensor": lambda model, prior, x: MultivariateNormal(prior.mean, prior.covariance_matrix),
    "of a copy of the inputs": lambda model, prior, x: MultivariateNormal(prior.mean, model.covar_module(x, x.clone())),
    "evaluated": lambda model, prior, x: MultivariateNormal(prior.mean, model.covar_module(x).evaluate_kernel()),
    "with jitter": lambda model, prior, x: prior.add_jitter(0.1),
    "sum of two": lambda model, prior, x: MultivariateNormal(prior.mean, model.covar_module(x) + model.covar_module(x)),
}


@pytest.mark.parametrize("case", PRIORS)
def test_models_that_do_more_to_their_prior_match_upstream(case: str) -> None:
    class OfAUserGP(GP):
        def forward(self, x: Tensor) -> MultivariateNormal:
            return PRIORS[case](self, super().forward(x), x)

    likelihood = GaussianLikelihood()
    model = OfAUserGP(inputs(N), targets(inputs(N)), rbf(), likelihood).double()
    compare_step(scatter(ExactMarginalLogLikelihood(likelihood, model)))


class JitteredLikelihood(GaussianLikelihood):
    def marginal(self, function_dist: MultivariateNormal, *params, **kwargs) -> MultivariateNormal:
        return super().marginal(function_dist, *params, **kwargs).add_jitter(0.5)


class DoubledNoiseLikelihood(GaussianLikelihood):
    def _shaped_noise_covar(self, base_shape: torch.Size, *params, **kwargs):
        return super()._shaped_noise_covar(base_shape, *params, **kwargs) * 2.0


class DoubledMeanLikelihood(GaussianLikelihood):
    def __call__(self, function_dist: MultivariateNormal, *params, **kwargs) -> MultivariateNormal:
        return super().__call__(MultivariateNormal(2 * function_dist.mean, function_dist.lazy_covariance_matrix))


class RenamedNoiseLikelihood(GaussianLikelihood):
    @property
    def noise(self) -> Tensor:
        return 3 * self.noise_covar.noise


class QuadrupledNoise(likelihoods.noise_models.HomoskedasticNoise):
    def forward(self, *params, **kwargs):
        return super().forward(*params, **kwargs) * 4.0


class CalledNoise(likelihoods.noise_models.HomoskedasticNoise):
    def __call__(self, *params, **kwargs):
        return super().__call__(*params, **kwargs) * 4.0


class CalledNoiseLikelihood(GaussianLikelihood):
    def __init__(self):
        super().__init__()
        self.noise_covar = CalledNoise()


class QuadrupledNoiseLikelihood(GaussianLikelihood):
    def __init__(self):
        super().__init__()
        self.noise_covar = QuadrupledNoise()


@pytest.mark.parametrize(
    "likelihood",
    [
        JitteredLikelihood,
        DoubledNoiseLikelihood,
        DoubledMeanLikelihood,
        RenamedNoiseLikelihood,
        QuadrupledNoiseLikelihood,
        CalledNoiseLikelihood,
    ],
)
def test_likelihoods_of_a_users_own_match_upstream(likelihood: type[Likelihood]) -> None:
    compare_step(exact_gp(rbf(), inputs(N), likelihood=likelihood()))


def test_added_loss_terms_match_upstream() -> None:
    class Penalty(AddedLossTerm):
        def __init__(self, value: Tensor):
            self.value = value

        def loss(self, *params) -> Tensor:
            return -self.value.square().sum()

    class PenalizedGP(GP):
        def forward(self, x: Tensor) -> MultivariateNormal:
            self.update_added_loss_term("penalty", Penalty(self.covar_module.outputscale))
            return super().forward(x)

    likelihood = GaussianLikelihood()
    model = PenalizedGP(inputs(N), targets(inputs(N)), rbf(), likelihood).double()
    model.register_added_loss_term("penalty")
    compare_step(scatter(ExactMarginalLogLikelihood(likelihood, model)))


def test_further_terms_of_a_users_own_match_upstream() -> None:
    class Penalized(ExactMarginalLogLikelihood):
        def _add_other_terms(self, res: Tensor, params: tuple) -> Tensor:
            return super()._add_other_terms(res, params) + self.model.covar_module.outputscale

    compare_step(exact_gp(rbf(), inputs(N), mll=Penalized))


def test_whole_numbers_as_inputs_match_upstream() -> None:
    mll = exact_gp(rbf(), inputs(N))
    x = torch.randint(0, 9, (N, 2), generator=torch.Generator().manual_seed(0))
    mll.model.set_train_data(x, strict=False)
    compare_step(mll)
    compare(lambda: mll.train().eval().model(x[:3] + 1).covariance_matrix, {})


BOUNDS = {
    "for each batch": torch.tensor([[0.1], [0.2], [0.3]]),
    "for each value": torch.tensor([0.1, 0.2]),
    "with a gradient": torch.tensor(0.1),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_lower_bounds_of_the_noise_match_upstream(case: str) -> None:
    constraint = GreaterThan(BOUNDS[case].clone())
    leaves = {}
    if case == "with a gradient":
        leaves["bound"] = constraint.lower_bound.requires_grad_()
    likelihood = GaussianLikelihood(noise_constraint=constraint)
    compare_step(exact_gp(rbf(), inputs(N), likelihood=likelihood), leaves=leaves)


def test_as_many_noises_as_points_are_a_batch_as_with_upstream() -> None:
    mll = exact_gp(rbf(), inputs(N))
    mll.likelihood.noise_covar.raw_noise = torch.nn.Parameter(torch.linspace(0.0, 1.0, N).double())
    assert compare_step(mll).value.shape == (1, N)


def test_modules_with_priors_of_another_kind_match_upstream() -> None:
    mll = exact_gp(rbf(), inputs(N))
    mll.model.network = Network()
    mll.model.network._priors = {"of the weights": 1.0}
    compare_step(mll)


def test_inputs_without_a_dimension_match_upstream() -> None:
    compare_step(exact_gp(k.ScaleKernel(k.RBFKernel()), inputs(N, 1)[:, 0], y=targets(inputs(N, 1))))


SETTINGS = {
    "lazily_evaluate_kernels": lambda: settings.lazily_evaluate_kernels(False),
    "memory_efficient": lambda: settings.memory_efficient(True),
    "debug": lambda: settings.debug(False),
    "trace_mode": lambda: settings.trace_mode(True),
    "max_eager_kernel_size": lambda: settings.max_eager_kernel_size(1),
    "checkpoint_kernel": lambda: checkpoint_kernel(4),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_upstreams_settings_change_nothing_that_they_would_not_change_upstream(case: str) -> None:
    with SETTINGS[case]():
        compare_step(exact_gp(rbf(), inputs(N)), route="upstream" if case == "checkpoint_kernel" else "tensors")


def test_data_and_parameters_of_different_dtypes_match_upstream() -> None:
    for dtype, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        mll = exact_gp(rbf(), inputs(N, dtype=dtype))
        mll.model.set_train_data(inputs(N, dtype=other), targets(inputs(N)).to(other), strict=False)
        compare_step(mll, rtol=1e-5)


class MultitaskGP(ExactGP):
    """Tasks that share a kernel."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: Likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = means.MultitaskMean(means.ConstantMean(), num_tasks=2)
        self.covar_module = k.MultitaskKernel(k.RBFKernel(), num_tasks=2, rank=1)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_multitask_kernel_stays_upstream() -> None:
    x = inputs(N)
    likelihood = likelihoods.MultitaskGaussianLikelihood(num_tasks=2)
    model = MultitaskGP(x, torch.stack([targets(x), targets(x, seed=3)], -1), likelihood).double()
    # The Kronecker product factorizes its dense factors, which with the flag on are not copied.
    compare_step(scatter(ExactMarginalLogLikelihood(likelihood, model)), route="upstream", to_the_bit=False)


@pytest.mark.parametrize("policy", ["mask", "ignore"])
def test_observation_policy_matches_upstream(policy: str) -> None:
    x, y = inputs(N), targets(inputs(N))
    if policy == "mask":
        y[::4] = float("nan")
    with settings.observation_nan_policy(policy):
        compare_step(exact_gp(rbf(), x, y=y), route="upstream" if policy == "mask" else "tensors")


def test_observation_policy_fill_is_refused_as_by_upstream() -> None:
    mll = exact_gp(rbf(), inputs(N))
    for flag in (False, True):
        with use_torch_tensors(flag), settings.observation_nan_policy("fill"), pytest.raises(ValueError, match="fill"):
            loss(mll)


@pytest.mark.parametrize("same", [True, False])
def test_model_list_matches_upstream(same: bool) -> None:
    x = inputs(N)
    singles = [exact_gp(rbf(), x), exact_gp(rbf() if same else k.PiecewisePolynomialKernel(), x, y=targets(x, seed=7))]
    model = IndependentModelList(*(mll.model for mll in singles))
    likelihood = likelihoods.LikelihoodList(*(mll.likelihood for mll in singles))
    mll = SumMarginalLogLikelihood(likelihood, model)

    def step() -> Tensor:
        return -mll(model(*model.train_inputs), model.train_targets)

    compare(step, dict(mll.named_parameters()), times=2)


def botorch_models() -> dict[str, Callable[[], SingleTaskGP]]:
    x = inputs(N)
    y = torch.stack([targets(x), 3 + 10 * targets(x, seed=3)], -1)
    task = torch.cat([x, (torch.arange(N) % 2).double().unsqueeze(-1)], -1)
    noise = 0.1 + inputs(N, 1, seed=8)
    return {
        "one output": lambda: SingleTaskGP(x, y[:, :1]),
        "two outputs": lambda: SingleTaskGP(x, y),
        "transforms": lambda: SingleTaskGP(
            10 * x, y[:, :1], input_transform=Normalize(2), outcome_transform=Standardize(1)
        ),
        "no transform": lambda: SingleTaskGP(x, y[:, :1], outcome_transform=None),
        "two outputs, transforms": lambda: SingleTaskGP(
            10 * x, y, input_transform=Normalize(2), outcome_transform=Standardize(2)
        ),
        "fixed noise": lambda: SingleTaskGP(x, y[:, :1], noise),
        "batch": lambda: SingleTaskGP(x.expand(3, N, 2), y[:, :1].expand(3, N, 1)),
        "scaled matern": lambda: SingleTaskGP(x, y[:, :1], covar_module=k.ScaleKernel(k.MaternKernel(2.5))),
        "multitask": lambda: MultiTaskGP(task, y[:, :1], task_feature=-1),
    }


@pytest.fixture
def botorch_settings() -> Iterator[None]:
    """What importing BoTorch sets for the whole process."""
    with (
        settings.fast_computations(False, False, False),
        settings.max_cholesky_size(4096),
        settings.cholesky_max_tries(6),
    ):
        yield


@pytest.mark.usefixtures("botorch_settings")
@pytest.mark.parametrize("case", botorch_models())
def test_step_of_botorch_models_matches_upstream(case: str) -> None:
    model = botorch_models()[case]()
    mll = ExactMarginalLogLikelihood(model.likelihood, model).train()
    with torch.no_grad():
        for parameter in mll.parameters():  # BoTorch's are bounded from below
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    compare_step(mll, list(model.train_inputs))


def hyperparameters(mll: MarginalLogLikelihood) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in mll.named_parameters()}


@pytest.mark.usefixtures("botorch_settings")
@pytest.mark.parametrize("case", ["one output", "two outputs", "transforms", "model list"])
def test_botorch_fit_takes_the_tensor_path_and_finds_the_same_hyperparameters(case: str) -> None:
    found = {}
    for flag in (False, True):
        if case == "model list":
            model = ModelListGP(botorch_models()["one output"](), botorch_models()["transforms"]())
            mll = SumMarginalLogLikelihood(model.likelihood, model)
        else:
            model = botorch_models()[case]()
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
        dense.routes.clear()
        with use_torch_tensors(flag):
            fit_gpytorch_mll(mll)
        assert (dense.routes["tensors"] > 5) == flag
        assert dense.routes["upstream"] == 0
        found[flag] = hyperparameters(mll)
    for name, value in found[False].items():
        assert_near(found[True][name], value, name, rtol=1e-4)


def diabetes() -> tuple[Tensor, Tensor]:
    x, y = load_diabetes(return_X_y=True)
    return torch.from_numpy(x)[:200], torch.from_numpy(y)[:200]


def uci(name: str) -> tuple[Tensor, Tensor]:
    file = DATA / name / "data.csv.gz"
    if not file.exists():
        pytest.skip(f"no {name} data set beside the checkout")
    with gzip.open(file, "rt") as text:
        table = torch.tensor([[float(cell) for cell in row] for row in list(csv.reader(text))[1:201]]).double()
    return table[:, :-1], table[:, -1]


def standardize(values: Tensor) -> Tensor:
    spread = values.std(0)
    return (values - values.mean(0)) / torch.where(spread > 0, spread, 1.0)


@pytest.mark.parametrize("name", ["diabetes", "concrete", "airfoil"])
@pytest.mark.parametrize("matern", [False, True])
def test_200_steps_on_real_data_end_at_the_same_hyperparameters(name: str, matern: bool) -> None:
    x, y = (standardize(each) for each in (diabetes() if name == "diabetes" else uci(name)))
    d = x.size(-1)
    ends = {}
    for flag in (False, True):
        base = k.MaternKernel(2.5, ard_num_dims=d) if matern else k.RBFKernel(ard_num_dims=d)
        likelihood = GaussianLikelihood().double()
        model = GP(x, y, k.ScaleKernel(base), likelihood).double()
        mll = ExactMarginalLogLikelihood(likelihood, model)
        optimizer = torch.optim.Adam(mll.parameters(), lr=0.1)
        with use_torch_tensors(flag), routes(**({"tensors": 200} if flag else {})):
            for _ in range(200):
                optimizer.zero_grad()
                step = loss(mll)
                step.backward()
                optimizer.step()
        ends[flag] = {**hyperparameters(mll), "loss": step.detach()}
    for end, value in ends[False].items():
        assert_near(ends[True][end], value, end, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["rbf ard", "matern 3/2", "rational quadratic", "periodic", "sum", "product"])
@pytest.mark.parametrize("n", [40, 400])
def test_float32_is_no_further_from_float64_than_upstream(kernel: str, n: int) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(n, dtype=torch.float32))
    leaves = dict(mll.named_parameters())
    with routes(tensors=1):
        on = evaluate(lambda: loss(mll), leaves, flag=True)
    off = evaluate(lambda: loss(mll), leaves, flag=False)
    mll.double()
    exact = evaluate(lambda: loss(mll), dict(mll.named_parameters()), flag=False)
    scale = max(grad.abs().max() for grad in exact.grads.values())
    assert (on.value - exact.value).abs() <= 2 * (off.value - exact.value).abs() + 1e-5 * exact.value.abs()
    for name, grad in exact.grads.items():
        error, upstream_error = ((each.grads[name] - grad).abs().max() for each in (on, off))
        assert error <= 2 * upstream_error + 1e-5 * scale, name
