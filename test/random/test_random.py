"""Two hundred of the drawn scripts, and that the run of them can fail."""

from __future__ import annotations

import pytest
import torch
from differences import difference, run
from drawn import draw

from gpytorch.means import ConstantMean
from gpytorch.settings import use_torch_tensors

SCRIPTS, GROUPS = 200, 10


@pytest.mark.parametrize("group", range(GROUPS))
def test_flag_changes_no_number_of_a_drawn_script(group: int) -> None:
    for seed in range(group, SCRIPTS, GROUPS):
        drawn = draw(seed)
        found = difference(drawn)
        assert found is None, f"script {seed}: {found}\n{drawn.text}"


def test_scripts_are_drawn_again_by_their_number_and_differ() -> None:
    assert draw(3) == draw(3)
    assert len({draw(seed).text for seed in range(20)}) == 20


def test_most_scripts_run_to_their_end() -> None:
    ends = [run(draw(seed).text, torch.float64, False).error for seed in range(40)]
    assert sum(error is None for error in ends) >= 34


def test_number_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ConstantMean.forward
    monkeypatch.setattr(
        ConstantMean, "forward", lambda self, x: forward(self, x) + (1e-3 if use_torch_tensors.on() else 0.0)
    )
    assert sum(difference(draw(seed)) is not None for seed in range(20)) >= 5
