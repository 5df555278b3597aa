"""The squared differences that a fit uses again: never those of other points."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from both_ways import compare_step, exact_gp, inputs
from torch import Tensor

from gpytorch.functions import differences
from gpytorch.functions.differences import squared_differences
from gpytorch.kernels import RBFKernel, ScaleKernel


def taken_apart(x: Tensor) -> Tensor:
    n, d = x.shape[-2:]
    pairs = [(x[..., i, :] - x[..., j, :]).square() for i in range(n) for j in range(n)]
    return torch.stack(pairs, dim=-1).reshape(*x.shape[:-2], d, n * n)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (2, 4, 3), (2, 1, 3, 2)], ids=str)
def test_every_pair_has_its_squared_differences(shape: tuple[int, ...], again: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(squared_differences(x, again), taken_apart(x))


def test_points_asked_for_again_are_not_worked_through_again() -> None:
    x = torch.randn(7, 2, dtype=torch.float64)
    assert squared_differences(x.clone(), again=True) is squared_differences(x, again=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.add_(torch.arange(3.0)),
        lambda x: x.detach().numpy().__imul__(3),
        lambda x: x.float(),
        lambda x: x[:4],
        lambda x: x.unsqueeze(0),
        lambda x: x.fill_(float("nan")),
    ],
    ids=["in place", "data", "numpy", "dtype", "fewer", "batch", "nan"],
)
def test_other_points_have_their_own(change: Callable[[Tensor], object]) -> None:
    x = torch.rand(6, 3, dtype=torch.float64)
    squared_differences(x, again=True)
    changed = change(x)
    other = changed if isinstance(changed, Tensor) else x
    torch.testing.assert_close(squared_differences(other, again=True), taken_apart(other), equal_nan=True)
    assert squared_differences(other, again=True).dtype == other.dtype


def test_no_more_than_a_few_sets_of_points_are_kept() -> None:
    for i in range(20):
        squared_differences(torch.full((3, 1), float(i)), again=True)
    assert len(differences._kept) == differences._NUM_KEPT


def test_threads_get_the_differences_of_their_own_points() -> None:
    points = [torch.randn(9, 2, dtype=torch.float64) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: squared_differences(points[i % 8], again=True), range(200)))
    for i, result in enumerate(results):
        assert torch.equal(result, taken_apart(points[i % 8]))


def test_points_of_inference_mode_serve_a_training_after_it() -> None:
    x = inputs(8)
    with torch.inference_mode():
        squared_differences(x.clone(), again=True)
    compare_step(exact_gp(ScaleKernel(RBFKernel(ard_num_dims=x.size(-1))), x))


def test_training_inputs_changed_in_place_are_seen() -> None:
    mll = exact_gp(ScaleKernel(RBFKernel()), inputs(8))
    before = compare_step(mll)
    mll.model.train_inputs[0].data.mul_(1.5)
    assert compare_step(mll).value != before.value
