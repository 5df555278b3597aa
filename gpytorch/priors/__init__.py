"""Priors, the log normal one in one formula."""

from .. import _upstream

_upstream.extend(__name__)
