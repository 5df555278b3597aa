"""Models, with exact GPs predicting on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)

from . import posterior_covariance  # noqa: E402, F401 (for what it replaces)
