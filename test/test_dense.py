"""When a covariance is factorized as a tensor: the predicate, its reasons and its counter."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from both_ways import GP, assert_near, generator, inputs, routes, targets
from linear_operator import operators as ops
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpytorch import dense, kernels, settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import use_torch_tensors

N = 6


def spd(n: int = N, seed: int = 0) -> Tensor:
    root = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return root @ root.mT + n * torch.eye(n, dtype=torch.float64)


def vector(n: int = N, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64) + 1.0


def matrix(seed: int = 0) -> ops.DenseLinearOperator:
    return ops.DenseLinearOperator(spd(seed=seed))


def diagonal() -> ops.DiagLinearOperator:
    return ops.DiagLinearOperator(vector())


def kronecker() -> ops.KroneckerProductLinearOperator:
    return ops.KroneckerProductLinearOperator(ops.DenseLinearOperator(spd(2)), ops.DenseLinearOperator(spd(3)))


def low_rank() -> ops.LowRankRootLinearOperator:
    return ops.LowRankRootLinearOperator(torch.randn(N, 2, generator=generator(), dtype=torch.float64))


def toeplitz() -> ops.ToeplitzLinearOperator:
    return ops.ToeplitzLinearOperator(torch.tensor([4.0, 1.0, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64))


def block() -> ops.BlockDiagLinearOperator:
    return ops.BlockDiagLinearOperator(ops.DenseLinearOperator(torch.stack([spd(3), spd(3, seed=1)])))


def scaled(covar: LinearOperator) -> LinearOperator:
    return ops.ConstantMulLinearOperator(covar, torch.tensor(1.5, dtype=torch.float64))


def constant_diagonal() -> ops.ConstantDiagLinearOperator:
    return ops.ConstantDiagLinearOperator(torch.tensor([0.5], dtype=torch.float64), N)


def never_held() -> ops.KernelLinearOperator:
    x = inputs(N)
    return ops.KernelLinearOperator(x, x, covar_func=lambda x1, x2: x1 @ x2.mT)


class OfAUser(ops.DenseLinearOperator):
    """May override anything."""


DENSE: dict[str, Callable[[], LinearOperator]] = {
    "dense": matrix,
    "sum": lambda: ops.SumLinearOperator(matrix(), matrix(1)),
    "sum of sums": lambda: matrix() + matrix(1) + scaled(matrix(2)),
    "product": lambda: matrix() * matrix(1),
    "scaled": lambda: scaled(matrix()),
    "scaled sum": lambda: scaled(ops.SumLinearOperator(matrix(), matrix(1))),
    "with a diagonal": lambda: ops.AddedDiagLinearOperator(matrix(), diagonal()),
    "with a constant diagonal": lambda: ops.AddedDiagLinearOperator(matrix(), constant_diagonal()),
    "with two diagonals": lambda: matrix().add_diagonal(vector()).add_diagonal(vector(seed=1)),
    "scaled with jitter": lambda: scaled(matrix()).add_jitter(0.1),
    # Of several matrices upstream makes a dense one, whatever they are.
    "dense and low rank": lambda: ops.SumLinearOperator(matrix(), low_rank()),
    "dense and kronecker and diagonal": lambda: (matrix() + kronecker()).add_diagonal(vector()),
    "low rank and dense, scaled": lambda: scaled(low_rank() + matrix()),
    "product with low rank": lambda: ops.MulLinearOperator(matrix(), low_rank()).add_diagonal(vector()),
    "low ranks and diagonal": lambda: ops.SumLinearOperator(low_rank(), low_rank()).add_diagonal(vector()),
    "dense and toeplitz": lambda: matrix() + toeplitz(),
    "product of toeplitz matrices": lambda: toeplitz() * toeplitz(),
    "kronecker diagonal": lambda: (
        matrix()
        + ops.KroneckerProductDiagLinearOperator(ops.DiagLinearOperator(vector(2)), ops.DiagLinearOperator(vector(3)))
    ),
}

STRUCTURED: dict[str, Callable[[], LinearOperator]] = {
    "diagonal": diagonal,
    "constant diagonal": constant_diagonal,
    "identity": lambda: ops.IdentityLinearOperator(N, dtype=torch.float64),
    "kronecker": kronecker,
    "low rank and diagonal": lambda: low_rank().add_diagonal(vector()),
    "root and diagonal": lambda: ops.RootLinearOperator(low_rank().root).add_diagonal(vector()),
    "toeplitz and diagonal": lambda: toeplitz().add_diagonal(vector()),
    "toeplitz": toeplitz,
    "block diagonal": block,
    "interleaved blocks": lambda: ops.BlockInterleavedLinearOperator(block().base_linear_op),
    "factored": lambda: ops.CholLinearOperator(ops.TriangularLinearOperator(torch.linalg.cholesky(spd()))),
    "kronecker and diagonal": lambda: kronecker().add_diagonal(vector()),
    "kronecker and constant diagonal": lambda: kronecker().add_diagonal(torch.ones(1, dtype=torch.float64)),
    "sum of kroneckers": lambda: kronecker() + kronecker(),
    "sum of batch": lambda: ops.SumBatchLinearOperator(block().base_linear_op).add_diagonal(vector(3)),
    "interpolated": lambda: ops.InterpolatedLinearOperator(matrix()).add_diagonal(vector()),
    "scaled diagonal": lambda: scaled(diagonal()),
    "scaled kronecker": lambda: scaled(kronecker()),
    "scaled toeplitz and diagonal": lambda: scaled(toeplitz()).add_diagonal(vector()),
    "repeated kronecker": lambda: ops.BatchRepeatLinearOperator(kronecker(), torch.Size([2])),
    "repeated dense": lambda: ops.BatchRepeatLinearOperator(matrix(), torch.Size([2])),
    "dense and never held": lambda: (matrix() + never_held()).add_diagonal(vector()),
    "masked": lambda: ops.MaskedLinearOperator(matrix(), *[torch.arange(N) != 2] * 2),
    "masked diagonal": lambda: ops.MaskedLinearOperator(diagonal(), *[torch.arange(N) != 2] * 2),
    "joined batches": lambda: ops.CatLinearOperator(matrix().unsqueeze(0), matrix(1).unsqueeze(0), dim=0),
    "a user's own": lambda: OfAUser(spd()),
}


def log_prob(covar: LinearOperator, flag: bool) -> Tensor:
    value = torch.linspace(-1, 1, covar.size(-1), dtype=torch.float64)
    torch.manual_seed(0)
    with use_torch_tensors(flag):
        return MultivariateNormal(torch.zeros(covar.size(-1), dtype=torch.float64), covar).log_prob(value)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", DENSE)
def test_what_upstream_would_densify_becomes_a_tensor(case: str, fast: bool) -> None:
    with settings.fast_computations(log_prob=fast):
        expected = log_prob(DENSE[case](), flag=False)
        with routes(tensors=1):
            actual = log_prob(DENSE[case](), flag=True)
    assert_near(actual, expected, rtol=1e-12)


def outcome(covar: LinearOperator, flag: bool) -> Tensor | str:
    try:
        return log_prob(covar, flag)
    except Exception as error:  # linear_operator can neither repeat nor join factors
        return repr(error)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", STRUCTURED)
def test_structured_covariance_stays_upstream(case: str, fast: bool) -> None:
    with settings.fast_computations(log_prob=fast):
        expected = outcome(STRUCTURED[case](), flag=False)
        with routes(upstream=1):
            actual = outcome(STRUCTURED[case](), flag=True)
    assert torch.equal(actual, expected) if isinstance(expected, Tensor) else not fast and actual == expected


@pytest.mark.parametrize("case", STRUCTURED)
def test_structure_is_found_without_densifying_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    covar = STRUCTURED[case]()

    def fail(self: LinearOperator) -> Tensor:
        raise AssertionError(f"{type(self).__name__} was densified")

    for operator in vars(ops).values():
        if isinstance(operator, type) and issubclass(operator, LinearOperator):
            monkeypatch.setattr(operator, "to_dense", fail)
    with use_torch_tensors():
        assert dense.decide(covar) is None


def test_every_operator_that_upstream_treats_in_a_way_of_its_own_is_structured() -> None:
    """A plain tensor replaces only what inherits its factorization from LinearOperator itself."""
    for case, make in DENSE.items():
        kind = type(make())
        for method in ("inv_quad_logdet", "_cholesky", "cholesky", "logdet", "inv_quad"):
            assert getattr(kind, method) is getattr(LinearOperator, method), (case, method)


@pytest.mark.parametrize("factor", ["cholesky", "root_decomposition", "svd", "diagonalization"])
def test_cached_factor_is_used_again(factor: str) -> None:
    covar = matrix()
    with routes(tensors=1):
        expected = log_prob(covar, flag=True)
    getattr(covar, factor)()
    with routes(upstream=1):
        actual = log_prob(covar, flag=True)
    assert_near(actual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "limit", "fast", "route"),
    [
        (800, None, True, "tensors"),
        (801, None, True, "upstream"),
        (801, 801, True, "tensors"),
        (801, None, False, "tensors"),
        (11, 10, True, "upstream"),
        (10, 10, True, "tensors"),
        (11, 10, False, "tensors"),
    ],
)
def test_size_at_which_upstream_leaves_cholesky_is_kept(n: int, limit: int | None, fast: bool, route: str) -> None:
    covar = kernels.RBFKernel().double()(inputs(n)).add_jitter(0.1)
    limit = settings.max_cholesky_size.value() if limit is None else limit
    with (
        settings.max_cholesky_size(limit),
        settings.fast_computations(log_prob=fast),
        use_torch_tensors(),
        routes(**{route: 1}),
    ):
        taken = dense.decide(covar) is not None
    assert taken == (route == "tensors")


def test_flag_off_decides_nothing() -> None:
    with routes(), use_torch_tensors(False):
        assert dense.decide(matrix()) is None


REASONS = {
    "closed form": (lambda: kernels.RBFKernel().double()(inputs(5)), "tensors", "closed-form"),
    "dense": (matrix, "tensors", "DenseLinearOperator"),
    "structure": (kronecker, "upstream", "KroneckerProductLinearOperator has structure"),
    "structure inside": (lambda: scaled(toeplitz()).add_diagonal(vector()), "upstream", "Toeplitz"),
    "structure in a sum": (lambda: matrix() + scaled(low_rank()), "tensors", "SumLinearOperator"),
    "never held": (lambda: matrix() + never_held(), "upstream", "has structure"),
    "size": (lambda: ops.DenseLinearOperator(torch.eye(801)), "upstream", "max_cholesky_size"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reason_is_logged_at_debug(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, route, reason = REASONS[case]
    with caplog.at_level(logging.DEBUG, logger="gpytorch.dense"), use_torch_tensors():
        dense.decide(make())
    (record,) = caplog.records
    assert record.name == "gpytorch.dense"
    assert record.levelno == logging.DEBUG
    assert record.getMessage().startswith(f"{route}: ")
    assert reason in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gpytorch.dense"), use_torch_tensors():
        dense.decide(make())
    assert not caplog.records


def test_training_step_counts_one_decision() -> None:
    x = inputs(8)
    likelihood = GaussianLikelihood().double()
    model = GP(x, targets(x), kernels.ScaleKernel(kernels.RBFKernel()), likelihood).double()
    mll = ExactMarginalLogLikelihood(likelihood, model)
    with use_torch_tensors(), routes(tensors=1):
        mll(model(x), model.train_targets)
    with use_torch_tensors(False), routes():
        mll(model(x), model.train_targets)


def test_whoever_looks_at_the_covariance_still_finds_an_operator() -> None:
    x = inputs(8)
    likelihood = GaussianLikelihood().double()
    model = GP(x, targets(x), kernels.ScaleKernel(kernels.RBFKernel()), likelihood).double()
    with use_torch_tensors():
        output = model(x)
        marginal = likelihood(output)
        ExactMarginalLogLikelihood(likelihood, model)(output, model.train_targets)
    assert isinstance(output.lazy_covariance_matrix, LinearOperator)
    assert isinstance(marginal.lazy_covariance_matrix, LinearOperator)
    assert_near(
        marginal.covariance_matrix.detach(),
        (output.covariance_matrix + likelihood.noise * torch.eye(8)).detach(),
        rtol=1e-14,
    )
