"""Products with the rows of a covariance that belong to points which are the same in a whole batch: evaluated once
for all.

Predictions of BoTorch's acquisition functions have such points, those observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from .._internals import num_dispatch_modes
from .._shapes import as_columns
from .._transforms import UntransformedFunction, below_autograd, is_transformed, must_be_differentiable
from ..closed_form.bilinear import Bilinear
from ..closed_form.matrix import Expression, KernelMatrix, Node, Record, plain
from ..closed_form.parameters import Cotangents, Parameter
from ..closed_form.stationary import BoundStationary, Stationary
from .kernel_covariance import are_reached, grad_of_plain, no_leaves

# With fewer elements, to look for what is shared takes longer than to evaluate it.
FEW = 2**14

# A model remembers what it has evaluated of the last few points, or hyperparameters, if that has no more elements.
NUM_KEPT, MANY_KEPT = 2, 2**20

# Slopes are multiplied by the coordinates once, and not at every backward, if the products have no more elements.
MANY_PRODUCTS = 2**20


def num_shared(expression: Expression, values: Sequence[Tensor], row_slots: Sequence[int]) -> int:
    """Return how many of the first points of the rows are the same in a whole batch, if it is worth while to know.

    :param expression: The covariance matrix in terms of `values`.
    :param values: The tensors that it is made of.
    :param row_slots: Where the inputs of the rows stand among them.
    """
    inputs = [values[slot] for slot in row_slots]
    cols = [values[step.cols] for step in expression if isinstance(step, Stationary | Bilinear)]
    first, num_cols = inputs[0], cols[0].size(-2)
    num_batch, num_points = first.shape[:-2].numel(), first.size(-2)
    if num_batch * num_points * num_cols < FEW or first.dim() < 3 or num_points == 1:
        return 0
    # On a device, to compare is to wait; in a transformation, and under a mode such as that of fake tensors, there is
    # nothing to compare.
    if not first.is_cpu or is_transformed() or num_dispatch_modes() > 0:
        return 0
    if not all(isinstance(step, Stationary | Bilinear | Parameter | Node) for step in expression):
        return 0
    for x in inputs:
        num_points = min(num_points, _num_same(x.detach()))
    num_models = max(x.shape[:-2].numel() for x in cols)
    return num_points if num_points * (num_batch - num_models) * num_cols >= FEW else 0


def _num_same(x: Tensor) -> int:
    for dim, stride in enumerate(x.stride()[:-2]):
        if stride == 0:
            x = x.narrow(dim, 0, 1)
    x = x.flatten(0, -3)
    num_points = x.size(-2)
    if len(x) == 1:
        return num_points
    return next(compress(range(num_points), (x[1:] != x[0]).sum((0, -1)).tolist()), num_points)


class SharedRows:
    r"""
    The covariance :math:`\mathbf C` of points that are the same in a whole batch with others, evaluated once, and what
    its derivatives are made of.

    :param expression: The covariance matrix in terms of `values`.
    :param values: The tensors that it is made of, with the points once.
    """

    def __init__(self, expression: Expression, values: Sequence[Tensor]) -> None:
        self.matrix, self.record = KernelMatrix(expression, values), []
        self.covar = _evaluate(self.matrix, self.record)

    @cached_property
    def slopes(self) -> list[tuple[BoundStationary, Tensor, float, Tensor | None]]:
        """See :meth:`~gpytorch.closed_form.matrix.KernelMatrix.slopes`."""
        return self.matrix.slopes(self.record)

    @cached_property
    def slopes_by_coordinate(self) -> list[Tensor]:
        """Each slope times one and times each coordinate of the columns, row by row (... x M (D + 1) x N)."""
        return [
            (slope.unsqueeze(-2) * self.ones_and_z(bound).unsqueeze(-3)).flatten(-3, -2)
            for bound, slope, _, _ in self.slopes
        ]

    @staticmethod
    def ones_and_z(bound: BoundStationary) -> Tensor:
        """Return ones and the coordinates of the columns (... x (D + 1) x N)."""
        _, z = bound.scaled_inputs()
        return torch.cat([z.new_ones(*z.shape[:-1], 1), z], dim=-1).mT


@below_autograd
def _evaluate(matrix: KernelMatrix, record: Record) -> Tensor:
    return matrix.evaluate(record=record)


class SharedRowsOfModel:
    """What a model remembers of points that its predictions share from call to call, and of which values."""

    def __init__(self) -> None:
        # Only ever replaced as a whole, so that threads can share it
        self._kept: tuple[tuple[tuple, list[Tensor], SharedRows], ...] = ()

    def of(self, expression: Expression, values: Sequence[Tensor]) -> SharedRows:
        """Return the covariance of points with others.

        :param expression: The covariance matrix in terms of `values`.
        :param values: The tensors that it is made of, with the points once.
        """
        values, written = [value.detach() for value in values], _written(expression)
        for expression_before, values_before, made in self._kept:
            if expression_before == written and all(map(_equal, values_before, values)):
                return made
        values = [value.clone() for value in values]
        made = SharedRows(expression, values)
        if made.covar.numel() <= MANY_KEPT and not torch.is_inference_mode_enabled():  # which would make it no use
            self._kept = ((written, values, made), *self._kept[: NUM_KEPT - 1])
        return made


def _written(expression: Expression) -> tuple:
    return tuple([_written_step(step) for step in expression])


def _written_step(step: Stationary | Bilinear | Parameter | Node) -> tuple | Node:
    if type(step) is Stationary:
        parameters = (step.lengthscale, step.shape, step.scale)
        return (step.profile, step.rows, step.cols, *(each and each.slot for each in parameters))
    if type(step) is Bilinear:
        return step.rows, step.cols, step.covar.slot
    return (step.slot,) if type(step) is Parameter else step


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(left, right)


def shared_product(
    left: Tensor, shared: SharedRows, values: Sequence[Tensor], row_slots: Sequence[int], batch_shape: torch.Size
) -> Tensor:
    r"""
    Computes :math:`\mathbf A \mathbf C^\top`.

    :param left: :math:`\mathbf A` (... x R x N).
    :param shared: :math:`\mathbf C` (... x M x N).
    :param values: The tensors that :math:`\mathbf C` is made of, with the points for each of the batch.
    :param row_slots: Where the points stand among them (each ... x M x D).
    :param batch_shape: The batch shape of the product.
    :return: The product (... x R x M).
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (left, *values)):
        return SharedProduct.apply(shared, row_slots, batch_shape, *no_leaves((left, *values)))
    return _product(left, shared.covar, batch_shape)


