"""BoTorch's fully Bayesian models predict with a batch of exact GPs, one for each sample of the hyperparameters."""

from __future__ import annotations

from importlib.util import find_spec

import both_ways
import pytest
import torch
from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpytorch.settings import use_torch_tensors

pytestmark = pytest.mark.skipif(
    find_spec("numpyro") is None, reason="BoTorch needs botorch[fully_bayesian] for these models"
)

NUM_SAMPLES, NUM_TRAIN, NUM_DIMS = 4, 20, 3


def fitted(has_noise: bool) -> SaasFullyBayesianSingleTaskGP:
    """A model with samples of its hyperparameters as a fit would leave them, without the minutes that it takes."""
    x, rng = both_ways.inputs(NUM_TRAIN, NUM_DIMS), both_ways.generator(2)
    y = both_ways.targets(x).unsqueeze(-1)
    y = (y - y.mean()) / y.std()
    model = SaasFullyBayesianSingleTaskGP(x, y, train_Yvar=torch.full_like(y, 0.02) if has_noise else None)

    def draw(*shape: int) -> Tensor:
        return torch.rand(NUM_SAMPLES, *shape, generator=rng, dtype=torch.float64)

    samples = {"mean": draw(), "lengthscale": 0.3 + draw(NUM_DIMS), "outputscale": 0.5 + draw(), "noise": 0.1 * draw()}
    model.load_mcmc_samples(samples)
    return model.eval()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                memory = each.untyped_storage()
                self.num_elements = max(self.num_elements, memory.nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("has_noise", [False, True], ids=["noise inferred", "noise observed"])
@pytest.mark.parametrize(("batch", "q"), [((), 1), ((), 5), ((6,), 1), ((2, 3), 4)])
def test_posteriors_match(batch: tuple[int, ...], q: int, has_noise: bool) -> None:
    x = both_ways.inputs(q, NUM_DIMS, batch, seed=3).requires_grad_()

    def predict() -> Tensor:
        posterior = fitted(has_noise).posterior(x)
        parts = posterior.mixture_mean, posterior.mixture_variance, posterior.distribution.covariance_matrix
        return torch.cat([part.flatten() for part in parts])

    both_ways.compare(predict, {"x": x})


def test_many_single_points_do_not_copy_the_training_covariance_for_each() -> None:
    num_points = 200
    x, model = both_ways.inputs(1, NUM_DIMS, (num_points,)), fitted(has_noise=False)
    with use_torch_tensors(), torch.no_grad(), both_ways.routes(tensors=1), LargestTensor() as largest:
        posterior = model.posterior(x)
        assert posterior.mixture_variance.shape == (num_points, 1, 1)
    # The training inputs, at most, for each: upstream makes a matrix of them for each.
    assert largest.num_elements <= num_points * NUM_SAMPLES * NUM_TRAIN * NUM_DIMS
