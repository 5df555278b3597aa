"""Means, the constant one with less bookkeeping."""

from .. import _upstream

_upstream.extend(__name__)
