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
    to_linear_operator,
)
from torch import Tensor

from . import beta_features, settings
from ._internals import memoized_names
from .constraints.unconstrained import CONSTRAINTS, Unconstrained
from .distributions import MultivariateNormal
from .functions import kernel_log_prob
from .functions._transforms import is_transformed
from .functions.cholesky_inverse import differentiable_cholesky
from .functions.given import Given
from .functions.kernel_covariance import KernelCovariance, no_leaves, plain_block
from .functions.kernel_matrix import Expression, KernelMatrix, diagonal, evaluate, of_rows
from .functions.parameters import Parameter
from .kernels.expression import Terms, is_dense_in_parts, is_never_held, write_kernel
from .kernels.kernel import Kernel
from .lazy import LazyEvaluatedKernelTensor
from .likelihoods.likelihood import Likelihood
from .likelihoods.noise import diagonal_of, marginal_noise

logger = logging.getLogger(__name__)

#: How often each route was taken: "tensors", "upstream". The reasons are logged at DEBUG.
routes: Counter[str] = Counter()

#: The reasons for the tensor path where the kernel is written as an expression.
CLOSED_FORM = "the kernel has a closed-form gradient"
PARTS = "parts of the kernel have a closed-form gradient, and upstream would factorize the whole as a dense matrix"
# What upstream asks of a covariance matrix to factorize it
_FACTORIZES = ("inv_quad_logdet", "_cholesky", "cholesky", "inv_quad", "logdet", "solve", "_solve")
_FACTORS = {"cholesky", "root_decomposition", "root_inv_decomposition", "symeig", "svd", "lanczos", "diagonalization"}


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
    """The covariance matrix of the rows of another with themselves, before it is evaluated.

    :param cross: The other matrix.
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


def closed_form(covar: LinearOperator) -> ClosedForm | None:
    """Return the closed form of a covariance matrix that has not been evaluated yet, if it has one.

    :param covar: The covariance matrix.
    """
    covar, noise = without_noise(covar)
    form = _unevaluated_form(covar, evaluates=False)
    return form if form is None or noise is None else form.add_noise((noise, False, None))


def written(covar: LinearOperator, batch_shape: torch.Size | None = None) -> ClosedForm | str:
    """Return a covariance matrix as an expression, whose parts have closed forms or are evaluated, or why it is left to
    upstream.

    :param covar: The covariance matrix.
    :param batch_shape: Its batch shape, where that is known.
    """
    if has_factor(covar):
        return "a factor of the covariance is cached already"
    covar, noise = without_noise(covar)
    form = _unevaluated_form(covar, evaluates=True)
    if form is None or form.batch_shape != (covar.batch_shape if batch_shape is None else batch_shape):
        form = given(covar)
    return form if isinstance(form, str) or noise is None else form.add_noise((noise, False, None))


def without_noise(covar: LinearOperator) -> tuple[LinearOperator, Tensor | None]:
    """Return a covariance matrix without what is added to its diagonal, and that (... x N or ... x 1), if anything is.

    :param covar: The covariance matrix.
    """
    if type(covar) is not AddedDiagLinearOperator:
        return covar, None
    noise = diagonal_of(covar._diag_tensor)
    return covar._linear_op, covar._diag_tensor.diagonal() if noise is None else noise


def _unevaluated_form(covar: LinearOperator, evaluates: bool) -> ClosedForm | None:
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


def unbroadcast_batch_shape(mean: Tensor, covar: LinearOperator | Tensor) -> torch.Size | None:
    """Return the batch shape of mean and covariance, where nothing in either needs to be broadcast.

    :param mean: The mean (... x N).
    :param covar: The covariance matrix (... x N x N).
    :return: The batch shape, or None where it takes more than a look to know.
    """
    batch_shape = mean.shape[:-1]
    if not isinstance(covar, LinearOperator):
        return None
    if type(covar) is not LazyEvaluatedKernelTensor:
        return batch_shape if covar.shape[:-2] == batch_shape else None
    if covar.x1 is not covar.x2 or covar.last_dim_is_batch or covar.x1.shape[:-2] != batch_shape:
        return None
    # One kernel for each of the batch, or one for all
    is_known = _has_batch_shape(covar.kernel, batch_shape) or _has_batch_shape(covar.kernel, torch.Size())
    return batch_shape if is_known else None


def _has_batch_shape(kernel: torch.nn.Module, batch_shape: torch.Size) -> bool:
    if isinstance(kernel, Kernel) and (
        kernel._batch_shape != batch_shape or type(kernel).batch_shape is not Kernel.batch_shape
    ):
        return False
    for child in kernel._modules.values():
        if child is not None and type(child) not in CONSTRAINTS and not _has_batch_shape(child, batch_shape):
            return False
    return True


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


def closed_form_marginal(
    likelihood: Likelihood, function_dist: MultivariateNormal, params: tuple, kwargs: dict
) -> ClosedForm | None:
    """Return the covariance of the observations, where it can be had without an operator.

    :param likelihood: The likelihood.
    :param function_dist: The prior at the training inputs.
    :param params: What the likelihood is called with after the distribution.
    :param kwargs: The same, by keyword.
    """
    if (
        not isinstance(function_dist, MultivariateNormal)
        or type(function_dist).log_prob is not MultivariateNormal.log_prob
        or function_dist._validate_args
        or settings.observation_nan_policy.value() != "ignore"
        or not function_dist.islazy
        or not uses_cholesky(function_dist.loc.size(-1))
    ):
        return None
    noise = marginal_noise(likelihood, function_dist.loc.shape, params, kwargs)
    form = None if noise is None else written(function_dist._covar, function_dist.batch_shape)
    if not isinstance(form, ClosedForm):
        return None
    form.add_noise(noise)
    if form.batch_shape != function_dist.batch_shape:
        return None
    note(True, form.reason)
    return form


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


class Evaluated:
    """An operator as what :class:`ClosedForm` is for kernels that have none."""

    terms = None  # it has no expression

    def __init__(self, covar: LinearOperator) -> None:
        self.covar = covar.evaluate_kernel()
        self.shape = self.covar.shape

    def to_dense(self, rows: slice | None = None) -> Tensor:
        return (self.covar if rows is None else self.covar[..., rows, :]).to_dense()

    def block(self, rows: slice | None, cols: slice | None) -> Tensor:
        return self.covar[..., rows or slice(None), cols or slice(None)].to_dense()

    def diagonal(self) -> Tensor:
        return self.covar.diagonal(dim1=-1, dim2=-2)

    def at_rows(self, rows: Tensor) -> Evaluated:
        return Evaluated(self.covar[..., rows, :])

    def at(self, rows: Tensor) -> Evaluated:
        return Evaluated(DenseLinearOperator(self.covar.to_dense()[..., rows, :][..., rows]))


def unevaluated(
    prior: LinearOperator | Tensor | ClosedFormPrior, cross: LinearOperator | Tensor | ClosedForm
) -> tuple[ClosedFormPrior | Evaluated, ClosedForm | Evaluated]:
    """Return what gives the covariance matrices of a prediction, or parts of them, when asked.

    :param prior: K(test, test) (... x M x M).
    :param cross: K(test, train) (... x M x N).
    """
    if isinstance(cross, ClosedForm):
        return prior, cross
    prior, cross = to_linear_operator(prior), to_linear_operator(cross)
    form = closed_form(cross)
    if form is None or type(prior) is not type(cross) or prior.kernel is not cross.kernel or prior.x1 is not cross.x1:
        return Evaluated(prior), Evaluated(cross)
    return ClosedFormPrior(form), form


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
