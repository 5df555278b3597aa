"""Batch shapes and products of batches, against torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from gpytorch._shapes import as_columns, broadcast_shapes, matmul

BATCH_SHAPES = [(), (1,), (2,), (3, 1), (3, 2), (4, 1, 2), (4, 3, 1), (1, 1), (0,)]
PAIRS = list(itertools.product(BATCH_SHAPES, repeat=2))


def test_shapes_broadcast_as_torchs_do() -> None:
    for shapes in [*PAIRS, ((2,), (3, 1), (4, 1, 1)), ((2,),), ((2, 3), (2, 1))]:
        sizes = [torch.Size(shape) for shape in shapes]
        try:
            expected = torch.broadcast_shapes(*sizes)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="broadcast"):
                broadcast_shapes(*sizes)
            continue
        result = broadcast_shapes(*sizes)
        assert result == expected and isinstance(result, torch.Size)


def broadcasts(left: tuple, right: tuple) -> bool:
    return all(1 in pair or pair[0] == pair[1] for pair in zip(left[::-1], right[::-1], strict=False))


@pytest.mark.parametrize(("left_shape", "right_shape"), [pair for pair in PAIRS if broadcasts(*pair)], ids=str)
def test_product_and_its_gradients_are_torchs(left_shape: tuple, right_shape: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(*shape, *sizes, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape, sizes in ((left_shape, (3, 4)), (right_shape, (4, 2)))
    )
    results = []
    for product in (matmul, torch.matmul):
        result = product(left, right)
        weights = torch.linspace(1, 2, result.numel(), dtype=result.dtype).view(result.shape)
        results.append((result, *torch.autograd.grad((result * weights).sum(), (left, right))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_larger_batch_shares_one_copy_of_the_smaller() -> None:
    left = torch.randn(5, 2, 3, 4)
    columns, restore = as_columns(torch.Size([2]), left.mT)
    assert columns.shape == (2, 4, 15) and restore(columns).mT.equal(left)
