"""A kernel's covariance matrix as an expression, before it is evaluated: for losses, predictions and fantasies."""

from __future__ import annotations

import torch
from linear_operator.operators import AddedDiagLinearOperator, LinearOperator
from torch import Tensor

from .. import beta_features
from .._internals import memoized_names
from .._transforms import is_transformed
from ..constraints.unconstrained import Unconstrained
from ..functions import kernel_log_prob
from ..functions.kernel_covariance import KernelCovariance, no_leaves, plain_block
from ..kernels.kernel import Kernel
from ..lazy import LazyEvaluatedKernelTensor
from ..likelihoods.noise import diagonal_of
from .given import Given
from .kernels import Terms, is_dense_in_parts, write_kernel
from .matrix import Expression, KernelMatrix, diagonal, evaluate, of_rows
from .parameters import Parameter

#: The reasons for the tensor path where the kernel is written as an expression.
CLOSED_FORM = "the kernel has a closed-form gradient"
PARTS = "parts of the kernel have a closed-form gradient, and upstream would factorize the whole as a dense matrix"


class ClosedForm:
    """A covariance matrix as an expression, before it is evaluated, of parts with closed-form gradients and of tensors.

    :param terms: The expression, and the tensors that it is made of.
    :param reason: Why the matrix is a tensor.
    :ivar noises: What is added to its diagonal (each ... x N or ... x 1).
    """

    __slots__ = ("noises", "reason", "terms")

    def __init__(self, terms: Terms, reason: str = CLOSED_FORM) -> None:
        self.terms, self.reason = terms, reason
        self.noises: tuple[Parameter, ...] = ()

    def add_noise(self, noise: Unconstrained) -> ClosedForm:
        """Add noise to the diagonal, and return the matrix.

        :param noise: The noise (... x N or ... x 1), before its constraint is applied or after.
        """
        self.noises = (*self.noises, self.terms.add_parameter(noise, 1))
        return self

    def log_prob(self, residual: Tensor, per: int = 1) -> Tensor:
        """Return the log density of a Gaussian with this covariance matrix.

        :param residual: The value less the mean (... x N).
        :param per: What the log density is divided by.
        """
        terms = self.terms
        shape, is_uniform = terms.batch_shape, len(terms.batch_shapes) == 1
        return kernel_log_prob.log_prob(terms.expression, self.noises, terms.values, residual, shape, is_uniform, per)

    def factorize(self) -> Tensor:
        """Return the Cholesky factor (... x N x N), without a gradient."""
        with torch.no_grad():
            return kernel_log_prob.factorize(self.terms.expression, self.noises, self.terms.values)

    def to_dense(self, rows: slice | None = None) -> Tensor:
        """Return the matrix (... x N x M), or some of its rows, as a tensor with a gradient.

        :param rows: The rows, where the matrix has no noise.
        """
        values = list(self.terms.values)
        if rows is not None:
            for slot in self.terms.row_slots:
                values[slot] = values[slot][..., rows, :]
        return kernel_log_prob.with_noise(_evaluate(self.terms.expression, values), self.noises, values)

    def at_rows(self, rows: Tensor) -> ClosedForm:
        """Return some of the rows of a matrix that has no noise.

        :param rows: Their numbers.
        """
        return ClosedForm(self.terms.at_rows(rows))

    @property
    def batch_shape(self) -> torch.Size:
        """The matrix's batch shape."""
        return self.terms.batch_shape

    @property
    def shape(self) -> torch.Size:
        """The matrix's shape (... x N x M)."""
        return torch.Size((*self.batch_shape, *self.terms.matrix_shape))


