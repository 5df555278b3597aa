"""A script run with the flag off and on, and how its numbers differ."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from drawn import Drawn
from torch import Tensor

from gpytorch import dense, settings
from gpytorch.settings import use_torch_tensors


@dataclass
class Run:
    """What a script noted, and the type of the error that ended it, if one did."""

    noted: list[tuple[str, Tensor]] = field(default_factory=list)
    error: str | None = None


def run(text: str, dtype: torch.dtype, flag: bool) -> Run:
    """Run a script.

    :param text: The script.
    :param dtype: What its numbers are.
    :param flag: Whether tensors are used.
    """
    namespace: dict = {}
    exec(compile(text, "<drawn>", "exec"), namespace)
    result = Run()
    torch.manual_seed(0)
    with use_torch_tensors(flag), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # As GPyTorch has them: BoTorch sets others for the process.
        with settings.fast_computations(), settings.max_cholesky_size(800), settings.cholesky_max_tries(3):
            try:
                namespace["program"](lambda name, value: result.noted.append((name, value.detach().clone())), dtype)
            except Exception as error:  # it has to be the same one with the flag on
                result.error = type(error).__name__
    return result


def difference(drawn: Drawn) -> str | None:
    """Return where a script's numbers with the flag on are not upstream's to rounding, or None.

    :param drawn: The script.
    """
    dtype = getattr(torch, drawn.dtype)
    off, on = run(drawn.text, dtype, False), run(drawn.text, dtype, True)
    if off.error != on.error:
        return f"the flag off ends with {off.error}, on with {on.error}"
    if [name for name, _ in off.noted] != [name for name, _ in on.noted]:
        return "not the same numbers are computed"
    exact = run(drawn.text, torch.float64, False).noted if dtype is torch.float32 else off.noted
    for i, ((name, theirs), (_, ours), (_, reference)) in enumerate(zip(off.noted, on.noted, exact, strict=False)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"{i}, {name}: {ours.dtype} of {ours.shape}, not {theirs.dtype} of {theirs.shape}"
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return f"{i}, {name}: not the same elements are NaN"
        ours, theirs, reference = (each.double().nan_to_num() for each in (ours, theirs, reference))
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        off_by = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
        allowed = (1e-4 if drawn.is_rough else 1e-7) * size
        if dtype is torch.float32:  # as near to the numbers of float64 as upstream
            allowed = 1e-2 * size + 4 * (theirs - reference).abs().max().item() if theirs.numel() else 0.0
        if off_by > allowed:
            return f"{i}, {name}: off by {off_by:.1e}, of {size:.1e}; allowed {allowed:.1e}"
    return None


def routes() -> int:
    """Return how often tensors were taken so far."""
    return dense.routes["tensors"]