def _product(left: Tensor, covar: Tensor, batch_shape: torch.Size) -> Tensor:
    columns, restore = as_columns(covar.shape[:-2], left.mT)
    return restore(covar @ columns).mT.expand(*batch_shape, left.size(-2), covar.size(-2))


class SharedProduct(UntransformedFunction):
    r"""
    :math:`\mathbf A \mathbf C^\top` for the covariance :math:`\mathbf C` of points that are the same in a whole batch,
    with a gradient in each of them. Call :func:`shared_product`.
    """

    # With the cotangent G_b of A_b C^T, for each of the batch: dL/dA_b = G_b C and dL/dC_b = G_b^T A_b.
    # Parameters have what is left of sum_b dL/dC_b. A point x_i of the batch has, with the derivative V of C in the
    # squared distances of z = x / lengthscale,
    #   dL/dz_bi = 2 sum_rj G_bri A_brj V_ij (z_i - z'_j) = 2 sum_r G_bri ((V A_b^T)_ir z_i - (V (A_br o z'))_i),
    # in which V is multiplied with a few columns, and no matrix is as large as the whole batch of C is.

    @staticmethod
    @below_autograd
    def forward(
        ctx,
        shared: SharedRows,
        row_slots: Sequence[int],
        batch_shape: torch.Size,
        left: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(left, *values)
        ctx.shared, ctx.row_slots, ctx.batch_shape = shared, row_slots, batch_shape
        return _product(left, shared.covar, batch_shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (left, *values), (left_needed, *needed) = ctx.saved_tensors, ctx.needs_input_grad[3:]
        shared, row_slots, batch_shape = ctx.shared, ctx.row_slots, ctx.batch_shape
        if must_be_differentiable(grad):

            def product(left: Tensor, *values: Tensor) -> Tensor:
                covar = plain(shared.matrix.expression, values)
                return (left @ covar.mT).expand(*batch_shape, left.size(-2), covar.size(-2))

            grads = grad_of_plain(product, (left, *values), (left_needed, *needed), grad)
            return None, None, None, *grads
        left_needed, *needed = are_reached((left_needed, *needed), ctx.next_functions)
        covar, matrix = shared.covar, shared.matrix
        sums: list[Tensor | None] = [None] * len(values)
        is_row = [slot in row_slots for slot in range(len(values))]
        if not grad.any():  # of the means, say, of points of which only the covariance with others is read
            of_left = torch.zeros_like(left) if left_needed else None
            return None, None, None, of_left, *map(_zeros, values, needed)
        columns, restore = as_columns(covar.shape[:-2], grad.mT)
        of_left = restore(covar.mT @ columns).mT.sum_to_size(left.shape) if left_needed else None
        others_needed = [need and not row for need, row in zip(needed, is_row, strict=True)]
        if any(others_needed):
            full = left.expand(*batch_shape, *left.shape[-2:])
            lefts, _ = as_columns(covar.shape[:-2], full.mT)
            cotangents = Cotangents(matrix.values, others_needed)
            matrix.pull_back(cotangents, columns @ lefts.mT, record=shared.record, overwrite=False)
            sums = cotangents.sums
        if any(map(bool.__and__, needed, is_row)):
            _add_of_rows(sums, needed, shared, left, grad)
        found = [
            part if part is None or part.shape == value.shape else part.sum_to_size(value.shape)
            for part, value in zip(sums, values, strict=True)
        ]
        return None, None, None, of_left, *found


def _add_of_rows(
    sums: list[Tensor | None], needed: Sequence[bool], shared: SharedRows, left: Tensor, grad: Tensor
) -> None:
    for number, (bound, slope, c, weight) in enumerate(shared.slopes):
        slot = bound.kernel.rows
        if not needed[slot]:
            continue
        z1, z2 = bound.scaled_inputs()
        # Of each row of A, by way of (1, z'): what the products of V have is in a column each (... x M x R x (D + 1))
        if slope.numel() * (1 + z2.size(-1)) <= MANY_PRODUCTS:
            columns, restore = as_columns(slope.shape[:-2], left.mT)
            products = restore(shared.slopes_by_coordinate[number] @ columns)
            products = products.unflatten(-2, (slope.size(-2), -1)).mT
        else:
            rows = (left.unsqueeze(-2) * shared.ones_and_z(bound).unsqueeze(-3)).flatten(-3, -2)
            columns, restore = as_columns(slope.shape[:-2], rows.mT)
            products = restore(slope @ columns).unflatten(-1, (left.size(-2), -1))
        differences = products[..., :1] * z1.unsqueeze(-2) - products[..., 1:]
        of_z = (grad.mT.unsqueeze(-1) * differences).sum(-2).mul_(2 * c)
        if weight is not None:
            of_z = of_z * weight
        if bound.lengthscale is not None:
            of_z = of_z / bound.lengthscale
        sums[slot] = of_z if sums[slot] is None else sums[slot] + of_z


def _zeros(value: Tensor, needed: bool) -> Tensor | None:
    return torch.zeros_like(value) if needed else None
