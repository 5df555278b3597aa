"""The Cholesky factor of a dense operator, left in the memory and the order in which LAPACK returns it, and its
products."""

from __future__ import annotations

from linear_operator.operators import (
    CholLinearOperator,
    DenseLinearOperator,
    LinearOperator,
    MulLinearOperator,
    RootLinearOperator,
    TriangularLinearOperator,
)
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from .. import _upstream, beta_features, settings
from ..closed_form.covariance import without_noise
from ..dense import inherits_factorization, structured

_upstream_cholesky = LinearOperator._cholesky
_upstream_product_init = MulLinearOperator.__init__
_upstream_matmul = TriangularLinearOperator.matmul


@_upstream.replaces(LinearOperator)
def _cholesky(self, upper: bool | None = False) -> TriangularLinearOperator:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, the factor of a dense operator stays in the order of columns
    that LAPACK leaves it in, which solves and products take as well, rather than be copied into rows.
    """
    is_in_pieces = beta_features.checkpoint_kernel.value() > 0
    if settings.use_torch_tensors.off() or is_in_pieces or self.size(-1) == 1:
        return _upstream_cholesky(self, upper)
    # Asked of what noise is added to, whose evaluation is kept. The sum is made anew each time.
    covar, _ = without_noise(self)
    is_dense = inherits_factorization(covar)
    if not is_dense or structured(covar.evaluate_kernel()) is not None:
        return _upstream_cholesky(self, upper)
    return TriangularLinearOperator(psd_safe_cholesky(self.evaluate_kernel().to_dense(), upper=upper), upper=upper)


@_upstream.replaces(TriangularLinearOperator)
def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, the product of a dense factor with a tensor is that of two
    tensors: samples of a posterior are made of it, and differentiated through it.
    """
    if settings.use_torch_tensors.on() and isinstance(other, Tensor) and type(self._tensor) is DenseLinearOperator:
        tensor = self._tensor.tensor
        if other.dim() > 1 and other.size(-2) == tensor.size(-1):
            return tensor @ other
    return _upstream_matmul(self, other)


@_upstream.replaces(MulLinearOperator)
def __init__(self, left_linear_op, right_linear_op):
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, a product of two matrices, which is made of their factors and
    looks at their memory as rows, has them in rows.
    """
    _upstream_product_init(self, left_linear_op, right_linear_op)
    if settings.use_torch_tensors.off():
        return
    roots = self.left_linear_op, self.right_linear_op
    left, right = map(_in_rows, roots)
    if (left, right) != roots:
        _upstream_product_init(self, left, right)


def _in_rows(root: RootLinearOperator) -> RootLinearOperator:
    if type(root) is not CholLinearOperator or type(root.root) is not TriangularLinearOperator:
        return root
    factor = root.root
    tensor = factor._tensor.to_dense()
    if tensor.is_contiguous():
        return root
    return CholLinearOperator(TriangularLinearOperator(tensor.contiguous(), upper=factor.upper), upper=root.upper)
