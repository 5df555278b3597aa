"""Covariance matrices of kernels made of others, evaluated and differentiated a block of rows at a time.

A kernel is written as an expression in postfix order: a step is a matrix, or makes one of the last one or two. Going
through the steps evaluates any block of the matrix; going back takes the cotangent of a block to the tensors that the
matrix is made of. Neither direction needs more memory than the matrix itself and a few rows, if so wished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from torch import Tensor

from .._transforms import below_autograd
from .bilinear import Bilinear
from .given import Given
from .parameters import Cotangents, Parameter
from .stationary import BoundStationary, Rows, Stationary, as_scale, as_weight, times

# A matrix of up to the first number of elements is worked through at once, a larger one in blocks of the second. On a
# CPU a block and what is made of it should stay in a core's cache from one elementwise pass to the next; on a GPU it
# should fill the device.
_ELEMENTS = {"cpu": (2**18, 2**16), "cuda": (2**24, 2**24)}
_LEAST_ROWS = 128


class Node(Enum):
    """What is made of the last two matrices, elementwise."""

    SUM = "sum"
    PRODUCT = "product"


#: A matrix; a scale, of the last matrix; or what is made of the last two.
Step = Stationary | Bilinear | Given | Parameter | Node

Expression = Sequence[Step]

#: A matrix, and a factor of it (a scalar, or ... x 1 x 1) or None.
Weighted = tuple[Tensor, Tensor | None]

#: What the way back needs of each step: see :meth:`KernelMatrix.evaluate`.
Record = list[Any]


def scaled(expression: list[Step], scale: Parameter) -> None:
    """Scale the last matrix of an expression.

    :param expression: The expression, which is changed.
    :param scale: The scale.
    """
    last = expression[-1]
    if type(last) is Stationary and last.scale is None:
        last.scale = scale
    else:
        expression.append(scale)


def of_rows(expression: Expression) -> Expression:
    """Return the covariance matrix of an expression's rows with themselves."""
    return [step.with_cols(step.rows) if isinstance(step, Stationary | Bilinear) else step for step in expression]


