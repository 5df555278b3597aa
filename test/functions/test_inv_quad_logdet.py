"""`TensorInvQuadLogdet` against `linear_operator`, against itself, and against bad input."""

from __future__ import annotations

import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch
from both_ways import assert_near, generator
from linear_operator import settings
from linear_operator.operators import DenseLinearOperator
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gpytorch.functions import TensorInvQuadLogdet
from gpytorch.functions.cholesky_inverse import cholesky_inverse_

MODULE = sys.modules[TensorInvQuadLogdet.__module__]  # its name in the package is the function's


def operands(matrix: tuple[int, ...], rhs: tuple[int, ...], n: int, columns: int = 1) -> tuple[Tensor, Tensor]:
    """Well-conditioned matrices and right-hand sides of these batch shapes, as leaves."""
    rng = generator()
    root = torch.randn(*matrix, n, n, generator=rng, dtype=torch.float64)
    spd = root @ root.mT / n + torch.eye(n, dtype=torch.float64)
    return spd.requires_grad_(), torch.randn(*rhs, n, columns, generator=rng, dtype=torch.float64).requires_grad_()


def of_linear_operator(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    batch_shape = torch.broadcast_shapes(matrix.shape[:-2], rhs.shape[:-2])
    operator = DenseLinearOperator(matrix.expand(*batch_shape, *matrix.shape[-2:]))
    with settings.max_cholesky_size(10_000):
        return operator.inv_quad_logdet(rhs.expand(*batch_shape, *rhs.shape[-2:]), logdet=True)


def weighted(inv_quad: Tensor, logdet: Tensor) -> Tensor:
    """A scalar in which no two results have the same cotangent."""
    weights = torch.linspace(0.5, 2.0, inv_quad.numel(), dtype=inv_quad.dtype).view(inv_quad.shape)
    return (weights * inv_quad + weights.square() * logdet).sum()


BATCHES = [
    ((), ()),
    ((3,), (3,)),
    ((2, 3), (2, 3)),
    ((), (1,)),
    ((), (1, 1)),
    ((), (4,)),
    ((), (2, 4)),
    ((3,), ()),
    ((3,), (1,)),
    ((1,), (3,)),
    ((3,), (2, 3)),
    ((2, 1), (1, 3)),
    ((2, 1), (4, 2, 3)),
    ((1, 3, 1), (5, 1, 3, 2)),
]


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(("matrix_batch", "rhs_batch"), BATCHES)
def test_matches_linear_operator_on_batches(
    matrix_batch: tuple[int, ...], rhs_batch: tuple[int, ...], n: int, columns: int
) -> None:
    matrix, rhs = operands(matrix_batch, rhs_batch, n, columns)
    expected = of_linear_operator(matrix, rhs)
    actual = TensorInvQuadLogdet.apply(matrix, rhs)
    for name, ours, theirs in zip(("inv_quad", "logdet"), actual, expected, strict=True):
        assert_near(ours, theirs, name, 1e-11)
    expected_grads = torch.autograd.grad(weighted(*expected), (matrix, rhs))
    for name, ours, theirs in zip(
        ("matrix", "rhs"), torch.autograd.grad(weighted(*actual), (matrix, rhs)), expected_grads, strict=True
    ):
        assert_near(ours, theirs, name, 1e-11)


@pytest.mark.parametrize(("matrix_batch", "rhs_batch"), [((0,), (0,)), ((), (0,)), ((2, 0), (0,)), ((0,), ())])
@pytest.mark.parametrize("n", [1, 4])
def test_empty_batch_has_empty_results_and_gradients_of_zero(
    matrix_batch: tuple[int, ...], rhs_batch: tuple[int, ...], n: int
) -> None:
    matrix, rhs = operands(matrix_batch, rhs_batch, n)
    inv_quad, logdet = TensorInvQuadLogdet.apply(matrix, rhs)
    assert inv_quad.shape == logdet.shape == torch.broadcast_shapes(matrix_batch, rhs_batch)
    (inv_quad + logdet).sum().backward()
    for operand in (matrix, rhs):
        assert torch.equal(operand.grad, torch.zeros_like(operand))


@pytest.mark.parametrize("n", [767, 768, 1025])
def test_matches_linear_operator_where_the_inverse_is_put_together_from_blocks(n: int) -> None:
    matrix, rhs = operands((), (), n)
    expected = torch.autograd.grad(weighted(*of_linear_operator(matrix, rhs)), (matrix, rhs))
    actual = torch.autograd.grad(weighted(*TensorInvQuadLogdet.apply(matrix, rhs)), (matrix, rhs))
    for name, ours, theirs in zip(("matrix", "rhs"), actual, expected, strict=True):
        assert_near(ours, theirs, name, 1e-10)


@pytest.mark.parametrize(("matrix_batch", "rhs_batch"), [((), ()), ((2,), (2,)), ((), (3,)), ((2, 1), (3,))])
@pytest.mark.parametrize("n", [1, 3])
def test_first_and_second_derivatives_match_finite_differences(
    matrix_batch: tuple[int, ...], rhs_batch: tuple[int, ...], n: int
) -> None:
    root = torch.randn(*matrix_batch, n, n, generator=generator(), dtype=torch.float64, requires_grad=True)
    _, rhs = operands((), rhs_batch, n)

    def results(root: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        return TensorInvQuadLogdet.apply(root @ root.mT + torch.eye(n, dtype=root.dtype), rhs)

    assert gradcheck(results, (root, rhs))
    assert gradgradcheck(results, (root, rhs))
    # One result alone leaves the other without a cotangent.
    for i in range(2):
        assert gradgradcheck(lambda root, rhs, i=i: results(root, rhs)[i], (root, rhs))


@pytest.mark.parametrize(("matrix_batch", "rhs_batch"), [((), ()), ((2,), (3, 2))])
def test_second_derivatives_in_the_matrix_itself_match_linear_operator(
    matrix_batch: tuple[int, ...], rhs_batch: tuple[int, ...]
) -> None:
    matrix, rhs = operands(matrix_batch, rhs_batch, 4)
    seconds = []
    for function in (TensorInvQuadLogdet.apply, of_linear_operator):
        grads = torch.autograd.grad(weighted(*function(matrix, rhs)), (matrix, rhs), create_graph=True)
        # Weights that are not symmetric: the result is, as that of torch's own Cholesky is.
        total = sum((torch.linspace(0, 1, grad.numel()).view(grad.shape) * grad).sum() for grad in grads)
        seconds.append(torch.autograd.grad(total, (matrix, rhs)))
    for ours, theirs in zip(*seconds, strict=True):
        assert_near(ours, theirs, rtol=1e-10)


def test_third_derivative_matches_linear_operator() -> None:
    def third(function) -> Tensor:
        scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        matrix, rhs = (operand.detach() for operand in operands((), (), 4))
        derivative = weighted(*function(matrix * scale + torch.eye(4) * scale**2, rhs * scale))
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative, scale, create_graph=True)
        return derivative

    assert_near(third(TensorInvQuadLogdet.apply), third(of_linear_operator), rtol=1e-10)


def test_one_factorization_serves_many_right_hand_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    factorize = MagicMock(wraps=torch.linalg.cholesky_ex)
    invert = MagicMock(wraps=cholesky_inverse_)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factorize)
    monkeypatch.setattr(MODULE, "cholesky_inverse_", invert)
    matrix, rhs = operands((), (40, 5), 6)
    weighted(*TensorInvQuadLogdet.apply(matrix, rhs)).backward()
    assert [call.args[0].shape for call in factorize.call_args_list] == [(6, 6)]
    assert [call.args[0].shape for call in invert.call_args_list] == [(6, 6)]


