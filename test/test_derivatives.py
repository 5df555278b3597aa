"""Derivatives of the loss of every kind: second ones, `torch.func`, forward mode, vmap over hyperparameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from both_ways import assert_near, exact_gp, generator, inputs, loss, routes, targets
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from gpytorch import kernels as k
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

N = 7


class OfAUser(Kernel):
    """A kernel without a closed form."""

    has_lengthscale = True

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        return torch.exp(-((x1.unsqueeze(-2) - x2.unsqueeze(-3)) / self.lengthscale.unsqueeze(-3)).square().sum(-1))


KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf": lambda: k.ScaleKernel(k.RBFKernel()),
    "rbf ard": lambda: k.ScaleKernel(k.RBFKernel(ard_num_dims=2)),
    "matern 1/2": lambda: k.ScaleKernel(k.MaternKernel(0.5, ard_num_dims=2)),
    "matern 3/2": lambda: k.ScaleKernel(k.MaternKernel(1.5, ard_num_dims=2)),
    "matern 5/2": lambda: k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=2)),
    "rational quadratic": lambda: k.ScaleKernel(k.RQKernel(ard_num_dims=2)),
    "periodic": lambda: k.ScaleKernel(k.PeriodicKernel(ard_num_dims=2)),
    "sum": lambda: k.ScaleKernel(k.RBFKernel()) + k.PeriodicKernel(active_dims=[0]),
    "product": lambda: k.ScaleKernel(k.RBFKernel() * k.MaternKernel(2.5)),
    "of a user": lambda: k.ScaleKernel(OfAUser()),
}


class Objective:
    """The loss as a function of its hyperparameters, in one vector."""

    def __init__(self, mll: ExactMarginalLogLikelihood):
        self.mll = mll
        self.shapes = {name: parameter.shape for name, parameter in mll.named_parameters()}
        self.start = torch.cat([parameter.detach().view(-1) for parameter in mll.parameters()])

    def __call__(self, vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        named = {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

        class Loss(torch.nn.Module):
            def __init__(self, mll: ExactMarginalLogLikelihood):
                super().__init__()
                self.mll = mll

            def forward(self) -> Tensor:
                return loss(self.mll)

        with use_torch_tensors():
            return functional_call(Loss(self.mll), {f"mll.{name}": value for name, value in named.items()}, ())


def objective(kernel: str, **options) -> Objective:
    return Objective(exact_gp(KERNELS[kernel](), inputs(N), **options))


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative by central differences, the last dimension that of `at`."""
    steps = step * torch.eye(at.numel(), dtype=at.dtype)
    return torch.stack([(function(at + each) - function(at - each)) / (2 * step) for each in steps], -1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_passes_gradcheck_and_gradgradcheck(kernel: str) -> None:
    function = objective(kernel)
    start = function.start.requires_grad_()
    with routes(tensors=1):
        function(start)
    assert gradcheck(function, (start,))
    assert gradgradcheck(function, (start,), atol=1e-4)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "matern 1/2"])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_log_prob_of_values_and_inputs_passes_gradgradcheck(kernel: str, of_inputs: bool) -> None:
    covariance = KERNELS[kernel]().double()
    x, y = inputs(4).requires_grad_(of_inputs), targets(inputs(4)).requires_grad_()

    def log_prob(x: Tensor, y: Tensor) -> Tensor:
        covar = covariance(x).add_diagonal(torch.tensor([0.3], dtype=x.dtype))
        with use_torch_tensors():
            return MultivariateNormal(torch.zeros(4, dtype=x.dtype), covar).log_prob(y)

    assert gradcheck(log_prob, (x, y))
    assert gradgradcheck(log_prob, (x, y), atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hessians_agree_with_each_other_and_with_differences_of_gradients(kernel: str) -> None:
    function = objective(kernel)
    expected = differences(grad(function), function.start)
    for computed in (
        torch.autograd.functional.hessian(function, function.start),
        hessian(function)(function.start),
        jacrev(grad(function))(function.start),
    ):
        assert_near(computed, expected, rtol=1e-6)
        assert_near(computed, computed.mT, rtol=1e-9)


# Upstream's own closed forms, of RBF and Matern kernels with one lengthscale, have no second derivative: it comes out
# as if the kernel's slope were a constant.
@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2", "rational quadratic", "periodic", "of a user"])
def test_hessian_matches_upstreams(kernel: str) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N))
    hessians = {}
    for flag in (False, True):
        with use_torch_tensors(flag):
            grads = torch.autograd.grad(loss(mll), list(mll.parameters()), create_graph=True)
            flat = torch.cat([each.view(-1) for each in grads])
            rows = [torch.autograd.grad(each, list(mll.parameters()), retain_graph=True) for each in flat]
        hessians[flag] = torch.stack([torch.cat([each.view(-1) for each in row]) for row in rows])
    assert_near(hessians[True], hessians[False], rtol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_torch_func_is_that_of_backward(kernel: str) -> None:
    function = objective(kernel)
    start = function.start.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(start), start)
    assert_near(grad(function)(function.start), expected, rtol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_mode_is_the_product_with_the_gradient(kernel: str) -> None:
    function = objective(kernel)
    tangent = torch.randn(function.start.shape, generator=generator(3), dtype=torch.float64)
    expected = grad(function)(function.start) @ tangent
    value, derivative = jvp(function, (function.start,), (tangent,))
    assert_near(value, function(function.start))
    assert_near(derivative, expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(function.start, tangent)))
    assert_near(dual.tangent, expected)


