"""Constraints, and parameters before theirs is applied."""

from .. import _upstream

_upstream.extend(__name__)