class ClosedFormPrior:
    """The prior covariance matrix of test points, K(test, test), before it is evaluated.

    :param cross: K(test, train), whose rows are the same points and whose expression it shares.
    """

    __slots__ = ("cross",)

    def __init__(self, cross: ClosedForm) -> None:
        self.cross = cross

    def to_dense(self) -> Tensor:
        """Return the matrix (... x N x N) as a tensor with a gradient."""
        if self.cross.terms.matrix_shape[0] == 1:
            return self.diagonal().unsqueeze(-1)
        return self.block(None, None)

    def block(self, rows: slice | None, cols: slice | None) -> Tensor:
        """Return a block of the matrix as a tensor with a gradient.

        :param rows: The block's rows, from one number to another.
        :param cols: The block's columns.
        """
        terms = self.cross.terms
        return _evaluate(of_rows(terms.expression), terms.values, rows, cols)

    def diagonal(self) -> Tensor:
        """Return its diagonal (... x N or ... x 1)."""
        terms = self.cross.terms
        return diagonal(terms.expression, terms.values)

    def at(self, rows: Tensor) -> ClosedFormPrior:
        """Return the covariance matrix of some of the rows.

        :param rows: Their numbers.
        """
        return ClosedFormPrior(self.cross.at_rows(rows))


def _evaluate(
    expression: Expression, values: list[Tensor], rows: slice | None = None, cols: slice | None = None
) -> Tensor:
    if is_transformed() or (len(expression) == 1 and type(expression[0]) is Given):
        return plain_block(expression, values, rows, cols)
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return KernelCovariance.apply(expression, rows, cols, *no_leaves(values))
    return evaluate(KernelMatrix(expression, values), rows, cols)


def closed_form(covar: LinearOperator) -> ClosedForm | None:
    """Return the closed form of a covariance matrix that has not been evaluated yet, if it has one.

    :param covar: The covariance matrix.
    """
    covar, noise = without_noise(covar)
    form = unevaluated_form(covar, evaluates=False)
    return form if form is None or noise is None else form.add_noise((noise, False, None))


def without_noise(covar: LinearOperator) -> tuple[LinearOperator, Tensor | None]:
    """Return a covariance matrix without what is added to its diagonal, and that (... x N or ... x 1), if anything is.

    :param covar: The covariance matrix.
    """
    if type(covar) is not AddedDiagLinearOperator:
        return covar, None
    noise = diagonal_of(covar._diag_tensor)
    return covar._linear_op, covar._diag_tensor.diagonal() if noise is None else noise


def unevaluated_form(covar: LinearOperator, evaluates: bool) -> ClosedForm | None:
    """Return the closed form of a covariance matrix without noise that has not been evaluated yet, if it has one.

    :param covar: The covariance matrix.
    :param evaluates: Whether parts of the kernel that have none are evaluated.
    """
    if (
        type(covar) is not LazyEvaluatedKernelTensor
        or covar.params
        or covar.last_dim_is_batch
        or covar._is_grad_enabled != torch.is_grad_enabled()
        or "kernel_eval" in memoized_names(covar)
    ):
        return None
    return closed_form_of(covar.kernel, covar.x1, covar.x2, evaluates)


def closed_form_of(kernel: Kernel, x1: Tensor, x2: Tensor, evaluates: bool = False) -> ClosedForm | None:
    """Return the closed form of a kernel's covariance matrix, if it has one.

    :param kernel: The kernel.
    :param x1: The inputs of the rows, with the kernel's active dimensions selected (... x N x D).
    :param x2: The inputs of the columns (... x M x D).
    :param evaluates: Whether parts of the kernel that have none are evaluated.
    """
    if not is_dense_in_parts(kernel):
        return None
    if beta_features.checkpoint_kernel.value() or torch.is_autocast_enabled(x1.device.type):
        return None
    if not (x1.is_floating_point() and x2.is_floating_point()):  # whole numbers have no mean and no gradient
        return None
    terms = Terms(evaluates)
    if not write_kernel(kernel, x1, x2, terms):
        return None
    is_given = evaluates and any(type(step) is Given for step in terms.expression)
    return ClosedForm(terms, PARTS if is_given else CLOSED_FORM)
