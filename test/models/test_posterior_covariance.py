"""Parts of posterior covariances: upstream's numbers and gradients, and no more computed than is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from both_ways import GP, assert_near, both, exact_gp, inputs, is_given_parts, targets
from botorch.acquisition import qKnowledgeGradient, qLogNoisyExpectedImprovement, qMaxValueEntropy
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import ModelListGP, MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.sampling import SobolQMCNormalSampler
from linear_operator.operators import (
    BlockDiagLinearOperator,
    CatLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from torch import Tensor

from gpytorch import kernels as k
from gpytorch import likelihoods, means, settings
from gpytorch.closed_form.matrix import KernelMatrix
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.functions import shared_rows
from gpytorch.kernels import Kernel
from gpytorch.models import cross_covariance
from gpytorch.models.cholesky_factor import CholeskyFactor
from gpytorch.models.posterior_covariance import Conditional
from gpytorch.settings import use_torch_tensors

N, M, D = 15, 7, 2
BATCH = (2, 3)

KERNELS: dict[str, Callable[[], Kernel]] = {
    "rbf ard": lambda: k.ScaleKernel(k.RBFKernel(ard_num_dims=D)),
    "matern 1/2": lambda: k.ScaleKernel(k.MaternKernel(0.5)),
    "matern 5/2": lambda: k.MaternKernel(2.5),
    "sum of products": lambda: (
        k.ScaleKernel(k.RBFKernel() * k.MaternKernel(1.5, active_dims=[0]))
        + k.ScaleKernel(k.ScaleKernel(k.RQKernel()) * k.PeriodicKernel())
    ),
    "without closed form": lambda: k.ScaleKernel(k.PiecewisePolynomialKernel()),
}

# What is read of a covariance (2 x 3 x 7 x 7)
PARTS: dict[str, Callable[[LinearOperator], LinearOperator | Tensor]] = {
    "last rows": lambda covar: covar[..., -2:, :],
    "columns": lambda covar: covar[..., :, 1:3],
    "block on the diagonal": lambda covar: covar[..., 2:5, 2:5],
    "block across the diagonal": lambda covar: covar[..., 1:4, 2:6],
    "block beside the diagonal": lambda covar: covar[..., :2, 5:],
    "large block": lambda covar: covar[..., 1:, :-1],
    "row": lambda covar: covar[..., 3, :],
    "column": lambda covar: covar[..., 5],
    "element": lambda covar: covar[..., 2, 4],
    "every other row": lambda covar: covar[..., ::2, 1::3],
    "rows by number": lambda covar: covar[..., torch.tensor([5, 0, 5, -1]), :],
    "columns by number": lambda covar: covar[..., 1:6, torch.tensor([4, 4, 2])],
    "elements by number": lambda covar: covar[..., torch.tensor([0, 3, 3]), torch.tensor([1, 3, -2])],
    "elements of a batch by number": lambda covar: covar[torch.tensor([0, 1]), 2, torch.tensor([4, -1]), 1:4],
    "points by number": lambda covar: covar[..., torch.tensor([4, 1]), :][..., torch.tensor([4, 1])],
    "no rows": lambda covar: covar[..., 3:3, :],
    "one of the batch": lambda covar: covar[1],
    "of the batch, rows": lambda covar: covar[:, 2, -2:, :],
    "of the batch, by number": lambda covar: covar[torch.tensor([1, 0, 1]), :, 3:, 3:],
    "rows of rows": lambda covar: covar[..., 2:, :][..., 1:3, ::2][..., -1:, torch.tensor([2, 0])],
    "unsqueezed": lambda covar: covar.unsqueeze(0)[..., -2:, :],
    "expanded": lambda covar: covar.expand(4, *BATCH, M, M)[..., -2:, :],
    "unsqueezed in between and expanded": lambda covar: covar.unsqueeze(1).expand(2, 5, 3, M, M)[:, 1:3, 0, :3, 2:],
    "permuted": lambda covar: covar.permute(1, 0, 2, 3)[..., -2:, 1:],
    "transposed": lambda covar: covar[..., -2:, :].mT,
    "transposed first": lambda covar: covar.mT[..., 1:, 0:2],
    "squeezed": lambda covar: covar[:1, ..., -2:, :].squeeze(0),
    "repeated": lambda covar: covar.repeat(2, 1, 1, 1, 1)[..., -2:, :],
    "times a constant": lambda covar: (covar * 3.0)[..., -2:, :],
    "with jitter": lambda covar: covar.add_jitter(0.5)[..., -2:, :],
    "with noise, on the diagonal": lambda covar: (covar + noise_like(covar))[..., 2:5, 2:5],
    "scaled": lambda covar: scaled(covar)[..., -2:, :],
    "scaled after": lambda covar: DiagLinearOperator(scale_like(covar)._diag[..., -2:]) @ covar[..., -2:, :],
    "scaled on the left, transposed": lambda covar: (scale_like(covar) @ covar).mT[..., 1:, 2:4],
    "scaled with noise": lambda covar: (scale_like(covar) @ (covar + noise_like(covar)))[..., -2:, :],
    "scaled, of the batch": lambda covar: scaled(covar)[:, 1].unsqueeze(0)[..., 3:, :],
    "put together": lambda covar: together(covar)[..., -2:, :],
    "put together and scaled": lambda covar: scaled(together(covar))[..., -2:, :],
    "product of a part with a matrix": lambda covar: (
        covar[..., -2:, :] @ torch.linspace(0, 1, 2 * M).view(M, 2).double()
    ),
    "sum of parts": lambda covar: covar[..., -2:, :] + covar[..., :2, :],
}
SOME = ["last rows", "columns", "block across the diagonal", "rows by number", "every other row"]


def scale_like(covar: LinearOperator) -> DiagLinearOperator:
    return DiagLinearOperator(torch.linspace(1.0, 2.0, covar.shape[:-1].numel()).view(covar.shape[:-1]).double())


def scaled(covar: LinearOperator) -> LinearOperator:
    return scale_like(covar) @ covar @ scale_like(covar)


def noise_like(covar: LinearOperator) -> DiagLinearOperator:
    return DiagLinearOperator(torch.linspace(0.1, 0.2, covar.shape[:-1].numel()).view(covar.shape[:-1]).double())


def together(covar: LinearOperator) -> LinearOperator:
    parts = [covar[:, i].unsqueeze(0) for i in range(3)]
    return BlockDiagLinearOperator(CatLinearOperator(*parts, dim=0), block_dim=0).base_linear_op


def dense(part: LinearOperator | Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else part.to_dense()


def points(batch: tuple = BATCH, num_shared: int = 0) -> Tensor:
    """Return points of which the first are the same in the whole batch."""
    x = inputs(M, D, batch, seed=5)
    return torch.cat([x[(0,) * len(batch)][:num_shared].expand(*batch, -1, -1), x[..., num_shared:, :]], dim=-2)


def with_gradients(read: Callable[[GP, Tensor], list[Tensor]], model: GP, x: Tensor) -> Callable[[], list[Tensor]]:
    """Return what is read, and its gradients in points and hyperparameters."""

    def values_and_gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with settings.detach_test_caches(False):
            values = read(model, leaf)
        leaves = [leaf, *model.parameters()]
        weighted = sum(
            (value * torch.linspace(1, 2, value.numel()).view(value.shape).to(value)).sum() for value in values
        )
        grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
        pairs = zip(leaves, grads, strict=True)
        return [*values, *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs)]

    return values_and_gradients


@pytest.fixture(params=["each its own", "shared", "shared and many"])
def is_shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether points that are the same in the whole batch are known to be, few of them or many."""
    monkeypatch.setattr(shared_rows, "FEW", 2**60 if request.param == "each its own" else 1)
    if request.param == "shared and many":
        monkeypatch.setattr(shared_rows, "MANY_PRODUCTS", 0)
    return request.param != "each its own"


