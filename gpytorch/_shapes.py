"""Batch shapes: what they broadcast to, and products in which many right-hand sides share a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Return what :func:`torch.broadcast_shapes` does. That takes as long as a small factorization.

    :param shapes: The shapes.
    :raises RuntimeError: If they do not broadcast.
    """
    result = []
    for sizes in zip_longest(*map(reversed, shapes), fillvalue=1):
        size = 1
        for other in sizes:
            if size == 1:
                size = other
            elif other not in (1, size):
                return torch.broadcast_shapes(*shapes)  # which raises
        result.append(size)
    return torch.Size(result[::-1])


def as_columns(batch_shape: torch.Size, rhs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Lay the right-hand sides that share a matrix side by side.

    :param batch_shape: The matrices'.
    :param rhs: The right-hand sides (... x N x S).
    :return: The columns, of the matrices' batch shape (... x N x S'), and what brings rows that go with the columns
        (... x R x S') back to the batch shape that matrices and right-hand sides broadcast to (... x R x S).
    """
    if rhs.shape[:-2] == batch_shape:
        return rhs, lambda rows: rows
    if not batch_shape:
        columns = rhs.movedim(-2, 0)
        sizes = columns.shape[1:]
        return columns.flatten(1), lambda rows: rows.view(rows.size(0), *sizes).movedim(0, -2)
    full = broadcast_shapes(batch_shape, rhs.shape[:-2])
    padded = (1,) * (len(full) - len(batch_shape)) + tuple(batch_shape)
    shared = [i for i, size in enumerate(padded) if size == 1]
    own = [i for i, size in enumerate(padded) if size != 1]
    num_rows, num_columns = rhs.shape[-2:]
    row, column = len(full), len(full) + 1
    order = [*own, row, *shared, column]
    rhs = rhs.expand(*full, num_rows, num_columns).permute(order)
    columns = rhs.reshape(*batch_shape, num_rows, math.prod(full[i] for i in shared) * num_columns)

    def restore(rows: Tensor) -> Tensor:
        sizes = (*full, rows.size(-2), num_columns)
        return rows.reshape([sizes[i] for i in order]).permute(sorted(range(len(order)), key=order.__getitem__))

    return columns, restore


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return a product, as :func:`torch.matmul` does, but without a copy of the one side for each of a larger batch of
    the other.

    :param left: The one side (... x R x N).
    :param right: The other (... x N x S).
    """
    left_shape, right_shape = left.shape[:-2], right.shape[:-2]
    if not left_shape or not right_shape or left_shape == right_shape:
        return torch.matmul(left, right)
    if left_shape.numel() > right_shape.numel():
        return matmul(right.mT, left.mT).mT
    columns, restore = as_columns(left_shape, right)
    return restore(torch.matmul(left, columns))
