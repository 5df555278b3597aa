"""At what a log normal prior's density is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from .prior import Prior


def log_normal_value(prior: Prior, x: Tensor) -> Tensor:
    """Return the prior's transform of a tensor.

    :param prior: A log normal prior.
    :param x: The tensor.
    :raises ValueError: If the prior validates its arguments, and this is not one of them.
    """
    x = prior.transform(x)
    # torch.vmap lets `_is_all_true` decide, which torch's own validation asks, and not `all`.
    if prior._validate_args and (prior._batch_shape or not torch._is_all_true(torch.gt(x, 0))):
        prior._validate_sample(x)  # which also looks at the shapes, and says what is wrong
    return x
