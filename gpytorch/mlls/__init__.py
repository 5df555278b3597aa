"""Marginal log likelihoods, with the exact ones on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)
