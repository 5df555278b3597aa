"""The leave-one-out pseudo likelihood on plain tensors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _upstream, settings
from ..distributions import MultivariateNormal
from ..functions.cholesky_inverse import psd_inverse
from .marginal import closed_form_marginal

_upstream.extend(__name__)

_upstream_forward = LeaveOneOutPseudoLikelihood.forward  # noqa: F821 (from the installed module)


@_upstream.replaces(LeaveOneOutPseudoLikelihood)  # noqa: F821
def forward(self, function_dist: MultivariateNormal, target: Tensor, *params: Any) -> Tensor:
    r"""
    With :class:`gpytorch.settings.use_torch_tensors` on, and a kernel whose gradient has a closed form, computes from
    the inverse :math:`\mathbf P` of the covariance matrix (Rasmussen and Williams, 2006, equations 5.10 to 5.12)

    .. math::
        \sigma_i^2 = 1 / P_{ii}, \quad y_i - \mu_i = \sigma_i^2 [\mathbf P (\mathbf y - \mathbf m)]_i.
    """
    covar = None
    if settings.use_torch_tensors.on() and function_dist.loc.size(-1) > 1:
        covar = closed_form_marginal(self.likelihood, function_dist, params, {})
    if covar is None:
        return _upstream_forward(self, function_dist, target, *params)
    inverse = psd_inverse(covar.to_dense())
    sigma2 = inverse.diagonal(dim1=-1, dim2=-2).reciprocal()
    residual = target - function_dist.loc.reshape(target.shape)
    error = (inverse @ residual.unsqueeze(-1)).squeeze(-1) * sigma2
    res = (-0.5 * sigma2.log() - 0.5 * error.square() / sigma2).sum(dim=-1)
    res = self._add_other_terms(res, params)
    return res.div_(target.size(-1)) - 0.5 * math.log(2 * math.pi)
