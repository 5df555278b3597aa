"""The Cholesky factor of an operator, in the memory that LAPACK left it in."""

from __future__ import annotations

from linear_operator.operators import LinearOperator, TriangularLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky

import gpytorch  # whose `dense` imports this package

from .. import _upstream, settings

_upstream_cholesky = LinearOperator._cholesky


@_upstream.replaces(LinearOperator)
def _cholesky(self, upper: bool | None = False) -> TriangularLinearOperator:
    """
    With :class:`gpytorch.settings.use_torch_tensors` on, the factor of a dense operator stays in the order of columns
    that LAPACK leaves it in, which solves and products take as well, rather than be copied into rows.
    """
    if settings.use_torch_tensors.off() or self.size(-1) == 1:
        return _upstream_cholesky(self, upper)
    evaluated = self.evaluate_kernel()
    if gpytorch.dense.structured(evaluated) is not None:
        return _upstream_cholesky(evaluated, upper)
    return TriangularLinearOperator(psd_safe_cholesky(evaluated.to_dense(), upper=upper), upper=upper)