@pytest.mark.parametrize(
    ("part", "kernel"),
    [(part, "rbf ard") for part in PARTS]
    + [(part, kernel) for part in SOME for kernel in KERNELS if kernel != "rbf ard"],
)
def test_part_matches_upstream(part: str, kernel: str, is_shared: bool) -> None:
    model = exact_gp(KERNELS[kernel](), inputs(N, D)).model.eval()

    def read(model: GP, x: Tensor) -> list[Tensor]:
        prediction = model(x)
        return [prediction.mean, dense(PARTS[part](prediction.lazy_covariance_matrix))]

    both(with_gradients(read, model, points(num_shared=4)), model)


@pytest.mark.parametrize(
    "name", ["last rows", "columns", "block across the diagonal", "rows by number", "every other row"]
)
def test_part_of_a_batch_of_models_matches_upstream(name: str, is_shared: bool) -> None:
    shape = torch.Size([3])
    kernel = k.ScaleKernel(k.MaternKernel(2.5, ard_num_dims=D, batch_shape=shape), batch_shape=shape)
    likelihood = likelihoods.GaussianLikelihood(batch_shape=shape)
    x = inputs(N, D, shape)
    model = exact_gp(kernel, x, likelihood=likelihood, mean=means.ConstantMean(batch_shape=shape)).model.eval()

    def read(model: GP, x: Tensor) -> list[Tensor]:
        prediction = model(x.unsqueeze(1).expand(2, 3, M, D))
        return [prediction.mean, dense(PARTS[name](prediction.lazy_covariance_matrix))]

    both(with_gradients(read, model, points((2,), 4)), model)


