"""What users have reported of GPyTorch and BoTorch, each in a few lines: the flag changes none of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from both_ways import GP, assert_near, exact_gp, inputs, loss, routes, scatter, targets
from botorch.acquisition import qMultiFidelityKnowledgeGradient
from botorch.acquisition.cost_aware import InverseCostWeightedUtility
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP, SingleTaskMultiFidelityGP
from botorch.models.cost import AffineFidelityCostModel
from botorch.sampling import SobolQMCNormalSampler
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, settings
from gpytorch.settings import use_torch_tensors

N = 10


def model_of(kernel: k.Kernel | None = None) -> GP:
    return exact_gp(k.ScaleKernel(k.RBFKernel()) if kernel is None else kernel, inputs(N)).eval().model


def botorch_model(cls: type = SingleTaskGP, d: int = 2, **options) -> SingleTaskGP:
    x = inputs(N, d)
    return scatter(cls(x, targets(x).unsqueeze(-1), **options)).eval()


def both(
    report: Callable[[], list[Tensor]], times: int = 1, rtol: float = 1e-8, route: str = "tensors"
) -> list[Tensor]:
    """Assert that a report ends both ways with the same numbers, and takes a route so many times with the flag on."""
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        with use_torch_tensors(flag), routes(**({route: times} if flag else {})):
            results.append([each.detach().clone() for each in report()])
    for i, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert_near(actual, expected, str(i), rtol, atol=1e-12)
    return results[1]


def test_hyperparameter_set_in_evaluation_mode_counts() -> None:
    """gpytorch#1556."""

    def report() -> list[Tensor]:
        model, x = model_of(), inputs(3, seed=3)
        before = model(x)
        found = [before.mean, before.variance]
        model.covar_module.base_kernel.lengthscale = 0.3
        model.likelihood.noise = 0.05
        after = model(x)
        model.train().eval()
        anew = model(x)
        return [*found, after.mean, after.variance, anew.mean, anew.variance]

    found = both(report, times=2)
    assert not torch.allclose(found[1], found[3])
    assert_near(found[3], found[5])


def test_observing_the_mean_leaves_the_mean() -> None:
    """botorch#2611."""

    def report() -> list[Tensor]:
        model, x, new = botorch_model(), inputs(3, seed=3), inputs(2, seed=7)
        mean = model.posterior(x).mean
        fantasy = model.condition_on_observations(new, model.posterior(new).mean)
        return [mean, fantasy.posterior(x).mean, fantasy.posterior(x).variance]

    before, after, _ = both(report, times=2)
    assert_near(after, before, rtol=1e-6)


def test_gradient_at_one_point_is_the_same_five_times() -> None:
    """botorch#279."""

    def report() -> list[Tensor]:
        model, x = botorch_model(), inputs(1, seed=3).requires_grad_()
        posteriors = (model.posterior(x) for _ in range(5))
        return [torch.autograd.grad((each.mean + each.variance.sqrt()).sum(), x)[0] for each in posteriors]

    first, *others = both(report)
    assert all(torch.equal(first, other) for other in others)


def test_inputs_of_a_hundred_thousand_with_lengthscales_of_hundreds() -> None:
    def report() -> list[Tensor]:
        mll = exact_gp(k.ScaleKernel(k.RBFKernel()), 1e5 + 1e3 * inputs(N), targets(inputs(N)))
        mll.model.covar_module.base_kernel.lengthscale = 500.0
        value = loss(mll)
        grads = torch.autograd.grad(value, list(mll.parameters()))
        posterior = mll.eval().model(1e5 + 1e3 * inputs(3, seed=3))
        return [value, *grads, posterior.mean, posterior.variance]

    both(report, times=2)


class Classifier(GP):
    """A GP for each class, of their transformed labels."""

    def __init__(self) -> None:
        x, labels = inputs(N), (inputs(N).sum(-1) > 1).long()
        likelihood = likelihoods.DirichletClassificationLikelihood(
            labels, dtype=torch.float64, learn_additional_noise=True
        )
        classes = torch.Size([likelihood.num_classes])
        kernel = k.ScaleKernel(k.RBFKernel(batch_shape=classes), batch_shape=classes)
        mean = means.ConstantMean(batch_shape=classes)
        super().__init__(x, likelihood.transformed_targets, kernel, likelihood, mean)


def test_dirichlet_classification_and_the_error_of_its_fantasies() -> None:
    """gpytorch#2579."""
    errors = []

    def report() -> list[Tensor]:
        model = scatter(Classifier().double()).train()
        value = -model.likelihood(model(*model.train_inputs)).log_prob(model.train_targets).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        posterior = model.eval()(inputs(3, seed=3))
        with pytest.raises(RuntimeError, match="targets") as caught:
            model.get_fantasy_model(inputs(2, seed=7), torch.zeros(2, 2, dtype=torch.float64))
        errors.append(str(caught.value))
        return [value, *grads, posterior.mean, posterior.variance]

    both(report, times=2)
    assert errors[0] == errors[1]


def test_thompson_sampling_of_a_thousand_candidates_with_a_seed() -> None:
    def report() -> list[Tensor]:
        candidates = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(1000, dtype=torch.float64)
        model = botorch_model()
        torch.manual_seed(0)
        with torch.no_grad():
            return [MaxPosteriorSampling(model, replacement=False)(candidates, num_samples=4)]

    both(report)


def test_missing_observations_are_masked_in_training_and_prediction() -> None:
    def report() -> list[Tensor]:
        x = inputs(N)
        y = targets(x)
        y[[1, 4]] = float("nan")
        mll = exact_gp(k.ScaleKernel(k.RBFKernel()), x, y)
        with settings.observation_nan_policy("mask"):
            value = loss(mll)
            grads = torch.autograd.grad(value, list(mll.parameters()))
            posterior = mll.eval().model(inputs(3, seed=3))
            return [value, *grads, posterior.mean, posterior.variance]

    both(report, times=2, route="upstream", rtol=1e-12)


def test_adam_with_a_rate_of_one_takes_the_same_forty_steps() -> None:
    def report() -> list[Tensor]:
        mll = exact_gp(k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)), inputs(N))
        optimizer, losses = torch.optim.Adam(mll.parameters(), lr=1.0), []
        for _ in range(40):
            optimizer.zero_grad()
            losses.append(loss(mll))
            losses[-1].backward()
            optimizer.step()
        return [torch.stack(losses), *mll.parameters()]

    both(report, times=40, rtol=1e-6)  # rounding grows with the steps


def test_multi_fidelity_knowledge_gradient_and_its_gradient() -> None:
    """botorch#2402."""

    def report() -> list[Tensor]:
        model = botorch_model(SingleTaskMultiFidelityGP, d=3, data_fidelities=[2])
        cost = InverseCostWeightedUtility(AffineFidelityCostModel(fidelity_weights={2: 1.0}, fixed_cost=5.0))
        acquisition = qMultiFidelityKnowledgeGradient(
            model,
            num_fantasies=4,
            sampler=SobolQMCNormalSampler(torch.Size([4]), seed=0),
            current_value=model.train_targets.max(),
            cost_aware_utility=cost,
            project=lambda x: torch.cat([x[..., :2], torch.ones_like(x[..., 2:])], dim=-1),
        )
        x = inputs(5, 3, batch=(2,), seed=3).requires_grad_()  # one candidate, and one for each of the fantasies
        value = acquisition(x)
        return [value, *torch.autograd.grad(value.sum(), x)]

    both(report, times=2)
