"""How a hyperparameter comes from a raw parameter of the model, and where the cotangents of both are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._internals import softplus_backward


class Parameter:
    """A tensor among several: as it stands there, or the softplus of it, plus a lower bound.

    Taking the softplus here spares autograd its nodes.

    :param slot: Where it stands.
    :param is_raw: Whether the softplus of the value is meant.
    :param lower_bound: What is added to the softplus.
    """

    __slots__ = ("is_raw", "lower_bound", "slot")

    def __init__(self, slot: int, is_raw: bool = False, lower_bound: Tensor | None = None):
        self.slot, self.is_raw, self.lower_bound = slot, is_raw, lower_bound

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """Return the parameter, given the tensors."""
        value = values[self.slot]
        if not self.is_raw:
            return value
        value = softplus(value)
        return value if self.lower_bound is None else value + self.lower_bound

    def hold(self, values: list[Tensor], with_cols: bool = False) -> None:
        """Put the parameter itself among the tensors, in memory of its own.

        :param values: The tensors.
        :param with_cols: As for a matrix; a parameter has no columns.
        """
        values[self.slot] = self.of(values) if self.is_raw else values[self.slot].clone()
        self.is_raw, self.lower_bound = False, None


class Cotangents:
    """The sums of the cotangents that reach each of several tensors.

    :param values: The tensors.
    :param needed: For each, whether its cotangent is wanted.
    """

    def __init__(self, values: Sequence[Tensor], needed: Sequence[bool]):
        self.values = values
        self.needed = needed
        self.sums: list[Tensor | None] = [None] * len(values)

    def add_of(self, parameter: Parameter, cotangent: Tensor) -> None:
        """Add the cotangent of a parameter to those of the tensor that it is made of."""
        slot = parameter.slot
        value = self.values[slot]
        if cotangent.dtype is not value.dtype:
            cotangent = cotangent.to(value.dtype)
        if parameter.is_raw:
            cotangent = softplus_backward(cotangent, value, 1, 20)
        if self.sums[slot] is None and cotangent.shape == value.shape:
            self.sums[slot] = cotangent
        else:
            self.add(slot, cotangent)

    def add(self, slot: int, cotangent: Tensor, rows: slice | None = None) -> None:
        """Add `cotangent` to those of the tensor at `slot`, or of these of its rows."""
        value, before = self.values[slot], self.sums[slot]
        target = value if rows is None else value[..., rows, :]
        if cotangent.shape != target.shape:
            cotangent = cotangent.sum_to_size(target.shape)
        if rows is None:
            self.sums[slot] = cotangent if before is None else before.add_(cotangent)
            return
        if before is None:
            before = self.sums[slot] = torch.zeros_like(value)
        before[..., rows, :].add_(cotangent)