def test_points_that_are_the_same_have_gradients_of_their_own(is_shared: bool) -> None:
    model = exact_gp(KERNELS["sum of products"](), inputs(N, D)).model.eval()

    def read(model: GP, x: Tensor) -> list[Tensor]:
        prediction = model(x)
        covar = prediction.lazy_covariance_matrix
        return [prediction.mean.square(), covar[..., -1:, :].to_dense(), covar[..., :3].to_dense(), prediction.variance]

    both(with_gradients(read, model, points((4,), M)), model)


@pytest.mark.parametrize("num_shared", [0, 4])
def test_second_derivatives_of_a_part_match_upstream(num_shared: int, is_shared: bool) -> None:
    model = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval()  # upstream has no second derivative of cdist

    def read() -> list[Tensor]:
        x = points((2,), num_shared).requires_grad_()
        prediction = model(x)
        value = prediction.mean.sin().sum() + prediction.lazy_covariance_matrix[..., -2:, :].to_dense().sin().sum()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return [grad, torch.autograd.grad(grad.square().sum(), x)[0]]

    both(read, model)


def test_part_under_program_transformations_is_what_it_is_without() -> None:
    model, x = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval(), points((3,), 4)

    def rows(x: Tensor) -> Tensor:
        covar = model(x).lazy_covariance_matrix
        return torch.cat(
            [covar[..., -2:, :].to_dense(), covar[..., 1:3, torch.tensor([4, 0, 2, 2, 1, 3, 5])].to_dense()]
        )

    with use_torch_tensors():
        model(x[0])  # the caches are filled outside
        expected = torch.autograd.functional.jacobian(rows, x[0])
        with torch.no_grad(), settings.debug(False):  # whose check of the inputs no transformation can take
            assert_near(torch.func.vmap(rows)(x), torch.stack([rows(part) for part in x]))
            for transformed in (torch.func.jacrev(rows), torch.func.jacfwd(rows)):
                assert_near(transformed(x[0]), expected)


