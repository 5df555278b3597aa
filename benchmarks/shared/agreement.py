"""Nothing is timed before it is known to compute the same numbers."""

from __future__ import annotations

import torch

# Relative to the reference's norm. Both sides round: float32 loses some digits to the conditioning of the covariance.
TOLERANCES = {"float64": 1e-6, "float32": 2e-2}


class Disagreement(RuntimeError):
    """Two providers do not compute the same numbers; their times must not be compared."""


def distance(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the distance of `result` from `reference`, relative to the norm of `reference`."""
    return float((result - reference).norm() / reference.norm())


def check_same(results: dict[str, torch.Tensor], dtype: str, what: str) -> dict[str, float]:
    """Raise :class:`Disagreement` unless all of `results` equal the first one to rounding.

    :param results: A vector by provider.
    :param dtype: "float32" or "float64".
    :param what: What was computed, for the message.
    :return: Each provider's distance from the first one.
    """
    (first, reference), *_ = results.items()
    distances = {provider: distance(result, reference) for provider, result in results.items()}
    for provider, error in distances.items():
        if not error <= TOLERANCES[dtype]:
            raise Disagreement(f"{what}: {provider} differs from {first} by {error:.1e} (relative, {dtype}).")
    return distances


def noted(distances: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return distances from stock as the values of rows, by provider."""
    return {provider: {"distance_from_stock": error} for provider, error in distances.items()}
