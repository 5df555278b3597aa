"""Distributions, with log probabilities on plain tensors."""

from .. import _upstream

_upstream.extend(__name__)
