"""Kernels, and those among them whose gradient has a closed form."""

from .. import _upstream

_upstream.extend(__name__)
