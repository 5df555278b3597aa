"""When a covariance may be a plain tensor, and how it becomes one.

The tensor path is taken where :class:`gpytorch.settings.use_torch_tensors` is on and upstream itself would factorize a
dense matrix. :func:`decide` says so, and why not, before anything is computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    LinearOperator,
)
from torch import Tensor

from . import beta_features, settings
from ._internals import memoized_names
from ._transforms import is_transformed
from .closed_form.covariance import ClosedForm, unevaluated_form, without_noise
from .closed_form.kernels import Terms, is_never_held
from .functions.cholesky_inverse import differentiable_cholesky

logger = logging.getLogger(__name__)

#: How often each route was taken: "tensors", "upstream". The reasons are logged at DEBUG.
routes: Counter[str] = Counter()

# What upstream asks of a covariance matrix to factorize it
_FACTORIZES = ("inv_quad_logdet", "_cholesky", "cholesky", "inv_quad", "logdet", "solve", "_solve")
_FACTORS = {"cholesky", "root_decomposition", "root_inv_decomposition", "symeig", "svd", "lanczos", "diagonalization"}


def note(taken: bool, reason: str) -> bool:
    """Count a decision and log its reason. Under `torch.compile` this happens once, when the graph is traced.

    :param taken: Whether the tensor path is taken.
    :param reason: Why, or why not.
    :return: `taken`.
    """
    routes["tensors" if taken else "upstream"] += 1
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s: %s", "tensors" if taken else "upstream", reason)
    return taken


note._dynamo_marked_constant = True  # what torch.compiler.assume_constant_result does, without a second of imports


def uses_cholesky(n: int) -> bool:
    """Return whether upstream factorizes a covariance matrix of `n` rows to compute a log probability."""
    return settings.fast_computations.log_prob.off() or n <= settings.max_cholesky_size.value()


def written(covar: LinearOperator, batch_shape: torch.Size | None = None) -> ClosedForm | str:
    """Return a covariance matrix as an expression, whose parts have closed forms or are evaluated, or why it is left to
    upstream.

    :param covar: The covariance matrix.
    :param batch_shape: Its batch shape, where that is known.
    """
    if has_factor(covar):
        return "a factor of the covariance is cached already"
    covar, noise = without_noise(covar)
    form = unevaluated_form(covar, evaluates=True)
    if form is None or form.batch_shape != (covar.batch_shape if batch_shape is None else batch_shape):
        form = given(covar)
    return form if isinstance(form, str) or noise is None else form.add_noise((noise, False, None))


def given(covar: LinearOperator) -> ClosedForm | str:
    """Return a covariance matrix evaluated by upstream, where upstream would factorize it as a dense matrix, or why it
    would not.

    :param covar: The covariance matrix.
    """
    if beta_features.checkpoint_kernel.value():
        return "checkpoint_kernel has the kernel evaluated in pieces"
    evaluated = covar.evaluate_kernel() if inherits_factorization(covar) else covar
    structure = structured(evaluated)
    if structure is not None:
        return f"{type(structure).__name__} has structure"
    if torch.is_autocast_enabled(evaluated.device.type):
        return "autocast chooses the dtype of what upstream computes"
    terms = Terms()
    terms.add_given(evaluated.to_dense())
    return ClosedForm(terms, f"upstream would factorize {type(evaluated).__name__} as a dense matrix")


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
    form = written(covar)
    if isinstance(form, str):
        note(False, form)
        return None
    note(True, form.reason)
    return form.log_prob


def is_dense(covar: LinearOperator | ClosedForm) -> bool:
    """Decide whether upstream would factorize a covariance matrix as a dense matrix.

    :param covar: The covariance matrix.
    """
    form = covar if isinstance(covar, ClosedForm) else written(covar)
    return note(False, form) if isinstance(form, str) else note(True, form.reason)


def factorize(covar: LinearOperator | ClosedForm, detached: bool) -> Tensor:
    """Return the Cholesky factor (... x N x N) of a covariance matrix that :func:`is_dense`.

    :param covar: The covariance matrix.
    :param detached: Whether the factor has no gradient.
    """
    form = covar if isinstance(covar, ClosedForm) else written(covar)
    if detached and form.shape[-1] > 1 and not is_transformed():
        return form.factorize()
    matrix = form.to_dense()
    return differentiable_cholesky(matrix.detach() if detached else matrix)


def structured(covar: LinearOperator) -> LinearOperator | None:
    """Return the part of an evaluated covariance that upstream may treat better than as a dense matrix.

    One matrix with a structure keeps it. Of several that are added or multiplied, in an operator that inherits its
    factorization from :obj:`~linear_operator.LinearOperator`, upstream makes a dense matrix, whatever they are.

    :param covar: The covariance matrix, with its kernel evaluated.
    :return: The part, or None if upstream would factorize a dense matrix.
    """
    kind = type(covar)
    if has_factor(covar) or not inherits_factorization(covar):
        return covar
    if kind is DenseLinearOperator:
        return None
    if kind is ConstantMulLinearOperator:
        return structured(covar.base_linear_op)
    if kind is AddedDiagLinearOperator:
        return structured(covar._linear_op)
    is_of_several = sum(isinstance(part, LinearOperator) for part in covar._args) > 1
    return None if is_of_several and not is_never_held(covar) else covar


def inherits_factorization(covar: LinearOperator) -> bool:
    """Return whether an operator is factorized as every :obj:`~linear_operator.LinearOperator` is.

    :param covar: The operator, with its kernel evaluated or not.
    """
    kind = type(covar)
    return [getattr(kind, name) for name in _FACTORIZES] == [getattr(LinearOperator, name) for name in _FACTORIZES]


def has_factor(covar: LinearOperator) -> bool:
    """Return whether a factorization of the covariance is cached, which upstream would use again."""
    return not _FACTORS.isdisjoint(memoized_names(covar))
