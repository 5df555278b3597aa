r"""The covariance matrix of a kernel as a tensor, with a gradient in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._internals import is_graph_kept, will_execute
from ._transforms import UntransformedFunction, below_autograd, must_be_differentiable
from .kernel_matrix import Expression, KernelMatrix, Record, evaluate, plain
from .parameters import Cotangents


class KernelCovariance(UntransformedFunction):
    r"""
    The covariance matrix :math:`\mathbf K` of an expression's inputs, as a tensor.

    The backward evaluates a large matrix again, a block of rows at a time, rather than keep it, and differentiates in
    those tensors alone that the backward as a whole goes on to: an acquisition function's in the test points, not in
    the hyperparameters. ``KernelCovariance.apply(expression, *values)``; no value that requires a gradient may be a
    leaf.
    """

    @staticmethod
    @below_autograd
    def forward(ctx, expression: Expression, *values: Tensor) -> Tensor:
        r"""
        :param expression: The covariance matrix in terms of `values`.
        :param values: The tensors it is made of.
        :return: :math:`\mathbf K` (... x N x M).
        """
        ctx.save_for_backward(*values)
        ctx.expression, ctx.matrix, ctx.record = expression, None, None
        matrix = KernelMatrix(expression, values)
        if len(matrix.row_blocks()) > 1:
            return evaluate(matrix)
        record: Record = []
        ctx.matrix, ctx.record = matrix, record
        return matrix.evaluate(record=record)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if must_be_differentiable(grad):
            return None, *grad_of_plain(lambda *values: plain(ctx.expression, values), values, needed, grad)
        needed = [need and will_execute(node) for need, (node, _) in zip(needed, ctx.next_functions, strict=True)]
        cotangents = Cotangents(values, needed)
        if ctx.matrix is not None:
            is_last = not is_graph_kept()
            ctx.matrix.pull_back(cotangents, grad, record=ctx.record, overwrite=is_last)
            if is_last:
                ctx.matrix = ctx.record = None
        else:
            matrix = KernelMatrix(ctx.expression, values)
            for start, stop in matrix.row_blocks():
                rows = slice(start, stop)
                matrix.pull_back(cotangents, grad[..., rows, :], rows)
        return (None, *cotangents.sums)


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
