"""The leaf for stationary kernels: a block of the matrix, and the way back to lengthscale, shape, scale and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._shapes import matmul
from .._transforms import is_differentiated_by_transforms
from . import differences
from .parameters import Cotangents, Parameter
from .profiles import TINY, Profile

# Whether torch.cdist computes the differences themselves, or a matrix product where that is faster
_CDIST = {True: "donot_use_mm_for_euclid_dist", False: "use_mm_for_euclid_dist_if_necessary"}

Rows = slice | None  # None: all of them

#: A block of the matrix without its scale, the slope of the profile and its factor c; the scale as a factor of the
#: block (a scalar, or ... x 1 x 1) or None; and the squared differences of the inputs with the lengthscale and
#: lengthscale^-2, if the distances were taken from these.
Evaluated = tuple[Tensor, Tensor, float, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]


class Stationary:
    r"""
    :math:`s \, k(\Vert \mathbf z_i - \mathbf z'_j \Vert)` with :math:`\mathbf z = (\mathbf x - \mathbf c) / \ell`, in
    terms of tensors that are handed over when it is evaluated.

    Distances do not depend on the origin :math:`\mathbf c`, nor do gradients; their rounding does.

    :param profile: The kernel's :class:`~gpytorch.closed_form.profiles.Profile`.
    :param rows: Where the inputs of the rows stand among the tensors (... x N x D).
    :param cols: Where those of the columns stand (... x M x D); `rows` for the covariance of inputs with themselves.
    :param lengthscale: The lengthscale :math:`\ell` (... x 1 x D or ... x 1 x 1), if there is one.
    :param shape: The shape parameter (... x 1 x 1), if there is one.
    :param scale: The scale :math:`s` (...), if there is one.
    """

    __slots__ = ("cols", "lengthscale", "profile", "rows", "scale", "shape")

    def __init__(
        self,
        profile: Profile,
        rows: int,
        cols: int,
        lengthscale: Parameter | None = None,
        shape: Parameter | None = None,
        scale: Parameter | None = None,
    ):
        self.profile, self.rows, self.cols = profile, rows, cols
        self.lengthscale, self.shape, self.scale = lengthscale, shape, scale

    @property
    def slots(self) -> tuple[int, ...]:
        """Where the tensors stand that have a batch shape."""
        slots = self.rows, self.cols
        return slots if self.lengthscale is None else (*slots, self.lengthscale.slot)

    def size(self, values: Sequence[Tensor]) -> tuple[int, int]:
        """Return the number of rows and of columns.

        :param values: The tensors.
        """
        return values[self.rows].size(-2), values[self.cols].size(-2)

    def hold(self, values: list[Tensor], with_cols: bool) -> None:
        """Put the inputs and the parameters into memory of their own.

        :param values: The tensors.
        :param with_cols: Whether the inputs of the columns are held, too.
        """
        for slot in {self.rows, self.cols} if with_cols else (self.rows,):
            values[slot] = values[slot].clone()
        for parameter in (self.lengthscale, self.shape, self.scale):
            if parameter is not None:
                parameter.hold(values)

    def with_cols(self, cols: int) -> Stationary:
        """Return the same kernel between the inputs of the rows and others."""
        return Stationary(self.profile, self.rows, cols, self.lengthscale, self.shape, self.scale)

    def evaluate_few(self, values: Sequence[Tensor], again: bool) -> Evaluated | None:
        """Return the whole matrix, and what it is differentiated by, where the differences of the inputs are few.

        :param values: The tensors.
        :param again: Whether the inputs are likely to be the same another time.
        """
        x, lengthscale = values[self.rows], self.lengthscale
        few = differences.FEW_AGAIN["cuda" if x.is_cuda else "cpu"] if again else differences.FEW
        if self.rows != self.cols or lengthscale is None or x.requires_grad or x.numel() * x.size(-2) > few:
            return None
        lengthscale = lengthscale.of(values)
        if lengthscale.dtype is not x.dtype or lengthscale.dim() != x.dim() or lengthscale.size(-1) > x.size(-1):
            return None  # a subclass may make itself one of fewer dimensions; points may have none
        of = differences.remembered_squared_differences if again else differences.squared_differences
        squared, precision = of(x), lengthscale.pow(-2)
        if lengthscale.size(-1) < x.size(-1):
            squared = squared.sum(-2, keepdim=True)
        shape, of_distance = self.shape and self.shape.of(values), self.profile.of_distance
        distance = torch.matmul(precision if of_distance else precision * self.profile.unit, squared)
        distance = distance.view(*distance.shape[:-2], x.size(-2), x.size(-2))
        if of_distance:
            distance.clamp_min_(TINY**2).sqrt_()
        k, slope, c = self.profile.block(distance, shape)
        weight = self.scale and as_weight(self.scale.of(values))
        return k, slope, c, weight, (squared, precision, lengthscale)

    # With W = G o dK/dr^2, elementwise, and r^2_ij = |z_i - z'_j|^2, a product of W and one of its transpose give all:
    #   dL/dz_i  = 2 (sum_j W_ij) z_i  - 2 (W z')_i        dL/dx = (dL/dz) / lengthscale
    #   dL/dz'_j = 2 (sum_i W_ij) z'_j - 2 (W^T z)_j
    #   dL/dlengthscale_d = -(sum_i z_id dL/dz_id + sum_j z'_jd dL/dz'_jd) / lengthscale_d
    # Where the squared differences D_ijd of the inputs are few, r^2_ij = sum_d D_ijd / lengthscale_d^2, and
    #   dL/dlengthscale_d = -2 (sum_ij W_ij D_ijd) / lengthscale_d^3
    # The scale is a factor of all these, and its own is dL/ds = sum_ij G_ij k_ij.

    def pull_back(
        self,
        cotangents: Cotangents,
        grad: Tensor,
        outer: Tensor | None,
        evaluated: Evaluated,
        bind: Callable[[Stationary], BoundStationary],
        rows: Rows,
        cols: Rows,
        symmetric: bool,
        overwrite: bool,
    ) -> None:
        """
        Take the cotangent of a block back to the tensors.

        :param cotangents: Where they are summed.
        :param grad: The block's cotangent G (... x N x M).
        :param outer: What G is multiplied by (a scalar, or ... x 1 x 1), or None.
        :param evaluated: What the evaluation of the block returned.
        :param bind: Gives the kernel bound to its tensors.
        :param rows: The block's rows.
        :param cols: The block's columns.
        :param symmetric: Whether the block is all of a symmetric matrix, and G is symmetric.
        :param overwrite: Whether `evaluated` may be overwritten.
        """
        (k, slope, c, weight, few), needed = evaluated, cotangents.needed
        lengthscale, scale = self.lengthscale, self.scale
        if grad.dtype is not k.dtype:
            grad = grad.to(k.dtype)  # of a sum of kernels in two precisions
        if outer is not None:
            weight = times(outer, weight)
        if self.shape is not None and needed[self.shape.slot]:
            total = (self.profile.shape_slope(k, slope) * grad).sum((-2, -1), keepdim=True)
            cotangents.add_of(self.shape, total if weight is None else total * weight)
        reaches = needed[self.rows] or needed[self.cols] or (lengthscale is not None and needed[lengthscale.slot])
        scale_needed = scale is not None and needed[scale.slot]
        is_shared = reaches and slope is k
        if scale_needed and not is_shared:
            _add_scale(cotangents, scale, grad * k, outer)
        if not reaches:
            return
        w = slope.mul_(grad) if overwrite and slope.shape == grad.shape else slope * grad
        if scale_needed and is_shared:
            _add_scale(cotangents, scale, w, outer)
        if few is None:
            bind(self).pull_back_slope(cotangents, w, c, weight, rows, cols, symmetric)
        else:
            squared, precision, value = few
            total = differences.weighted_sums(w, squared)
            if c != -0.5:
                total.mul_(-2 * c)
            total.mul_(precision).div_(value)  # its cube might underflow
            cotangents.add_of(lengthscale, total if weight is None else total * weight)

    def diagonal(self, values: Sequence[Tensor]) -> Tensor:
        """Return the diagonal of the covariance of the rows with themselves, without its scale (1).

        :param values: The tensors.
        """
        return values[self.rows].new_ones(1)

    def plain(self, values: Sequence[Tensor]) -> Tensor:
        """Return the whole matrix without its scale by differentiable operations.

        :param values: The tensors.
        """
        bound = BoundStationary(self, values)
        z1, z2 = bound.scaled_inputs()
        if self.profile.of_distance and not bound.is_square:
            if not is_differentiated_by_transforms():
                return self.profile.plain(torch.cdist(z1, z2).clamp_min(TINY), bound.shape)
            r2 = (z1.unsqueeze(-2) - z2.unsqueeze(-3)).square().sum(-1)  # torch.cdist has no forward mode
        else:
            sq1 = z1.square().sum(-1, keepdim=True)
            sq2 = sq1 if bound.is_square else z2.square().sum(-1, keepdim=True)
            r2 = (sq1 + sq2.mT - 2 * (z1 @ z2.mT)).clamp_min(0)
        if bound.is_square:
            r2 = r2 * (1 - torch.eye(r2.size(-1), dtype=r2.dtype, device=r2.device))
        distance = r2.clamp_min(TINY**2).sqrt() if self.profile.of_distance else r2
        return self.profile.plain(distance, bound.shape)


class BoundStationary:
    """A :class:`Stationary` kernel and its tensors.

    :param kernel: The kernel.
    :param values: The tensors.
    :param again: Whether the inputs of the columns are likely to be the same another time.
    """

    def __init__(self, kernel: Stationary, values: Sequence[Tensor], again: bool = False):
        self.kernel, self.values, self.again = kernel, values, again
        self.is_square = kernel.rows == kernel.cols
        self.lengthscale = kernel.lengthscale and kernel.lengthscale.of(values)
        self.shape = kernel.shape and kernel.shape.of(values)
        self.weight = kernel.scale and as_weight(kernel.scale.of(values))
        self._z: tuple[Tensor, Tensor] | None = None
        self._extended: tuple[Tensor, Tensor] | None = None

    def scaled_inputs(self) -> tuple[Tensor, Tensor]:
        r"""Return the inputs of rows and columns over the lengthscale, less an origin."""
        if self._z is None:
            z1, z2 = self.values[self.kernel.rows], self.values[self.kernel.cols]
            if self.lengthscale is not None:
                if z1.dim() < z2.dim():
                    origin, z1 = differences.centered(z1)
                    z2 = z2 - origin
                else:
                    again = self.again and z2.numel() <= differences.MANY
                    origin, z2 = (differences.remembered_centered if again else differences.centered)(z2)
                    z1 = z2 if self.is_square else z1 - origin
                z1 = z1 / self.lengthscale
                z2 = z1 if self.is_square else z2 / self.lengthscale
            self._z = z1, z2
        return self._z

    def extended_inputs(self) -> tuple[Tensor, Tensor]:
        r"""
        Return :math:`(\mathbf z_i, -\tfrac12 \Vert \mathbf z_i \Vert^2, 1)` of the rows (... x N x (D + 2)), and
        :math:`(\mathbf z'_j, 1, -\tfrac12 \Vert \mathbf z'_j \Vert^2)` of the columns (... x M x (D + 2)): the products
        are :math:`-\tfrac12 \Vert \mathbf z_i - \mathbf z'_j \Vert^2`.
        """
        if self._extended is None:
            z1, z2 = self.scaled_inputs()
            half = z1.square().sum(-1, keepdim=True).mul_(-0.5)
            one = torch.ones_like(half)
            left = torch.cat((z1, half, one), -1)
            if self.is_square:
                right = torch.cat((z1, one, half), -1)
            else:
                again = self.again and z2.numel() <= differences.MANY
                right = (differences.remembered_extended if again else differences.extended)(z2)
            self._extended = left, right
        return self._extended

    def evaluate(self, rows: Rows, cols: Rows) -> Evaluated:
        """Return a block of the matrix, and what it is differentiated by.

        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        return *self.kernel.profile.block(self.distance(rows, cols), self.shape), self.weight, None

    def distance(self, rows: Rows, cols: Rows) -> Tensor:
        """Return a block of the distances, or of their squares in the profile's unit if it takes these.

        :param rows: The block's rows.
        :param cols: The block's columns.
        """
        z1, z2 = self.scaled_inputs()
        z1, z2 = _take(z1, rows), _take(z2, cols)
        of_distance, unit = self.kernel.profile.of_distance, self.kernel.profile.unit
        is_small = z1.numel() * z2.size(-2) <= differences.FEW
        if of_distance and (is_small or not self.is_square):
            return torch.cdist(z1, z2, compute_mode=_CDIST[is_small]).clamp_min_(TINY)
        if is_small:
            return (z1.unsqueeze(-2) - z2.unsqueeze(-3)).square_().sum(-1).mul_(unit)
        left, right = self.extended_inputs()
        left, right = _take(left, rows), _take(right, cols)
        res = _product(left, right.mT, -2 if of_distance else -2 * unit)
        if self.is_square:
            _diagonal_of(res, rows, cols).zero_()
        return res.clamp_min_(TINY**2).sqrt_() if of_distance else res.clamp_max_(0)

    def pull_back_slope(
        self,
        cotangents: Cotangents,
        w: Tensor,
        c: float,
        weight: Tensor | None,
        rows: Rows,
        cols: Rows,
        symmetric: bool,
    ) -> None:
        """
        Take W / c back to lengthscale and inputs.

        :param cotangents: Where they are summed.
        :param w: A block of W / c, which may be overwritten.
        :param c: The factor of the slope.
        :param weight: What W is multiplied by (a scalar, or ... x 1 x 1), or None.
        :param rows: The block's rows.
        :param cols: The block's columns.
        :param symmetric: Whether the block is all of a symmetric matrix, and W is symmetric.
        """
        kernel, needed, lengthscale = self.kernel, cotangents.needed, self.kernel.lengthscale
        lengthscale_needed = lengthscale is not None and needed[lengthscale.slot]
        if (
            lengthscale_needed
            and self.lengthscale.size(-1) == 1
            and (kernel.profile.is_kinked or w.dtype is not torch.float64)
        ):
            # sum_ij W_ij r^2_ij itself: taken apart over the inputs, it is a difference of larger sums.
            of_distance, distance = kernel.profile.of_distance, self.distance(rows, cols)
            total = _sum(w * (distance.square_() if of_distance else distance))[..., None, None]
            total.mul_(-2 * c if of_distance else -2 * c / kernel.profile.unit)
            total = total / self.lengthscale if weight is None else total * weight / self.lengthscale
            cotangents.add_of(lengthscale, total)
            lengthscale_needed = False
        if self.is_square:
            # Cancels in what follows, but its rounding, times z, would not.
            _diagonal_of(w, rows, cols).zero_()
        z1, z2 = self.scaled_inputs()
        z1, z2 = _take(z1, rows), _take(z2, cols)
        sides = [(kernel.rows, w, z1, z2, 4 * c, None)]
        if not symmetric:
            sides = [(kernel.rows, w, z1, z2, 2 * c, rows), (kernel.cols, w.mT, z2, z1, 2 * c, cols)]
        for slot, side, z, other, factor, part in sides:
            if needed[slot] or lengthscale_needed:
                # W z', as a product from the left: with its few columns on the right it takes up to four times as long.
                product = matmul(other.mT, side if symmetric else side.mT).mT
                minus_grad_z = product.addcmul_(side.sum(-1, keepdim=True), z, value=-1)
                if lengthscale_needed:
                    total = (minus_grad_z * z).sum(-2, keepdim=True).mul_(factor).div_(self.lengthscale)
                    cotangents.add_of(lengthscale, total if weight is None else total * weight)
                if needed[slot]:
                    grad_z = minus_grad_z.mul_(-factor if weight is None else weight * -factor)
                    cotangents.add(slot, grad_z if self.lengthscale is None else grad_z / self.lengthscale, part)


