"""When a covariance may be a plain tensor, and how it becomes one.

The tensor path is taken where :class:`gpytorch.settings.use_torch_tensors` is on and upstream itself would factorize a
dense matrix. :func:`decide` says so, and why not, before anything is computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MulLinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from . import beta_features, settings
from .functions import kernel_log_prob
from .functions.kernel_covariance import Expression
from .kernels.expression import Terms, kernel_expression
from .kernels.kernel import Kernel
from .lazy import LazyEvaluatedKernelTensor
from .likelihoods.noise import diagonal_of

logger = logging.getLogger(__name__)

#: How often each route was taken: "tensors", "upstream". The reasons are logged at DEBUG.
routes: Counter[str] = Counter()

_DENSE = (DenseLinearOperator, SumLinearOperator, MulLinearOperator, ConstantMulLinearOperator, AddedDiagLinearOperator)
_DIAGONAL = (DiagLinearOperator, ConstantDiagLinearOperator)
_FACTORS = {"cholesky", "root_decomposition", "root_inv_decomposition", "symeig", "svd", "lanczos", "diagonalization"}


class ClosedForm:
    """A covariance matrix whose kernel has a closed-form gradient, before it is evaluated.

    :param expression: The matrix in terms of `values`.
    :param values: The tensors that it is made of.
    :param noise: What is added to its diagonal (... x N or ... x 1).
    :param batch_shape: The sum's.
    """

    __slots__ = ("batch_shape", "expression", "noise", "values")

    def __init__(
        self, expression: Expression, values: list[Tensor], noise: Tensor | None, batch_shape: torch.Size
    ) -> None:
        self.expression, self.values, self.noise, self.batch_shape = expression, values, noise, batch_shape

    def add_noise(self, noise: Tensor) -> ClosedForm:
        """Return the matrix with more noise on its diagonal.

        :param noise: The noise (... x N or ... x 1).
        """
        total = noise if self.noise is None else self.noise + noise
        return ClosedForm(self.expression, self.values, total, _broadcast((self.batch_shape, noise.shape[:-1])))

    def log_prob(self, residual: Tensor) -> Tensor:
        """Return the log density of a Gaussian with this covariance matrix.

        :param residual: The value less the mean (... x N).
        """
        return kernel_log_prob.log_prob(self.expression, self.values, self.noise, residual, self.batch_shape)


def note(taken: bool, reason: str) -> bool:
    """Count a decision and log its reason.

    :param taken: Whether the tensor path is taken.
    :param reason: Why, or why not.
    :return: `taken`.
    """
    routes["tensors" if taken else "upstream"] += 1
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s: %s", "tensors" if taken else "upstream", reason)
    return taken


def uses_cholesky(n: int) -> bool:
    """Return whether upstream factorizes a covariance matrix of `n` rows to compute a log probability."""
    return settings.fast_computations.log_prob.off() or n <= settings.max_cholesky_size.value()


def closed_form(covar: LinearOperator) -> ClosedForm | None:
    """Return the closed form of a covariance matrix that has not been evaluated yet, if it has one.

    :param covar: The covariance matrix.
    """
    noise = None
    if type(covar) is AddedDiagLinearOperator:
        noise = diagonal_of(covar._diag_tensor)
        if noise is None:
            return None
        covar = covar._linear_op
    if (
        type(covar) is not LazyEvaluatedKernelTensor
        or covar.params
        or covar.last_dim_is_batch
        or covar._is_grad_enabled != torch.is_grad_enabled()
        or beta_features.checkpoint_kernel.value()
        or any(key[0] == "kernel_eval" for key in getattr(covar, "_memoize_cache", ()))
    ):
        return None
    terms = Terms()
    expression = kernel_expression(covar.kernel, covar.x1, covar.x2, terms)
    if expression is None:
        return None
    covar = ClosedForm(expression, terms.values, None, _broadcast(terms.batch_shapes))
    return covar if noise is None else covar.add_noise(noise)


def _broadcast(shapes: Iterable[torch.Size]) -> torch.Size:
    # torch.broadcast_shapes takes as long as a small factorization; the shapes are mostly one and the same.
    shapes = set(shapes)
    return next(iter(shapes)) if len(shapes) == 1 else torch.broadcast_shapes(*shapes)


def unbroadcast_batch_shape(mean: Tensor, covar: LinearOperator | Tensor) -> torch.Size | None:
    """Return the batch shape of mean and covariance, where nothing in either needs to be broadcast.

    :param mean: The mean (... x N).
    :param covar: The covariance matrix (... x N x N).
    :return: The batch shape, or None where it takes more than a look to know.
    """
    if type(covar) is not LazyEvaluatedKernelTensor or covar.x1 is not covar.x2 or covar.last_dim_is_batch:
        return None
    batch_shape = mean.shape[:-1]
    if covar.x1.shape[:-2] != batch_shape or not _has_batch_shape(covar.kernel, batch_shape):
        return None
    return batch_shape


def _has_batch_shape(kernel: torch.nn.Module, batch_shape: torch.Size) -> bool:
    if isinstance(kernel, Kernel) and (
        kernel._batch_shape != batch_shape or type(kernel).batch_shape is not Kernel.batch_shape
    ):
        return False
    return all(_has_batch_shape(child, batch_shape) for child in kernel._modules.values() if child is not None)


def decide(covar: LinearOperator) -> Callable[[Tensor], Tensor] | None:
    """Decide whether a covariance matrix is factorized as a tensor.

    :param covar: The covariance matrix (... x N x N).
    :return: What computes the log density of a residual (... x N) on tensors, or None: leave it to upstream.
    """
    if settings.use_torch_tensors.off():
        return None
    if not uses_cholesky(covar.size(-1)):
        note(False, f"{covar.size(-1)} rows are more than max_cholesky_size")
        return None
    if has_factor(covar):
        note(False, "a factor of the covariance is cached already")
        return None
    form = closed_form(covar)
    if form is not None and form.batch_shape == covar.batch_shape:
        note(True, "the kernel has a closed-form gradient")
        return form.log_prob
    covar = covar.evaluate_kernel()
    structure = structured(covar)
    if structure is not None:
        note(False, f"{type(structure).__name__} has structure")
        return None
    note(True, f"upstream would factorize {type(covar).__name__} as a dense matrix")
    return partial(kernel_log_prob.gaussian_log_prob, covar.to_dense())


def structured(covar: LinearOperator) -> LinearOperator | None:
    """Return the first part of an evaluated covariance that upstream may treat better than as a dense matrix.

    :param covar: The covariance matrix, with its kernel evaluated.
    :return: The part, or None if the whole is dense, or a sum or product of dense matrices, or one of these with an
        added diagonal.
    """
    if type(covar) not in _DENSE or has_factor(covar):
        return covar
    for part in covar._args:
        if isinstance(part, LinearOperator):
            is_added_diagonal = type(covar) is AddedDiagLinearOperator and type(part) in _DIAGONAL
            found = None if is_added_diagonal else structured(part)
            if found is not None:
                return found
    return None


def has_factor(covar: LinearOperator) -> bool:
    """Return whether a factorization of the covariance is cached, which upstream would use again."""
    return any(key[0] in _FACTORS for key in getattr(covar, "_memoize_cache", ()))