class KernelMatrix:
    """An expression and its tensors.

    :param expression: The expression.
    :param values: The tensors.
    :param again: Whether the inputs are likely to be the same another time, as those of a training are.
    """

    def __init__(self, expression: Expression, values: Sequence[Tensor], again: bool = False):
        self.expression, self.values, self.again = expression, values, again
        self._bound: dict[Stationary, BoundStationary] = {}

    def _bind(self, step: Stationary) -> BoundStationary:
        if step not in self._bound:
            # Columns of their own are those of a training.
            self._bound[step] = BoundStationary(step, self.values, self.again or step.rows != step.cols)
        return self._bound[step]

    @property
    def size(self) -> tuple[int, int]:
        """The number of rows and of columns."""
        return self.expression[0].size(self.values)

    def row_blocks(self, rows: Rows = None, cols: Rows = None) -> list[tuple[int, int]]:
        """Return the bounds of the blocks of rows in which the matrix, or a block of it, is worked through.

        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        (n, m), first = self.size, self.expression[0]
        first_row, n = (0, n) if rows is None else (rows.start, rows.stop)
        m = m if cols is None else cols.stop - cols.start
        if type(first) is Given and len(self.expression) == 1:
            return [(first_row, n)]  # it is there already
        device, batch = self.values[first.slots[0]].device, 1
        for slot in first.slots:
            if self.values[slot].dim() > 2:
                batch = max(batch, self.values[slot].shape[:-2].numel())
        whole, block = _ELEMENTS.get(device.type, _ELEMENTS["cpu"])
        if batch * (n - first_row) * m <= whole:
            return [(first_row, n)]
        size = max(_LEAST_ROWS, block // (batch * m))
        return [(start, min(start + size, n)) for start in range(first_row, n, size)]

    def evaluate(self, rows: Rows = None, cols: Rows = None, record: Record | None = None) -> Tensor:
        """Return a block of the matrix, in memory of its own.

        :param rows: The block's rows.
        :param cols: The block's columns.
        :param record: Where what :meth:`pull_back` would otherwise compute again is added, or None.
        """
        return _weigh(self._evaluate_weighted(rows, cols, record), overwrite=record is None)

    def _evaluate_weighted(self, rows: Rows, cols: Rows, record: Record | None) -> Weighted:
        stack: list[Weighted] = []
        for step in self.expression:
            kept: Any = None
            if type(step) is Stationary:
                kept = step.evaluate_few(self.values, self.again) if rows is cols is None else None
                if kept is None:
                    kept = self._bind(step).evaluate(rows, cols)
                stack.append((kept[0], kept[3]))
            elif type(step) is Bilinear:
                stack.append((step.evaluate(self.values, rows, cols), None))
            elif type(step) is Given:
                block = step.evaluate(self.values, rows, cols)
                stack.append((block.clone() if record is None else block, None))  # without a record it is overwritten
            elif type(step) is Parameter:
                kept = block, weight = stack.pop()
                stack.append((block, times(weight, as_weight(step.of(self.values)))))
            else:
                right, left = stack.pop(), stack.pop()
                if step is Node.PRODUCT:
                    kept = left, right
                    stack.append((left[0] * right[0], times(left[1], right[1])))
                else:
                    stack.append((_add_(_weigh(left, overwrite=record is None), right), None))
            if record is not None:
                record.append(kept)
        return stack.pop()

    def pull_back(
        self,
        cotangents: Cotangents,
        grad: Tensor,
        rows: Rows = None,
        cols: Rows = None,
        record: Record | None = None,
        symmetric: bool = False,
        overwrite: bool = True,
    ) -> None:
        """Take the cotangent of a block back to the tensors.

        :param cotangents: Where they are summed.
        :param grad: The block's cotangent G (... x N x M).
        :param rows: The block's rows.
        :param cols: The block's columns.
        :param record: What :meth:`evaluate` left of that block, or None.
        :param symmetric: Whether the block is all of a symmetric matrix, and G is symmetric.
        :param overwrite: Whether the record may be overwritten.
        """
        if record is None:
            record = []
            self._evaluate_weighted(rows, cols, record)
        if symmetric and not grad.is_contiguous():
            grad = grad.mT  # from LAPACK's order of the elements to that of the rest
        # On the way back: the cotangents of the matrices that the steps not yet gone through have made
        stack: list[Weighted] = [(grad, None)]
        for step, kept in zip(reversed(self.expression), reversed(record), strict=True):
            grad, weight = stack.pop()
            if type(step) is Stationary:
                step.pull_back(cotangents, grad, weight, kept, self._bind, rows, cols, symmetric, overwrite)
            elif type(step) is Bilinear:
                step.pull_back(cotangents, grad, weight, self.values, rows, cols)
            elif type(step) is Given:
                step.pull_back(cotangents, grad, weight, rows, cols)
            elif type(step) is Parameter:
                if cotangents.needed[step.slot]:
                    block, inner = kept
                    total, factor = (grad * block).sum((-2, -1)), times(weight, inner)
                    cotangents.add_of(step, total if factor is None else total * as_scale(factor))
                stack.append((grad, times(weight, as_weight(step.of(self.values)))))
            elif step is Node.SUM:
                stack += [(grad, weight), (grad, weight)]
            else:
                (left, left_weight), (right, right_weight) = kept
                stack.append((grad * right, times(weight, right_weight)))
                stack.append((grad * left, times(weight, left_weight)))

    def slopes(self, record: Record) -> list[tuple[BoundStationary, Tensor, float, Tensor | None]]:
        """Return, for each stationary kernel in it, the derivative of the matrix in that kernel's squared distances.

        It comes as the kernel, the derivative over c, c, and a factor of both (a scalar, or ... x 1 x 1) or None.

        :param record: What :meth:`evaluate` left of the whole matrix.
        """
        found: list[tuple[BoundStationary, Tensor, float, Tensor | None]] = []
        # What a part of the expression is multiplied by: a matrix, and a factor of that; None for ones
        stack: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
        for step, kept in zip(reversed(self.expression), reversed(record), strict=True):
            others, weight = stack.pop()
            if type(step) is Stationary:
                _, slope, c, own, _ = kept
                found.append((self._bind(step), slope if others is None else others * slope, c, times(weight, own)))
            elif type(step) is Parameter:
                stack.append((others, times(weight, as_weight(step.of(self.values)))))
            elif step is Node.SUM:
                stack += [(others, weight), (others, weight)]
            elif step is Node.PRODUCT:
                for other, factor in kept[::-1]:
                    stack.append((other if others is None else others * other, times(weight, factor)))
        return found


@below_autograd
def evaluate(matrix: KernelMatrix, rows: Rows = None, cols: Rows = None) -> Tensor:
    """Return a matrix, or a block of it, without a gradient.

    :param matrix: The matrix.
    :param rows: The block's rows.
    :param cols: The block's columns.
    """
    return _assemble(matrix, rows, cols)


def evaluate_upper(matrix: KernelMatrix) -> Tensor:
    """Return a square matrix. Elements left of the diagonal may hold anything."""
    return _assemble(matrix, upper=True)


def plain(expression: Expression, values: Sequence[Tensor]) -> Tensor:
    """Return the matrix of an expression by differentiable operations.

    :param expression: The expression.
    :param values: Its tensors.
    """
    of_leaf = {Stationary: Stationary.plain, Bilinear: Bilinear.evaluate, Given: Given.evaluate}
    return _fold(expression, values, of_leaf, as_weight)


def diagonal(expression: Expression, values: Sequence[Tensor]) -> Tensor:
    """Return the diagonal of the covariance of an expression's rows with themselves by differentiable operations.

    :param expression: The expression.
    :param values: Its tensors.
    :return: The diagonal (... x N, or ... x 1: stationary kernels have the same for all points).
    """
    of_leaf = {Stationary: Stationary.diagonal, Bilinear: Bilinear.diagonal}
    return _fold(expression, values, of_leaf, lambda scale: scale.unsqueeze(-1))


def _fold(
    expression: Expression,
    values: Sequence[Tensor],
    of_leaf: dict[type, Callable[[Any, Sequence[Tensor]], Tensor]],
    of_scale: Callable[[Tensor], Tensor],
) -> Tensor:
    stack: list[Tensor] = []
    for step in expression:
        if type(step) in of_leaf:
            res = of_leaf[type(step)](step, values)
            stack.append(res if step.scale is None else res * of_scale(step.scale.of(values)))
        elif type(step) is Parameter:
            stack.append(stack.pop() * of_scale(step.of(values)))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left + right if step is Node.SUM else left * right)
    return stack.pop()


def _assemble(matrix: KernelMatrix, rows: Rows = None, cols: Rows = None, upper: bool = False) -> Tensor:
    bounds = matrix.row_blocks(rows, cols)
    if len(bounds) == 1:
        return matrix.evaluate(rows, cols)
    whole, (first, _), (_, last) = None, bounds[0], bounds[-1]
    for start, stop in bounds:
        block = matrix.evaluate(slice(start, stop), slice(start, None) if upper else cols)
        if whole is None:
            whole = block.new_empty(*block.shape[:-2], last - first, block.size(-1))
        whole[..., start - first : stop - first, start if upper else 0 :] = block
    return whole


def _weigh(matrix: Weighted, overwrite: bool) -> Tensor:
    # In memory of its own, or that of the matrix, if the product fits in there
    block, weight = matrix
    if weight is None:
        return block if overwrite else block.clone()
    if overwrite and (weight.dim() == 0 or (block.shape[:-2] == weight.shape[:-2] and block.dtype is weight.dtype)):
        return block.mul_(weight)
    return block * weight


def _add_(left: Tensor, right: Weighted) -> Tensor:
    # In the memory of the left, if the sum fits in there
    block, weight = right
    block = block if weight is None else block * weight
    return left.add_(block) if left.shape == block.shape and left.dtype is block.dtype else left + block
