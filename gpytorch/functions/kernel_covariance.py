"""A kernel's covariance matrix as a tensor with a closed-form gradient.

Predictions ask for it, and losses that read the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._internals import is_graph_kept, will_execute
from .._transforms import UntransformedFunction, below_autograd, must_be_differentiable
from ..closed_form.matrix import Expression, KernelMatrix, Record, evaluate, plain
from ..closed_form.parameters import Cotangents
from ..closed_form.stationary import Rows


class KernelCovariance(UntransformedFunction):
    r"""
    The covariance matrix :math:`\mathbf K` of an expression's inputs, or a block of it, as a tensor.

    The backward evaluates a large matrix again, a block of rows at a time, rather than keep it, and differentiates in
    those tensors alone that the backward as a whole goes on to: an acquisition function's in the test points, not in
    the hyperparameters. ``KernelCovariance.apply(expression, rows, cols, *values)``; no value that requires a
    gradient may be a leaf.
    """

    @staticmethod
    @below_autograd
    def forward(ctx, expression: Expression, rows: Rows, cols: Rows, *values: Tensor) -> Tensor:
        r"""
        :param expression: The covariance matrix in terms of `values`.
        :param rows: The block's rows.
        :param cols: The block's columns.
        :param values: The tensors it is made of.
        :return: :math:`\mathbf K` (... x N x M).
        """
        ctx.save_for_backward(*values)
        ctx.expression, ctx.block, ctx.matrix, ctx.record = expression, (rows, cols), None, None
        matrix = KernelMatrix(expression, values)
        if len(matrix.row_blocks(rows, cols)) > 1:
            return evaluate(matrix, rows, cols)
        record: Record = []
        ctx.matrix, ctx.record = matrix, record
        return matrix.evaluate(rows, cols, record)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, needed, (rows, cols) = ctx.saved_tensors, ctx.needs_input_grad[3:], ctx.block
        if must_be_differentiable(grad):

            def block(*values: Tensor) -> Tensor:
                return plain_block(ctx.expression, values, rows, cols)

            return None, None, None, *grad_of_plain(block, values, needed, grad)
        needed = are_reached(needed, ctx.next_functions)
        cotangents = Cotangents(values, needed)
        if ctx.matrix is not None:
            is_last = not is_graph_kept()
            ctx.matrix.pull_back(cotangents, grad, rows, cols, ctx.record, overwrite=is_last)
            if is_last:
                ctx.matrix = ctx.record = None
        else:
            matrix = KernelMatrix(ctx.expression, values)
            bounds = matrix.row_blocks(rows, cols)
            (first, _) = bounds[0]
            for start, stop in bounds:
                matrix.pull_back(cotangents, grad[..., start - first : stop - first, :], slice(start, stop), cols)
        return (None, None, None, *cotangents.sums)


def no_leaves(values: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with views in place of leaves, which unlike these can be asked whether a backward reaches them.

    :param values: The tensors.
    """
    return [each.view_as(each) if each.requires_grad and each.is_leaf else each for each in values]


def are_reached(needed: Sequence[bool], next_functions: Sequence[tuple]) -> list[bool]:
    """Return which inputs of a Function the backward that runs goes on to.

    :param needed: For each input, whether it requires a gradient.
    :param next_functions: What a backward of each is given to: the last of the Function's.
    """
    next_functions = next_functions[len(next_functions) - len(needed) :]
    return [need and will_execute(node) for need, (node, _) in zip(needed, next_functions, strict=True)]


def plain_block(expression: Expression, values: Sequence[Tensor], rows: Rows, cols: Rows) -> Tensor:
    """Return a block of an expression's matrix by differentiable operations.

    :param expression: The expression.
    :param values: Its tensors.
    :param rows: The block's rows.
    :param cols: The block's columns.
    """
    matrix = plain(expression, values)
    matrix = matrix if rows is None else matrix[..., rows, :]
    return matrix if cols is None else matrix[..., cols]


def grad_of_plain(
    function: Callable[..., Tensor], values: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Differentiate a function made of differentiable operations, so that the result can be again if it is recorded.

    :param function: The function.
    :param values: What it is called with.
    :param needed: For each, whether its cotangent is wanted.
    :param grad: The cotangent of what the function returns.
    """
    is_recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the derivative in one does not count what the same tensor does in another place
        values = [value.view_as(value) for value in values]
        output = function(*values)
    wanted = [value for value, need in zip(values, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=is_recorded, allow_unused=True))
    return [next(grads) if need else None for need in needed]