class Counted:
    """How many elements of kernel matrices are evaluated, and how many columns are solved for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.elements, self.columns = 0, 0
        evaluate, solves = KernelMatrix.evaluate, (CholeskyFactor.solve, CholeskyFactor.half_solve)

        def evaluated(matrix: KernelMatrix, *args, **kwargs) -> Tensor:
            block = evaluate(matrix, *args, **kwargs)
            self.elements += block.numel()
            return block

        def solved(solve: Callable, factor: CholeskyFactor, rhs: Tensor) -> Tensor:
            self.columns += rhs.shape[:-2].numel() * rhs.size(-1)
            return solve(factor, rhs)

        monkeypatch.setattr(KernelMatrix, "evaluate", evaluated)
        for solve in solves:
            spy = lambda factor, rhs, _solve=solve: solved(_solve, factor, rhs)  # noqa: E731
            monkeypatch.setattr(CholeskyFactor, solve.__name__, spy)

    def take(self) -> tuple[int, int]:
        taken, (self.elements, self.columns) = (self.elements, self.columns), (0, 0)
        return taken


# Rows that are solved for, and elements of K(test, test), of points with the training data evaluated once
COSTS: dict[str, tuple[Callable[[LinearOperator], LinearOperator | Tensor], int, int]] = {
    "rows": (lambda covar: covar[..., -2:, :], 2, 2 * 20),
    "columns": (lambda covar: covar[..., :3], 3, 3 * 20),
    "one row": (lambda covar: covar[..., 4, :], 1, 20),
    "block": (lambda covar: covar[..., 2:5, 10:18], 3, 3 * 8),
    "block on the diagonal": (lambda covar: covar[..., 3:7, 3:7], 4, 4 * 4),
    "rows of columns": (lambda covar: covar[..., 5:][..., :2, :], 2, 2 * 15),
    "rows by number": (lambda covar: covar[..., torch.tensor([7, 2]), :], 2, 2 * 20),
    "elements by number": (lambda covar: covar[..., torch.tensor([7, 2]), torch.tensor([3, 3])], 1, 2),
    "scaled": (lambda covar: scaled(covar)[..., -2:, :], 2, 2 * 20),
    "with noise": (lambda covar: (covar + noise_like(covar))[..., -2:, :], 2, 2 * 20),
    "scaled with noise": (lambda covar: (scale_like(covar) @ (covar + noise_like(covar)))[..., -2:, :], 2, 2 * 20),
    "put together and scaled": (lambda covar: scaled(together(covar))[..., -2:, :], 2, 2 * 20),
    "diagonal of a block": (lambda covar: covar[..., 3:7, 3:7].diagonal(), 4, 0),
}


@pytest.mark.parametrize("part", COSTS)
def test_no_more_is_computed_than_the_part(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_gp(KERNELS["matern 5/2"](), inputs(N, D)).model.eval()
    read, solved, evaluated = COSTS[part]
    x = inputs(20, D, BATCH, seed=5)
    with use_torch_tensors(), torch.no_grad():
        model(x[0])  # fills the caches
        counted = Counted(monkeypatch)
        covar = model(x).lazy_covariance_matrix
        assert counted.take() == (6 * 20 * N, 0)
        dense(read(covar))
        assert counted.take() == (6 * evaluated, 6 * solved)


@is_given_parts  # else the training points are evaluated as well, which come with the others
def test_points_of_a_whole_batch_are_evaluated_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "FEW", 1)
    model = exact_gp(KERNELS["matern 5/2"](), inputs(N, D)).model.eval()
    counted = Counted(monkeypatch)
    with use_torch_tensors(), torch.no_grad():
        model(inputs(1, D))
        for num_evaluated in (4 * N, 0, 0):
            counted.take()
            covar = model(points(num_shared=4)).lazy_covariance_matrix
            assert counted.take() == (num_evaluated + 6 * 3 * N, 0)
            covar[..., -2:, :].to_dense()
            assert counted.take() == (6 * 2 * M, 6 * 2)


def test_few_points_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_gp(KERNELS["matern 5/2"](), inputs(N, D)).model.eval()
    monkeypatch.setattr(cross_covariance.CrossCovariance, "_share", None)
    with use_torch_tensors(), torch.no_grad():
        assert model(points(num_shared=4)).mean.isfinite().all()


CHANGES: dict[str, Callable[[GP, Tensor], object]] = {
    "nothing": lambda model, x: None,
    "points": lambda model, x: x.add_(0.1),
    "one point": lambda model, x: x[..., 1, :].mul_(0.5),
    "one point of one of the batch": lambda model, x: x[1, 2, 1].mul_(0.5),
    "lengthscale in place": lambda model, x: model.covar_module.base_kernel.raw_lengthscale.detach().add_(0.5),
    "outputscale set": lambda model, x: model.covar_module.initialize(outputscale=0.7),
    "another kernel": lambda model, x: setattr(
        model.covar_module, "base_kernel", k.MaternKernel(1.5, ard_num_dims=D).double().initialize(lengthscale=0.4)
    ),
    "training inputs": lambda model, x: model.set_train_data(inputs(N, D, seed=9), model.train_targets),
    "training inputs in place": lambda model, x: (model.train_inputs[0].mul_(0.9), model.train(), model.eval()),
    "more training data": lambda model, x: model.set_train_data(
        inputs(N + 3, D, seed=9), targets(inputs(N + 3, D)), strict=False
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_of_points_follows_changes(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "FEW", 1)

    def read() -> list[Tensor]:
        model, x = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval(), points(num_shared=4)
        with torch.no_grad():
            model(x).lazy_covariance_matrix[..., -2:, :].to_dense()
            CHANGES[change](model, x)
        leaf, found = x.requires_grad_(), []
        for _ in range(2):
            values = rows_and_mean(model, leaf)
            found += [*values, torch.autograd.grad(values[0].square().sum() + values[1].square().sum(), leaf)[0]]
        return found

    both(read)


def rows_and_mean(model: GP, x: Tensor) -> list[Tensor]:
    prediction = model(x)
    return [prediction.mean, prediction.lazy_covariance_matrix[..., -2:, :].to_dense()]


def test_part_that_is_read_late_is_of_what_was_when_the_prediction_was_made(is_shared: bool) -> None:
    def read() -> list[Tensor]:
        model, x = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval(), points(num_shared=4)
        with torch.no_grad():
            covar = model(x).lazy_covariance_matrix
            part = covar[..., -2:, :]
            for tensor in (x, *model.train_inputs, *model.parameters()):
                tensor.add_(0.3)
            return [part.to_dense(), covar[..., 2:4, 1:].to_dense(), covar[..., 0:2].to_dense()]

    both(read)


def test_large_test_sets_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_covariance, "BLOCK_ELEMENTS", 6 * 2 * N)
    model = exact_gp(KERNELS["matern 5/2"](), inputs(N, D)).model.eval()
    for part in SOME:
        read = lambda model, x, _part=part: [PARTS[_part](model(x).lazy_covariance_matrix).to_dense()]  # noqa: E731
        both(with_gradients(read, model, points()), model)


def test_row_of_many_points_takes_no_matrix() -> None:
    model = exact_gp(KERNELS["rbf ard"](), inputs(50, D)).model.eval()
    with use_torch_tensors(), torch.no_grad():
        covar = model(inputs(100_000, D, seed=5)).lazy_covariance_matrix  # which would take 80 GB
        row, block = covar[7], covar[10:12, torch.tensor([3, 99_999])].to_dense()
        assert row.shape == (100_000,) and row.isfinite().all() and block.shape == (2, 2)


def test_outputs_of_a_model_are_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    done, between = [], Conditional._between
    monkeypatch.setattr(Conditional, "_between", lambda self, *args: done.append(args) or between(self, *args))
    x = inputs(N, D)
    model = SingleTaskGP(x, torch.stack([targets(x), targets(x, seed=2)], dim=-1)).eval()
    with use_torch_tensors(), torch.no_grad():
        covar = model.posterior(points((4,))).distribution.lazy_covariance_matrix.base_linear_op
        assert covar[..., -2:, :].to_dense().shape == (4, 2, 2, M) and len(done) == 1


@pytest.mark.parametrize("protocol", ["pickle", "deepcopy"])
def test_part_is_saved_as_a_dense_operator(protocol: str) -> None:
    model = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval()
    with use_torch_tensors(), torch.no_grad():
        part = model(points()).lazy_covariance_matrix[..., -2:, :]
        saved = pickle.loads(pickle.dumps(part)) if protocol == "pickle" else copy.deepcopy(part)
        assert type(saved).__module__.startswith("linear_operator") and torch.equal(saved.to_dense(), part.to_dense())


def test_model_that_remembers_points_is_copied_and_saved_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "FEW", 1)
    model = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval()
    with use_torch_tensors(), torch.no_grad():
        expected = model(points(num_shared=4)).lazy_covariance_matrix[..., -2:, :].to_dense()
        strategy = model.prediction_strategy
        assert "_shared_rows" in strategy.__dict__
        assert "_shared_rows" not in pickle.loads(pickle.dumps(strategy)).__dict__
        copied = copy.deepcopy(model)
        assert torch.equal(copied(points(num_shared=4)).lazy_covariance_matrix[..., -2:, :].to_dense(), expected)


def test_part_that_is_detached_leaves_the_covariance_alone() -> None:
    model, x = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval(), points().requires_grad_()
    with use_torch_tensors():
        covar = model(x).lazy_covariance_matrix
        part = covar[..., -2:, :].detach()
        assert not part.requires_grad and not part.to_dense().requires_grad
        with torch.no_grad():
            unseen = covar[..., :2, :]
            assert not unseen.to_dense().requires_grad and not covar[..., 2:3].to_dense().requires_grad
            assert not covar[..., 3:5, 3:5].diagonal().requires_grad
        for seen in (covar[..., -2:, :], covar[..., :2, :], covar[..., 2:3], covar[..., 3:5, 3:5]):
            assert seen.requires_grad and torch.autograd.grad(seen.to_dense().sum(), x, retain_graph=True)[0].any()


def test_part_taken_before_the_covariance_is_detached_in_place_keeps_its_gradient() -> None:
    model, x = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval(), points().requires_grad_()
    with use_torch_tensors():
        covar = model(x).lazy_covariance_matrix
        part = covar[..., -2:, :]
        covar.detach_()
        assert part.to_dense().requires_grad and not covar[..., -2:, :].to_dense().requires_grad


def test_part_in_inference_mode_matches_upstream(is_shared: bool) -> None:
    model = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval()

    def read() -> list[Tensor]:
        with torch.inference_mode():
            before = rows_and_mean(model, points(num_shared=4))
        model.prediction_strategy = None  # upstream's caches of inference mode are of no use outside
        found = with_gradients(rows_and_mean, model, points(num_shared=4))()
        return [*(part.clone() for part in before), *found]

    both(read, model)


@pytest.mark.parametrize(
    "index",
    [(..., 9, 0), (..., torch.tensor([9]), slice(None)), (2, 0, 0, 0), (..., slice(None, None, -1), slice(None))],
    ids=str,
)
def test_index_out_of_range_is_an_error_as_upstream(index: tuple) -> None:
    model = exact_gp(KERNELS["rbf ard"](), inputs(N, D)).model.eval()
    errors = []
    for flag in (False, True):
        with use_torch_tensors(flag), torch.no_grad(), pytest.raises((IndexError, ValueError, RuntimeError)) as raised:
            dense(model(points()).lazy_covariance_matrix[index])
        errors.append(raised.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize("interleaved", [False, True])
def test_several_outputs_in_one_distribution_match_upstream(interleaved: bool) -> None:
    shape = torch.Size([3])
    kernel = k.ScaleKernel(k.RBFKernel(batch_shape=shape), batch_shape=shape)
    likelihood = likelihoods.GaussianLikelihood(batch_shape=shape)
    x = inputs(N, D, shape)
    model = exact_gp(kernel, x, likelihood=likelihood, mean=means.ConstantMean(batch_shape=shape)).model.eval()

    def read(model: GP, x: Tensor) -> list[Tensor]:
        prediction = model(x.expand(3, M, D))
        if interleaved:
            joint = MultitaskMultivariateNormal.from_batch_mvn(prediction)
        else:
            parts = [MultivariateNormal(prediction.mean[i], prediction.lazy_covariance_matrix[i]) for i in range(3)]
            joint = MultitaskMultivariateNormal.from_independent_mvns(parts)
        normal = torch.randn(4, M, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return [joint.mean, joint.variance, joint.covariance_matrix, joint.rsample(base_samples=normal)]

    both(with_gradients(read, model, points(())), model)


def observations(num_outputs: int, n: int = 20) -> tuple[Tensor, Tensor]:
    x = inputs(n, D)
    return x, torch.stack([targets(x, seed) for seed in range(1, num_outputs + 1)], dim=-1)


def single(num_outputs: int) -> SingleTaskGP:
    return SingleTaskGP(*observations(num_outputs), input_transform=Normalize(D))


def list_of(num_outputs: int) -> ModelListGP:
    x, y = observations(num_outputs)
    return ModelListGP(*[SingleTaskGP(x, y[:, i : i + 1]) for i in range(num_outputs)])


def of_tasks(num_outputs: int) -> MultiTaskGP:
    x, y = observations(1)
    torch.manual_seed(0)  # the covariance of the tasks begins at random
    task = torch.arange(len(x)).remainder(2).unsqueeze(-1)
    return MultiTaskGP(torch.cat([x, task.to(x)], dim=-1), y, task_feature=-1, output_tasks=[0])


def sampler() -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(torch.Size([8]), seed=0)


def q_log_nei(model: SingleTaskGP, x: Tensor, **kwargs) -> Callable[[Tensor], Tensor]:
    return qLogNoisyExpectedImprovement(model, x, sampler=sampler(), prune_baseline=False, **kwargs)


def q_log_nehvi(model: SingleTaskGP, x: Tensor) -> Callable[[Tensor], Tensor]:
    return qLogNoisyExpectedHypervolumeImprovement(model, [-1.0, -1.0], x, sampler=sampler())


def q_mes(model: SingleTaskGP, x: Tensor) -> Callable[[Tensor], Tensor]:
    return qMaxValueEntropy(model, x, num_mv_samples=4, num_fantasies=2)


ACQUISITIONS: dict[str, tuple[Callable, Callable, int, int]] = {
    "qLogNEI": (q_log_nei, single, 1, 2),
    "qLogNEI with no root": (lambda model, x: q_log_nei(model, x, cache_root=False), single, 1, 2),
    "qLogNEI of a list": (q_log_nei, list_of, 1, 2),
    "qLogNEI of tasks": (q_log_nei, of_tasks, 1, 2),
    "qLogNEHVI": (q_log_nehvi, single, 2, 2),
    "qLogNEHVI of a list": (q_log_nehvi, list_of, 2, 1),
    "qKG": (lambda model, x: qKnowledgeGradient(model, num_fantasies=4), single, 1, 5),
    "qMES": (q_mes, single, 1, 1),
}


@pytest.mark.filterwarnings("ignore")  # BoTorch's advice
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_acquisition_function_matches_upstream(name: str, is_shared: bool) -> None:
    make, model_of, num_outputs, q = ACQUISITIONS[name]

    def read() -> list[Tensor]:
        model = model_of(num_outputs).eval()
        acquisition = make(model, inputs(12, D, seed=3))
        found = []
        for _ in range(2):
            x = inputs(q, D, (3,), seed=5).requires_grad_()
            value = acquisition(x)
            found += [value, torch.autograd.grad(value.sum(), x)[0]]
        return found

    both(read)
