"""Models, with exact GPs predicting on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)
