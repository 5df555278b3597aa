"""Lazily evaluated covariances, with those of kernels such that `torch.compile` can trace them."""

from .. import _upstream

_upstream.extend(__name__)
