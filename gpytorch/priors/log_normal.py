"""The location and the scale of a log normal prior as tensors, for its density and for the sum of several."""

from __future__ import annotations

import torch
from torch import Tensor

from .._internals import is_all_true
from .prior import Prior


def log_normal_arguments(prior: Prior, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prior's transform of a tensor, and mean and standard deviation of its logarithm.

    :param prior: A log normal prior.
    :param x: The tensor.
    :raises ValueError: If the prior validates its arguments, and this is not one of them.
    """
    x = prior.transform(x)
    # torch.vmap lets `_is_all_true` decide, which torch's own validation asks, and not `all`.
    if prior._validate_args and (prior._batch_shape or not isinstance(x, Tensor) or not is_all_true(torch.gt(x, 0))):
        prior._validate_sample(x)  # which also looks at the shapes, and says what is wrong
    return x, prior.base_dist.loc, prior.base_dist.scale
