"""What a fit and its predictions use again: never what was made of other points."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from both_ways import compare_step, exact_gp, inputs
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from gpytorch.closed_form.differences import centered, squared_differences
from gpytorch.closed_form.remembered import NUM_KEPT, remembered
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.settings import use_torch_tensors


def taken_apart(x: Tensor) -> Tensor:
    pairs = [(x[..., i, :] - x[..., j, :]).square() for i in range(x.size(-2)) for j in range(x.size(-2))]
    return torch.stack(pairs, dim=-1)


@pytest.fixture
def calls() -> list[Tensor]:
    return []


@pytest.fixture
def doubled(calls: list[Tensor]) -> Callable[[Tensor], Tensor]:
    @remembered
    def make(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    return make


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (2, 4, 3), (2, 1, 3, 2), (0, 2)], ids=str)
def test_every_pair_has_its_squared_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    expected = taken_apart(x) if x.numel() else x.new_empty(2, 0)
    assert torch.equal(squared_differences(x), expected)


def test_centered_points_differ_from_the_others_by_their_mean() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    origin, rest = centered(x)
    assert torch.equal(origin, x.mean(-2, keepdim=True))
    assert torch.equal(rest, x - origin)


def test_equal_tensors_are_asked_about_once(doubled: Callable, calls: list[Tensor]) -> None:
    x = torch.randn(7, 2)
    assert doubled(x.clone()) is doubled(x) is doubled(x.mT.contiguous().mT)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.data.add_(torch.arange(3.0)),
        lambda x: x.detach().numpy().__imul__(3),
        lambda x: x.double(),
        lambda x: x[:4],
        lambda x: x.unsqueeze(0),
        lambda x: x.fill_(float("nan")),
        lambda x: x.requires_grad_(),
    ],
    ids=["in place", "data", "numpy", "dtype", "fewer", "batch", "nan", "gradient"],
)
def test_others_have_their_own(change: Callable[[Tensor], object], doubled: Callable, calls: list[Tensor]) -> None:
    x = torch.rand(6, 3)
    doubled(x)
    changed = change(x)
    other = changed if isinstance(changed, Tensor) else x
    result = doubled(other)
    assert len(calls) == 2
    assert result.dtype == other.dtype
    torch.testing.assert_close(result, 2 * other, equal_nan=True)


def test_the_last_few_are_kept_and_no_more(doubled: Callable, calls: list[Tensor]) -> None:
    points = [torch.full((3, 1), float(i)) for i in range(NUM_KEPT + 1)]
    for x in (*points, *points[1:]):
        doubled(x)
    assert len(calls) == NUM_KEPT + 1
    doubled(points[0])
    assert len(calls) == NUM_KEPT + 2


def test_a_gradient_reaches_what_is_not_remembered(doubled: Callable) -> None:
    x = torch.ones(3, 1)
    doubled(x)
    x.requires_grad_()
    doubled(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 1), 2.0))


def test_threads_get_what_is_made_of_their_own_points() -> None:
    points = [torch.randn(9, 2, dtype=torch.float64) for _ in range(8)]
    of = remembered(squared_differences)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: of(points[i % 8]), range(200)))
    for i, result in enumerate(results):
        assert torch.equal(result, taken_apart(points[i % 8]))


def test_what_a_mode_makes_of_points_stays_in_it(doubled: Callable) -> None:
    x = torch.ones(3, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(doubled(x)) is FakeTensor
    assert type(doubled(x)) is Tensor


@pytest.mark.parametrize("n", [8, 400])  # by differences, and by products of centered points
def test_points_of_inference_mode_serve_a_training_after_it(n: int) -> None:
    mll = exact_gp(ScaleKernel(RBFKernel(ard_num_dims=2)), inputs(n))
    mll.eval()
    with torch.inference_mode(), use_torch_tensors():
        assert mll.model(inputs(3, seed=5)).variance.isfinite().all()
    mll.train()
    compare_step(mll)


@pytest.mark.parametrize("n", [8, 400])
def test_training_inputs_changed_in_place_are_seen(n: int) -> None:
    mll = exact_gp(ScaleKernel(RBFKernel()), inputs(n))
    before = compare_step(mll)
    mll.model.train_inputs[0].data.mul_(1.5)
    assert compare_step(mll).value != before.value