@pytest.mark.parametrize("wants", ["matrix", "rhs", "both"])
def test_backward_computes_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, wants: str) -> None:
    invert = MagicMock(wraps=cholesky_inverse_)
    monkeypatch.setattr(MODULE, "cholesky_inverse_", invert)
    matrix, rhs = operands((), (), 5)
    expected = torch.autograd.grad(weighted(*of_linear_operator(matrix, rhs)), (matrix, rhs))
    matrix.requires_grad_(wants != "rhs")
    rhs.requires_grad_(wants != "matrix")
    weighted(*TensorInvQuadLogdet.apply(matrix, rhs)).backward()
    assert invert.called == (wants != "rhs")
    for operand, grad in zip((matrix, rhs), expected, strict=True):
        assert (operand.grad is not None) == operand.requires_grad
        if operand.requires_grad:
            assert_near(operand.grad, grad, rtol=1e-11)


def test_inverse_quadratic_form_alone_needs_no_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    invert = MagicMock(wraps=cholesky_inverse_)
    monkeypatch.setattr(MODULE, "cholesky_inverse_", invert)
    matrix, rhs = operands((), (), 5)
    TensorInvQuadLogdet.apply(matrix, rhs)[0].backward()
    assert not invert.called


@pytest.mark.parametrize("n", [5, 1100])
def test_second_backward_gives_the_same_numbers(n: int) -> None:
    matrix, rhs = operands((), (), n)
    result = weighted(*TensorInvQuadLogdet.apply(matrix, rhs))
    before = matrix.detach().clone(), rhs.detach().clone()
    grads = [torch.autograd.grad(result, (matrix, rhs), retain_graph=keep) for keep in (True, True, False)]
    for later in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], later, strict=True))
    assert torch.equal(matrix, before[0])
    assert torch.equal(rhs, before[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result, (matrix, rhs))


def test_results_of_a_step_may_be_changed_in_place() -> None:
    matrix, rhs = operands((), (), 5)
    inv_quad, logdet = TensorInvQuadLogdet.apply(matrix, rhs)
    expected = torch.autograd.grad(inv_quad + logdet, (matrix, rhs), retain_graph=True)
    total = inv_quad.mul_(2).add_(logdet)
    actual = torch.autograd.grad(total, rhs)
    assert_near(actual[0], 2 * expected[1], rtol=1e-12)


@pytest.mark.parametrize("entry", [0.0, -1.0, 4.0])
def test_one_by_one_matrix_is_treated_as_by_linear_operator(entry: float) -> None:
    matrix, rhs = torch.tensor([[entry]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
    for ours, theirs in zip(TensorInvQuadLogdet.apply(matrix, rhs), of_linear_operator(matrix, rhs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("n", [10, 100])
def test_float32_is_no_further_from_float64_than_linear_operator(n: int) -> None:
    matrix, rhs = operands((), (), n)
    matrix = (matrix.detach() - (1 - 1e-3) * torch.eye(n)).float()  # a condition number of some thousands

    def grads(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [operand.detach().to(dtype).requires_grad_() for operand in (matrix, rhs.float())]
        results = function(*leaves)
        return [result.detach() for result in (*results, *torch.autograd.grad(weighted(*results), leaves))]

    reference = grads(of_linear_operator, torch.float64)
    for ours, theirs, exact in zip(
        grads(TensorInvQuadLogdet.apply, torch.float32),
        grads(of_linear_operator, torch.float32),
        reference,
        strict=True,
    ):
        assert ours.dtype == torch.float32
        error, upstream_error = (((each.double() - exact).norm() / exact.norm()).item() for each in (ours, theirs))
        assert error <= 1.5 * upstream_error + 1e-6


MISMATCHES = {
    "dtype": (lambda: (torch.eye(3), torch.ones(3, 1, dtype=torch.float64)), ["torch.float32", "torch.float64"]),
    "device": (lambda: (torch.eye(3), torch.ones(3, 1, device="meta")), ["cpu", "meta"]),
    "rows": (lambda: (torch.eye(3), torch.ones(4, 1)), [r"\[3, 3\]", r"\[4, 1\]"]),
    "vector": (lambda: (torch.eye(3), torch.ones(3)), [r"\[3, 3\]", r"\[3\]"]),
    "not square": (lambda: (torch.ones(3, 2), torch.ones(3, 1)), [r"\[3, 2\]"]),
    "not a matrix": (lambda: (torch.ones(3), torch.ones(3, 1)), [r"\[3\]"]),
    "batches": (
        lambda: (torch.eye(3).expand(2, 3, 3), torch.ones(5, 3, 1)),
        ["2", "5"] if torch.__version__ >= (2, 5) else ["broadcast to a single shape"],  # torch's own words
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_is_an_error_that_names_both(case: str) -> None:
    make, named = MISMATCHES[case]
    for text in named:
        with pytest.raises(RuntimeError, match=text):
            TensorInvQuadLogdet.apply(*make())


def indefinite(smallest: float, batch: tuple[int, ...] = ()) -> Tensor:
    """Matrices whose smallest eigenvalue is known; only the last of a batch has it."""
    root = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    basis = torch.linalg.qr(root).Q
    values = torch.tensor([3.0, 2.0, 1.0, smallest], dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.mT
    if not batch:
        return matrix
    matrices = torch.eye(4, dtype=torch.float64).repeat(*batch, 1, 1)
    matrices.view(-1, 4, 4)[-1] = matrix
    return matrices


def outcome(function, matrix: Tensor, rhs: Tensor) -> tuple:
    """Results, or the error's type and text; and the texts of the warnings on the way."""
    matrix = matrix.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = function(matrix, rhs)
            results = [*results, *torch.autograd.grad(weighted(*results), matrix)]
        except Exception as error:
            results = (type(error), str(error))
    return results, [(warning.category, str(warning.message)) for warning in caught]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("tries", [1, 2, 3, 4])
@pytest.mark.parametrize("smallest", [0.5, -0.005, -0.05, -0.5])
def test_jitter_its_warnings_and_its_limit_are_those_of_linear_operator(
    smallest: float, tries: int, batch: tuple[int, ...]
) -> None:
    rhs = torch.ones(*batch, 4, 1, dtype=torch.float64)
    with (
        settings.cholesky_jitter(double_value=0.01),
        settings.cholesky_max_tries(tries),
    ):
        expected, expected_warnings = outcome(of_linear_operator, indefinite(smallest, batch), rhs)
        actual, actual_warnings = outcome(TensorInvQuadLogdet.apply, indefinite(smallest, batch), rhs)
    needed = {0.5: 0, -0.005: 1, -0.05: 2, -0.5: 3}[smallest]
    assert actual_warnings == expected_warnings
    assert [category for category, _ in actual_warnings] == [NumericalWarning] * min(needed, tries)
    if tries < needed:
        assert actual == expected
        assert actual[0] is NotPSDError
    else:
        for ours, theirs in zip(actual, expected, strict=True):
            assert_near(ours.detach(), theirs.detach(), rtol=1e-10)


def test_jitter_leaves_the_callers_matrix_as_it_was() -> None:
    matrix = indefinite(-1e-10)
    before = matrix.clone()
    with pytest.warns(NumericalWarning):
        TensorInvQuadLogdet.apply(matrix, torch.ones(4, 1, dtype=torch.float64))
    assert torch.equal(matrix, before)


def test_nan_in_the_matrix_is_the_error_of_linear_operator() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2, 1] = float("nan")
    rhs = torch.ones(4, 1, dtype=torch.float64)
    actual, expected = outcome(TensorInvQuadLogdet.apply, matrix, rhs), outcome(of_linear_operator, matrix, rhs)
    assert actual == expected
    assert actual[0][0] is NanError


def test_nan_in_the_right_hand_side_reaches_the_quadratic_form_only() -> None:
    matrix, rhs = operands((), (), 4)
    rhs = rhs.detach()
    rhs[1] = float("nan")
    inv_quad, logdet = TensorInvQuadLogdet.apply(matrix, rhs)
    assert inv_quad.isnan()
    assert_near(logdet, of_linear_operator(matrix, rhs)[1])


def test_trace_mode_adds_no_jitter() -> None:
    with settings.trace_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        inv_quad, _ = TensorInvQuadLogdet.apply(indefinite(-0.5), torch.ones(4, 1, dtype=torch.float64))
    assert inv_quad.shape == ()


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    matrix, rhs = operands((), (3,), 4)
    expected = TensorInvQuadLogdet.apply(matrix, rhs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = TensorInvQuadLogdet.apply(matrix, rhs)
        assert not any(result.requires_grad for result in actual)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_matches_cpu(dtype: torch.dtype) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        leaves = [operand.detach().to(device, dtype).requires_grad_() for operand in operands((3,), (2, 3), 50)]
        value = weighted(*(result.cpu() for result in TensorInvQuadLogdet.apply(*leaves)))
        results[device] = [value, *(grad.cpu() for grad in torch.autograd.grad(value, leaves))]
    for cpu, cuda in zip(results["cpu"], results["cuda"], strict=True):
        assert_near(cuda.detach(), cpu.detach(), rtol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("n", [2, 64, 65, 256, 257])
def test_inverse_is_the_inverse_whichever_way_it_is_taken(n: int, batch: tuple[int, ...], threads: int) -> None:
    root = torch.randn(*batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tril()
    root.diagonal(dim1=-2, dim2=-1).abs_().add_(n**0.5)
    expected = torch.cholesky_inverse(root)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for factor in (root.clone(), root.mT.contiguous().mT):  # LAPACK's memory order is the second
            assert_near(cholesky_inverse_(factor), expected, rtol=1e-12)
    finally:
        torch.set_num_threads(before)
