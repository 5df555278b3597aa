"""Likelihoods, with the noise of the Gaussian ones as plain tensors."""

from .. import _upstream

_upstream.extend(__name__)