@pytest.mark.parametrize("of", ["mean", "variance"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_mode_of_a_prediction_is_reverse_mode(kernel: str, of: str) -> None:
    model = exact_gp(KERNELS[kernel](), inputs(N)).model.eval()
    x = inputs(3, seed=5)
    with use_torch_tensors():
        model(x)  # the factor is made
        function = lambda points: getattr(model(points), of)  # noqa: E731
        assert_near(jacfwd(function)(x), jacrev(function)(x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_vmap_over_hyperparameters_is_a_loop_over_them(kernel: str) -> None:
    function = objective(kernel)
    rng = generator(4)
    vectors = function.start + 0.3 * torch.randn(5, function.start.numel(), generator=rng, dtype=torch.float64)
    assert_near(vmap(function)(vectors), torch.stack([function(each) for each in vectors]))
    assert_near(vmap(grad(function))(vectors), torch.stack([grad(function)(each) for each in vectors]))
    assert_near(vmap(hessian(function))(vectors), torch.stack([hessian(function)(each) for each in vectors]))


@pytest.mark.parametrize("noise", [False, True])
def test_fixed_noise_is_differentiated_as_by_differences(noise: bool) -> None:
    likelihood = FixedNoiseGaussianLikelihood(torch.linspace(0.1, 1, N).double(), learn_additional_noise=noise)
    function = objective("rbf ard", likelihood=likelihood)
    assert_near(grad(function)(function.start), differences(function, function.start), rtol=1e-7)
    assert_near(hessian(function)(function.start), differences(grad(function), function.start), rtol=1e-6)


def test_vmap_over_targets_is_a_batch_of_targets() -> None:
    covariance, x = KERNELS["rbf ard"]().double(), inputs(N)
    ys = torch.randn(6, N, generator=generator(), dtype=torch.float64)

    def log_prob(y: Tensor) -> Tensor:
        covar = covariance(x).add_diagonal(torch.tensor([0.3], dtype=y.dtype))
        with use_torch_tensors():
            return MultivariateNormal(torch.zeros(N, dtype=y.dtype), covar).log_prob(y)

    assert_near(vmap(log_prob)(ys).detach(), log_prob(ys).detach())


def test_third_derivative_is_that_of_differences() -> None:
    function = objective("rbf ard")
    expected = differences(hessian(function), function.start)
    assert_near(jacrev(hessian(function))(function.start), expected, rtol=1e-6)


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_second_derivatives_of_batch_models_match_upstream(batch: tuple[int, ...]) -> None:
    kernel = k.ScaleKernel(k.RBFKernel(ard_num_dims=2, batch_shape=torch.Size(batch)), batch_shape=torch.Size(batch))
    mll = exact_gp(kernel, inputs(N, batch=batch))
    products = {}
    for flag in (False, True):
        with use_torch_tensors(flag):
            grads = torch.autograd.grad(loss(mll).sum(), list(mll.parameters()), create_graph=True)
            total = sum(each.square().sum() for each in grads)
            products[flag] = torch.autograd.grad(total, list(mll.parameters()))
    for ours, theirs in zip(products[True], products[False], strict=True):
        assert_near(ours, theirs)


def test_second_derivative_of_several_values_at_once_matches_upstream() -> None:
    kernel = KERNELS["rbf ard"]().double()
    parameters = list(kernel.parameters())
    y = torch.randn(4, N, generator=generator(), dtype=torch.float64).requires_grad_()
    products = {}
    for flag in (False, True):
        covar = kernel(inputs(N)).add_diagonal(torch.tensor([0.3], dtype=y.dtype))
        with use_torch_tensors(flag):
            res = MultivariateNormal(torch.zeros(N, dtype=y.dtype), covar).log_prob(y)
        grads = torch.autograd.grad(res.square().sum(), [*parameters, y], create_graph=True)
        products[flag] = torch.autograd.grad(sum(each.square().sum() for each in grads), [*parameters, y])
    for ours, theirs in zip(products[True], products[False], strict=True):
        assert_near(ours, theirs)


def test_penalty_on_the_gradient_can_be_trained() -> None:
    """A loss that contains its own gradient: the graph of the first backward is walked by the second."""
    results = {}
    for flag in (False, True):
        mll = exact_gp(KERNELS["rbf ard"](), inputs(N))
        with use_torch_tensors(flag):
            value = loss(mll)
            grads = torch.autograd.grad(value, list(mll.parameters()), create_graph=True)
            (value + sum(each.square().sum() for each in grads)).backward()
        results[flag] = [parameter.grad for parameter in mll.parameters()]
    for ours, theirs in zip(results[True], results[False], strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("of", ["mean", "variance", "covariance_matrix"])
@pytest.mark.parametrize("kernel", ["rbf ard", "matern 5/2", "product", "of a user"])
def test_batched_cotangents_of_a_prediction_are_a_loop_over_them(kernel: str, of: str) -> None:
    model, x = exact_gp(KERNELS[kernel](), inputs(N)).eval().model, inputs(3, seed=5).requires_grad_()
    with use_torch_tensors():
        value = getattr(model(x), of)
        cotangents = torch.randn(4, *value.shape, generator=generator(), dtype=value.dtype)
        each = [torch.autograd.grad(value, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
        (batched,) = torch.autograd.grad(value, x, cotangents, is_grads_batched=True)
    assert not batched.requires_grad
    assert_near(batched, torch.stack(each), rtol=1e-7)


@pytest.mark.parametrize("kernel", ["rbf ard", "product", "of a user"])
@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
def test_batched_cotangents_of_a_loss_are_a_loop_over_them(kernel: str, batch: tuple[int, ...]) -> None:
    mll = exact_gp(KERNELS[kernel](), inputs(N, batch=batch))
    parameters = list(mll.parameters())
    with use_torch_tensors():
        value = loss(mll)
        cotangents = torch.randn(4, *batch, generator=generator(), dtype=value.dtype)
        each = [torch.autograd.grad(value, parameters, cotangent, retain_graph=True) for cotangent in cotangents]
        batched = torch.autograd.grad(value, parameters, cotangents, is_grads_batched=True)
    for actual, *expected in zip(batched, *each, strict=True):
        assert_near(actual, torch.stack(expected), rtol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kernel", KERNELS)
def test_hessian_on_cuda_is_that_on_cpu(kernel: str) -> None:
    function = objective(kernel)
    expected = hessian(function)(function.start)
    x = inputs(N).cuda()
    cuda = Objective(exact_gp(KERNELS[kernel](), x.cpu()).cuda())
    cuda.mll.model.set_train_data(x, targets(x.cpu()).cuda(), strict=False)
    assert_near(hessian(cuda)(function.start.cuda()).cpu(), expected, rtol=1e-7)