def as_weight(scale: Tensor) -> Tensor:
    """Return a scale (...) as a factor of matrices: a scalar, or ... x 1 x 1."""
    return scale[..., None, None] if scale.dim() else scale


def as_scale(weight: Tensor) -> Tensor:
    """Return what :func:`as_weight` was given."""
    return weight[..., 0, 0] if weight.dim() else weight


def times(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Return the product of two factors, of which None is one."""
    return right if left is None else left if right is None else left * right


def add_product_(target: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return `beta * target + alpha * left @ right`, in the memory of `target`."""
    if target.dim() == 2:
        return target.addmm_(left, right, beta=beta, alpha=alpha)
    if target.dim() == 3 and left.shape[:-2] == right.shape[:-2] == target.shape[:-2]:
        return target.baddbmm_(left, right, beta=beta, alpha=alpha)
    return (target if beta == 1 else target.mul_(beta)).add_(left @ right, alpha=alpha)


def _product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    if left.dim() > 3 or left.shape[:-2] != right.shape[:-2]:
        return matmul(left, right).mul_(alpha)
    return add_product_(left.new_empty(*left.shape[:-1], right.size(-1)), left, right, beta=0, alpha=alpha)


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[..., rows, :]


def _diagonal_of(block: Tensor, rows: Rows, cols: Rows) -> Tensor:
    # What a block of rows and columns holds of the whole matrix's diagonal
    return block.diagonal((0 if rows is None else rows.start) - (0 if cols is None else cols.start), -2, -1)


def _sum(block: Tensor) -> Tensor:
    return block.sum() if block.dim() == 2 else block.sum((-2, -1))


def _add_scale(cotangents: Cotangents, scale: Parameter, products: Tensor, outer: Tensor | None) -> None:
    # The products of G and k
    total = _sum(products)
    cotangents.add_of(scale, total if outer is None else total * as_scale(outer))
