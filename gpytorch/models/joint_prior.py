"""Takes the prior at training and test points apart into those of a prediction, without evaluating it.

Before GPyTorch 1.15.2 every prediction comes by here; later, those of models whose mean looks at all points.
"""

from __future__ import annotations

from linear_operator.operators import LinearOperator
from torch import Tensor

from ..lazy import LazyEvaluatedKernelTensor


def parts(mean: Tensor, covar: LinearOperator, num_train: int) -> tuple[Tensor, LinearOperator, LinearOperator]:
    """Return the mean at test points, and their covariances with themselves and with the training points.

    :param mean: The mean at training and test points (... x N+M).
    :param covar: Their covariance (... x N+M x N+M).
    :param num_train: N.
    """
    test, train = slice(num_train, None), slice(None, num_train)
    if (
        type(covar) is LazyEvaluatedKernelTensor
        and covar.x1 is covar.x2
        and not covar.last_dim_is_batch
        and covar.kernel.num_outputs_per_input(covar.x1, covar.x2) == 1
    ):
        # As indexing does it, but with the same rows in both, which then are known to be the same
        tests, trains = covar.x1[..., test, :], covar.x1[..., train, :]
        covars = [LazyEvaluatedKernelTensor(tests, x, kernel=covar.kernel, **covar.params) for x in (tests, trains)]
    else:
        covars = [covar[..., test, test], covar[..., test, train]]
    return mean[..., test], *covars
