r"""Covariance matrices of kernels whose gradient has a closed form, a block of rows at a time.

A kernel is written as an expression over a flat tuple of tensors: its scaled inputs, scales and shape parameters.
:class:`Stationary` is the leaf; :class:`Scaled`, :class:`Sum` and :class:`Product` compose. Each evaluates any block
of the matrix, and takes the cotangent of a block back to the tensors, so that neither direction ever needs more
memory than the matrix itself and a few rows. A small matrix is evaluated and differentiated at once, and what the one
computes is kept for the other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._transforms import UntransformedFunction, must_be_differentiable

# A matrix of up to the first number of elements is worked through at once, a larger one in blocks of the second. On a
# CPU a block and what is made of it should stay in a core's cache from one elementwise pass to the next; on a GPU it
# should fill the device.
_ELEMENTS = {"cpu": (2**18, 2**16), "cuda": (2**26, 2**26)}
_LEAST_ROWS = 128

# Up to this number of differences of coordinates it is less work to take them all than to set up a matrix product.
_FEW_DIFFERENCES = 2**13

Rows = slice | None  # None: all of them

softplus_backward = torch.ops.aten.softplus_backward.default


def row_blocks(shape: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
    """Return the bounds of the blocks of rows in which a matrix is worked through.

    :param shape: The matrix's shape (... x N x M).
    :param device: Where it lies.
    """
    n, elements = shape[-2], math.prod(shape)
    whole, block = _ELEMENTS.get(device.type, _ELEMENTS["cpu"])
    if elements <= whole:
        return [(0, n)]
    rows = max(_LEAST_ROWS, block * n // elements)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def _total(matrix: Tensor) -> Tensor:
    return matrix.sum() if matrix.dim() == 2 else matrix.sum((-2, -1))


def _are_few(x1: Tensor, x2: Tensor) -> bool:
    # Whether to take the differences of the coordinates
    return x1.numel() * x2.size(-2) <= _FEW_DIFFERENCES


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[..., rows, :]


class Cotangents:
    """The sums of the cotangents that reach each tensor of an expression.

    :param values: The expression's tensors.
    :param needed: For each, whether its cotangent is wanted.
    """

    def __init__(self, values: Sequence[Tensor], needed: Sequence[bool]):
        self.values = values
        self.needed = needed
        self.sums: list[Tensor | None] = [None] * len(values)

    def add_of(self, parameter: Parameter, cotangent: Tensor) -> None:
        """Add the cotangent of a parameter to those of the tensor that it is made of."""
        slot = parameter.slot
        if parameter.is_raw:
            cotangent = softplus_backward(cotangent, self.values[slot], 1, 20)
        if self.sums[slot] is None and cotangent.shape == self.values[slot].shape:
            self.sums[slot] = cotangent
        else:
            self.add(slot, cotangent)

    def add(self, slot: int, cotangent: Tensor, rows: Rows = None) -> None:
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


class Parameter:
    """A tensor among an expression's values: as it stands there, or the softplus of it, plus a lower bound.

    Taking the softplus here spares autograd its nodes.

    :param slot: Where it stands.
    :param is_raw: Whether the softplus of the value is meant.
    :param lower_bound: What is added to the softplus.
    """

    __slots__ = ("is_raw", "lower_bound", "slot")

    def __init__(self, slot: int, is_raw: bool = False, lower_bound: Tensor | None = None):
        self.slot, self.is_raw, self.lower_bound = slot, is_raw, lower_bound

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """Return the parameter, given the expression's tensors."""
        value = values[self.slot]
        if not self.is_raw:
            return value
        value = softplus(value)
        return value if self.lower_bound is None else value + self.lower_bound


# A profile gives, for a block of squared distances r2 (or of distances r) that it may overwrite:
#   k                 the kernel,
#   slope, c          dk / d(r2) = c * slope,
#   shape_slope       dk / d(shape parameter), where there is one.
# The formulas stand in the table of the module's documentation: README, "The mathematics".


def _rbf(r2: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    k = r2.mul_(-0.5).exp_()
    return k, k, -0.5


def _matern12(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    k = torch.neg(r).exp_()
    return k, (k / r).masked_fill_(r <= _TINY, 0.0), -0.5


def _matern32(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    u = r.mul_(math.sqrt(3))
    exp = torch.neg(u).exp_()
    return u.add_(1).mul_(exp), exp, -1.5


def _matern52(r: Tensor, shape: None) -> tuple[Tensor, Tensor, float]:
    u = r.mul_(math.sqrt(5))
    exp = torch.neg(u).exp_()
    slope = torch.addcmul(exp, u, exp)
    return torch.addcmul(slope, u.square_(), exp, value=1 / 3), slope, -5 / 6


def _rational_quadratic(r2: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, float]:
    base = r2.div_(2 * alpha).add_(1)
    slope = base.pow(-alpha - 1)
    return slope * base, slope, -0.5


def _rational_quadratic_shape_slope(r2: Tensor, alpha: Tensor) -> Tensor:
    # log k = -alpha log(base) with base = 1 + r2 / (2 alpha), so d log k / d alpha = (base - 1) / base - log(base)
    base = r2.div_(2 * alpha).add_(1)
    return base.pow(-alpha).mul_((base - 1).div_(base).sub_(base.log()))


# The same kernels in differentiable operations, for second derivatives and for transformed code.
def _plain_matern52(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(5)
    return (1 + u + u.square() / 3) * torch.exp(-u)


def _plain_matern32(r: Tensor, shape: None) -> Tensor:
    u = r * math.sqrt(3)
    return (1 + u) * torch.exp(-u)


# Whether torch.cdist computes the differences themselves, or a matrix product where that is faster
_CDIST = {True: "donot_use_mm_for_euclid_dist", False: "use_mm_for_euclid_dist_if_necessary"}
_TINY = 1e-15  # the least distance, as in the installed gpytorch.kernels.kernel.dist: it keeps the root differentiable


class Profile:
    """How a stationary kernel falls off with distance.

    :param block: The kernel and its slope on a block.
    :param plain: The kernel in differentiable operations.
    :param of_distance: Whether both take the distance rather than its square.
    :param shape_slope: The derivative in the shape parameter on a block of squared distances.
    :param is_kinked: Whether the slope in the squared distance grows without bound towards zero.
    """

    def __init__(
        self,
        block: Callable,
        plain: Callable,
        of_distance: bool = False,
        shape_slope: Callable | None = None,
        is_kinked: bool = False,
    ):
        self.is_kinked = is_kinked
        self.block = block
        self.plain = plain
        self.of_distance = of_distance
        self.shape_slope = shape_slope


RBF = Profile(_rbf, lambda r2, shape: torch.exp(-0.5 * r2))
MATERN = {
    0.5: Profile(_matern12, lambda r, shape: torch.exp(-r), of_distance=True, is_kinked=True),
    1.5: Profile(_matern32, _plain_matern32, of_distance=True),
    2.5: Profile(_matern52, _plain_matern52, of_distance=True),
}
RATIONAL_QUADRATIC = Profile(
    _rational_quadratic,
    lambda r2, alpha: (1 + r2 / (2 * alpha)).pow(-alpha),
    shape_slope=_rational_quadratic_shape_slope,
)


class Stationary:
    r"""
    :math:`k(\Vert \mathbf z_i - \mathbf z'_j \Vert)` with :math:`\mathbf z = (\mathbf x - \mathbf c) / \ell`.

    Distances do not depend on the origin :math:`\mathbf c`, nor do gradients; their rounding does.

    :param values: The expression's tensors.
    :param profile: The kernel's :class:`Profile`.
    :param x1: Where the inputs of the rows stand in `values` (... x N x D).
    :param x2: Where those of the columns stand (... x M x D); `x1` again for the covariance of inputs with themselves.
    :param lengthscale: The lengthscale :math:`\ell` (... x 1 x D or ... x 1 x 1), if there is one.
    :param shape: The shape parameter (... x 1 x 1), if there is one.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        profile: Profile,
        x1: int,
        x2: int,
        lengthscale: Parameter | None = None,
        shape: Parameter | None = None,
    ):
        self.values, self.profile = values, profile
        self.slots, self.parameters = (x1, x2), (lengthscale, shape)
        self.is_square, self.device = x1 == x2, values[x1].device
        self.z1: Tensor | None = None
        self.differences: Tensor | None = None
        self.kept: tuple[Tensor, Tensor, float] | None = None

    def _bind(self) -> None:
        # When the first element is asked for: the diagonal can do without.
        if self.z1 is not None:
            return
        lengthscale, shape = self.parameters
        self.lengthscale = lengthscale and lengthscale.of(self.values)
        self.shape_parameter = shape and shape.of(self.values)
        self.z1, self.z2 = (self.values[slot] for slot in self.slots)
        if self.lengthscale is not None:
            origin = (self.z1 if self.z1.dim() < self.z2.dim() else self.z2).detach().mean(-2, keepdim=True)
            self.z1 = (self.z1 - origin) / self.lengthscale
            self.z2 = self.z1 if self.is_square else (self.z2 - origin) / self.lengthscale
        self.squares: tuple[Tensor, Tensor] | None = None

    def _squares(self) -> tuple[Tensor, Tensor]:
        if self.squares is None:
            sq1 = self.z1.square().sum(-1, keepdim=True)
            self.squares = sq1, sq1 if self.is_square else self.z2.square().sum(-1, keepdim=True)
        return self.squares

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape (... x N x M)."""
        self._bind()
        return (*self.z1.shape[:-1], self.z2.size(-2))

    def _diagonal_of(self, block: Tensor, rows: Rows, cols: Rows) -> Tensor:
        # What a block of rows and columns holds of the whole matrix's diagonal
        return block.diagonal((0 if rows is None else rows.start) - (0 if cols is None else cols.start), -2, -1)

    def _distance(self, rows: Rows, cols: Rows) -> Tensor:
        self._bind()
        z1, z2 = _take(self.z1, rows), _take(self.z2, cols)
        of_distance = self.profile.of_distance
        is_small = _are_few(z1, z2)
        if of_distance and (is_small or not self.is_square):
            return torch.cdist(z1, z2, compute_mode=_CDIST[is_small]).clamp_min_(_TINY)
        if is_small:
            return (z1.unsqueeze(-2) - z2.unsqueeze(-3)).square_().sum(-1)
        sq1, sq2 = self._squares()
        sq1, sq2 = _take(sq1, rows), _take(sq2, cols).mT
        # The product is rounded before the squares are added, so that in one dimension equal points are at distance 0.
        r2 = torch.matmul(z1, z2.mT)
        r2 = r2.mul_(-2).add_(sq1).add_(sq2) if r2.dim() > 2 else torch.add(sq1, r2, alpha=-2, out=r2).add_(sq2)
        if self.is_square:
            self._diagonal_of(r2, rows, cols).zero_()
        return r2.clamp_min_(_TINY**2).sqrt_() if of_distance else r2.clamp_min_(0)

    def evaluate(self, rows: Rows = None, cols: Rows = None, weight: Tensor | None = None) -> Tensor:
        """Return a block of the matrix, in memory of its own.

        :param rows: The block's rows.
        :param cols: The block's columns.
        :param weight: What the block is multiplied by (a scalar, or ... x 1 x 1).
        """
        k, _, _ = self.profile.block(self._distance(rows, cols), self.shape_parameter)
        if weight is None:
            return k
        fits = weight.dim() == 0 or k.shape[:-2] == weight.shape[:-2]
        return k.mul_(weight) if fits else k * weight

    def evaluate_at_once(self, weight: Tensor | None = None) -> Tensor:
        """Return the whole matrix, in memory of its own, and keep what the pull-back would compute again.

        :param weight: What the matrix is multiplied by (a scalar, or ... x 1 x 1).
        """
        self.kept = self.profile.block(self._distance_at_once(), self.shape_parameter)
        k = self.kept[0]
        return k.clone() if weight is None else k * weight

    def _distance_at_once(self) -> Tensor:
        x, lengthscale = self.values[self.slots[0]], self.parameters[0]
        is_bound = self.z1 is not None  # to be evaluated as it would be in blocks
        if is_bound or not self.is_square or lengthscale is None or x.requires_grad or not _are_few(x, x):
            return self._distance(None, None)
        if self.differences is None:
            shape = self.parameters[1]
            self.lengthscale, self.shape_parameter = lengthscale.of(self.values), shape and shape.of(self.values)
            if self.lengthscale.dtype != x.dtype or self.lengthscale.dim() != x.dim():
                return self._distance(
                    None, None
                )  # a lengthscale that a subclass makes itself may have fewer dimensions
            self.precision = self.lengthscale.square().reciprocal_()
            differences = (x.unsqueeze(-2) - x.unsqueeze(-3)).square_().flatten(-3, -2)
            is_shared = self.lengthscale.size(-1) < x.size(-1)
            self.differences = differences.sum(-1, keepdim=True) if is_shared else differences
        r2 = torch.matmul(self.differences, self.precision.mT)
        r2 = r2.view(*r2.shape[:-2], x.size(-2), x.size(-2))
        return r2.clamp_min_(_TINY**2).sqrt_() if self.profile.of_distance else r2

    # With W = G o dK/dr^2, elementwise, and r^2_ij = |z_i - z'_j|^2, a product of W and one of its transpose give all:
    #   dL/dz_i  = 2 (sum_j W_ij) z_i  - 2 (W z')_i        dL/dx = (dL/dz) / lengthscale
    #   dL/dz'_j = 2 (sum_i W_ij) z'_j - 2 (W^T z)_j
    #   dL/dlengthscale_d = -(sum_i z_id dL/dz_id + sum_j z'_jd dL/dz'_jd) / lengthscale_d
    # Where the squared differences D_ijd of the inputs are few, r^2_ij = sum_d D_ijd / lengthscale_d^2, and
    #   dL/dlengthscale_d = -2 (sum_ij W_ij D_ijd) / lengthscale_d^3

    def pull_back(
        self,
        cotangents: Cotangents,
        grad: Tensor,
        rows: Rows = None,
        cols: Rows = None,
        weight: Tensor | None = None,
        inner: bool = False,
    ) -> Tensor | None:
        r"""
        Take the cotangent of a block back to the tensors.

        :param cotangents: Where they are summed.
        :param grad: The block's cotangent G (... x N x M).
        :param rows: The block's rows.
        :param cols: The block's columns.
        :param weight: What the block is multiplied by (a scalar, or ... x 1 x 1).
        :param inner: Whether to return :math:`\sum_{ij} G_{ij} K_{ij}`, K without the weight.
        """
        if self.parameters[1] is not None:
            self._pull_back_shape(cotangents, grad, self._distance(rows, cols), weight)
        self._bind()
        is_kept = rows is None and cols is None and self.kept is not None
        k, slope, c = self.kept if is_kept else self.profile.block(self._distance(rows, cols), self.shape_parameter)
        if not self._reaches(cotangents):
            return _total(grad * k) if inner else None
        w = grad * slope
        res = None if not inner else _total(w if slope is k else grad * k)
        self._pull_back_slope(cotangents, w, c, rows, cols, weight, symmetric=False)
        return res

    def pull_back_at_once(
        self, cotangents: Cotangents, grad: Tensor, weight: Tensor | None = None, inner: bool = False
    ) -> Tensor | None:
        """Take the cotangent of a square matrix that :meth:`evaluate_at_once` returned back to the tensors. Once.

        :param cotangents: Where they are summed.
        :param grad: The matrix's cotangent (... x N x N), symmetric.
        :param weight: See :meth:`pull_back`.
        :param inner: See :meth:`pull_back`.
        """
        grad = grad if grad.is_contiguous() else grad.mT  # from LAPACK's order of the elements to that of the rest
        if self.parameters[1] is not None:
            self._pull_back_shape(cotangents, grad, self._distance_at_once(), weight)
        (k, slope, c), lengthscale, differences = self.kept, self.parameters[0], self.differences
        if not (self._reaches(cotangents) if differences is None else cotangents.needed[lengthscale.slot]):
            return _total(grad * k) if inner else None
        res = _total(grad * k) if inner and slope is not k else None
        w = slope.mul_(grad)
        if inner and slope is k:
            res = _total(w)
        if differences is None:
            self._pull_back_slope(cotangents, w, c, None, None, weight, symmetric=True)
        else:
            total = torch.matmul(w.view(*w.shape[:-2], 1, -1), differences)
            total = total.mul_(-2 * c).mul_(self.precision).div_(self.lengthscale)  # its cube might underflow
            cotangents.add_of(lengthscale, total if weight is None else total.mul_(weight))
        return res

    def _reaches(self, cotangents: Cotangents) -> bool:
        needed, (slot1, slot2), (lengthscale, _) = cotangents.needed, self.slots, self.parameters
        return needed[slot1] or needed[slot2] or (lengthscale is not None and needed[lengthscale.slot])

    def _pull_back_shape(self, cotangents: Cotangents, grad: Tensor, distance: Tensor, weight: Tensor | None) -> None:
        shape = self.parameters[1]
        if cotangents.needed[shape.slot]:
            slope = self.profile.shape_slope(distance, self.shape_parameter) * grad
            slope = slope if weight is None else slope * weight
            cotangents.add_of(shape, slope.sum((-2, -1), keepdim=True))

    def _pull_back_slope(
        self,
        cotangents: Cotangents,
        w: Tensor,
        c: float,
        rows: Rows,
        cols: Rows,
        weight: Tensor | None,
        symmetric: bool,
    ) -> None:
        # W / c is given, and may be overwritten.
        needed, (slot1, slot2), lengthscale = cotangents.needed, self.slots, self.parameters[0]
        lengthscale_needed = lengthscale is not None and needed[lengthscale.slot]
        if lengthscale_needed and self.profile.is_kinked and self.lengthscale.size(-1) == 1:
            # sum_ij W_ij r^2_ij itself: taken apart over the inputs, the large weights of near points would cancel.
            total = (w * self._distance(rows, cols).square_()).sum((-2, -1), keepdim=True).mul_(-2 * c)
            total = total / self.lengthscale if weight is None else total * weight / self.lengthscale
            cotangents.add_of(lengthscale, total)
            lengthscale_needed = False
        if self.is_square:
            # Cancels in what follows, but its rounding, times z, would not.
            self._diagonal_of(w, rows, cols).zero_()
        z1, z2 = _take(self.z1, rows), _take(self.z2, cols)
        sides = [(slot1, w, z1, z2, 4 * c, None)]
        if not symmetric:
            sides = [(slot1, w, z1, z2, 2 * c, rows), (slot2, w.mT, z2, z1, 2 * c, cols)]
        for slot, side, z, other, factor, part in sides:
            if needed[slot] or lengthscale_needed:
                sums = side.sum(-1, keepdim=True)
                minus_grad_z = add_product_(sums * z, side, other, beta=-factor, alpha=factor)
                if lengthscale_needed:
                    total = (minus_grad_z * z).sum(-2, keepdim=True).div_(self.lengthscale)
                    cotangents.add_of(lengthscale, total if weight is None else total * weight)
                if needed[slot]:
                    grad_z = minus_grad_z.neg_() if weight is None else minus_grad_z.mul_(-weight)
                    cotangents.add(slot, grad_z if self.lengthscale is None else grad_z / self.lengthscale, part)

    def diagonal(self) -> Tensor:
        """Return the diagonal of the covariance of inputs with themselves by differentiable operations (... x 1)."""
        return self.values[self.slots[0]].new_ones(1)

    def plain(self) -> Tensor:
        """Return the whole matrix by differentiable operations."""
        self._bind()
        if self.profile.of_distance and not self.is_square:
            return self.profile.plain(torch.cdist(self.z1, self.z2).clamp_min(_TINY), self.shape_parameter)
        sq1, sq2 = self._squares()
        r2 = (sq1 + sq2.mT - 2 * (self.z1 @ self.z2.mT)).clamp_min(0)
        if self.is_square:
            r2 = r2 * (1 - torch.eye(r2.size(-1), dtype=r2.dtype, device=r2.device))
        distance = r2.clamp_min(_TINY**2).sqrt() if self.profile.of_distance else r2
        return self.profile.plain(distance, self.shape_parameter)


class Scaled:
    """A matrix times a scale.

    :param values: The expression's tensors.
    :param child: The matrix's expression.
    :param scale: The scale (...).
    :param square: See :data:`Expression`.
    """

    def __init__(self, values: Sequence[Tensor], child: Expression, scale: Parameter, square: bool = False):
        self.child, self.parameter, self.scale = child(values, square), scale, scale.of(values)
        self.weight = self.scale if self.scale.dim() == 0 else self.scale[..., None, None]
        self.device = self.child.device

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`Stationary.shape`."""
        return self.child.shape

    def evaluate(self, rows: Rows = None, cols: Rows = None, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate`."""
        return self.child.evaluate(rows, cols, self.weight if weight is None else weight * self.weight)

    def evaluate_at_once(self, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate_at_once`."""
        return self.child.evaluate_at_once(self.weight if weight is None else weight * self.weight)

    def pull_back(self, cotangents, grad, rows=None, cols=None, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back`. The cotangent of the scale is sum_ij G_ij K_ij over the unscaled matrix."""
        child_weight = self.weight if weight is None else weight * self.weight
        inner_needed = inner or cotangents.needed[self.parameter.slot]
        total = self.child.pull_back(cotangents, grad, rows, cols, child_weight, inner_needed)
        return self._pull_back_scale(cotangents, total, weight, inner)

    def pull_back_at_once(self, cotangents, grad, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back_at_once` and :meth:`pull_back`."""
        child_weight = self.weight if weight is None else weight * self.weight
        inner_needed = inner or cotangents.needed[self.parameter.slot]
        total = self.child.pull_back_at_once(cotangents, grad, child_weight, inner_needed)
        return self._pull_back_scale(cotangents, total, weight, inner)

    def _pull_back_scale(
        self, cotangents: Cotangents, total: Tensor | None, weight: Tensor | None, inner: bool
    ) -> Tensor | None:
        if cotangents.needed[self.parameter.slot]:
            outer = None if weight is None else weight if weight.dim() == 0 else weight[..., 0, 0]
            cotangents.add_of(self.parameter, total if outer is None else total * outer)
        return total * self.scale if inner else None

    def diagonal(self) -> Tensor:
        """See :meth:`Stationary.diagonal`."""
        return self.child.diagonal() * self.scale.unsqueeze(-1)

    def plain(self) -> Tensor:
        """See :meth:`Stationary.plain`."""
        return self.child.plain() * self.weight


class _Composite:
    """What is made of several matrices of one shape.

    :param values: The expression's tensors.
    :param children: The matrices' expressions.
    :param square: See :data:`Expression`.
    """

    def __init__(self, values: Sequence[Tensor], children: Sequence[Expression], square: bool = False):
        self.children = [child(values, square) for child in children]
        self.device = self.children[0].device

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`Stationary.shape`."""
        return self.children[0].shape


class Sum(_Composite):
    """A sum of matrices. See :class:`_Composite`."""

    def evaluate(self, rows: Rows = None, cols: Rows = None, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate`."""
        return reduce(operator.add, (child.evaluate(rows, cols, weight) for child in self.children))

    def evaluate_at_once(self, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate_at_once`."""
        return reduce(_plus_, (child.evaluate_at_once(weight) for child in self.children))

    def pull_back(self, cotangents, grad, rows=None, cols=None, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back`."""
        totals = [child.pull_back(cotangents, grad, rows, cols, weight, inner) for child in self.children]
        return sum(totals) if inner else None

    def pull_back_at_once(self, cotangents, grad, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back_at_once`."""
        totals = [child.pull_back_at_once(cotangents, grad, weight, inner) for child in self.children]
        return sum(totals) if inner else None

    def diagonal(self) -> Tensor:
        """See :meth:`Stationary.diagonal`."""
        return sum(child.diagonal() for child in self.children)

    def plain(self) -> Tensor:
        """See :meth:`Stationary.plain`."""
        return sum(child.plain() for child in self.children)


def _plus_(left: Tensor, right: Tensor) -> Tensor:
    # In the memory of the left, if the sum fits in there
    return left.add_(right) if left.shape == right.shape and left.dtype == right.dtype else left + right


class Product(_Composite):
    """An elementwise product of matrices. See :class:`_Composite`."""

    kept: list[Tensor] | None = None

    def evaluate(self, rows: Rows = None, cols: Rows = None, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate`."""
        first, *others = self.children
        blocks = (child.evaluate(rows, cols) for child in others)
        return reduce(operator.mul, blocks, first.evaluate(rows, cols, weight))

    def evaluate_at_once(self, weight: Tensor | None = None) -> Tensor:
        """See :meth:`Stationary.evaluate_at_once`."""
        self.kept = [child.evaluate_at_once() for child in self.children]
        res = reduce(operator.mul, self.kept)
        return res if weight is None else res * weight

    def pull_back(self, cotangents, grad, rows=None, cols=None, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back`. Each factor's cotangent is G times the product of the others."""
        is_kept = rows is None and cols is None and self.kept is not None
        blocks = self.kept if is_kept else [child.evaluate(rows, cols) for child in self.children]
        totals = [
            child.pull_back(cotangents, own, rows, cols, weight, inner)
            for child, own in zip(self.children, _times_others(grad, blocks), strict=True)
        ]
        return totals[0]  # each factor times the product of the others is the whole

    def pull_back_at_once(self, cotangents, grad, weight=None, inner=False) -> Tensor | None:
        """See :meth:`Stationary.pull_back_at_once` and :meth:`pull_back`."""
        totals = [
            child.pull_back_at_once(cotangents, own, weight, inner)
            for child, own in zip(self.children, _times_others(grad, self.kept), strict=True)
        ]
        return totals[0]

    def diagonal(self) -> Tensor:
        """See :meth:`Stationary.diagonal`."""
        return reduce(operator.mul, (child.diagonal() for child in self.children))

    def plain(self) -> Tensor:
        """See :meth:`Stationary.plain`."""
        return reduce(operator.mul, (child.plain() for child in self.children))


def _times_others(grad: Tensor, blocks: list[Tensor]) -> Iterator[Tensor]:
    for i in range(len(blocks)):
        yield reduce(operator.mul, blocks[:i] + blocks[i + 1 :], grad)


Matrix = Stationary | Scaled | Sum | Product

#: Binds an expression to its tensors; with a second argument of True, as the covariance of its rows with themselves.
Expression = Callable[..., Matrix]


class KernelCovariance(UntransformedFunction):
    r"""
    The covariance matrix :math:`\mathbf K` of an expression's inputs, as a tensor.

    The backward evaluates a large matrix again, a block of rows at a time, rather than keep it, and differentiates in
    those tensors alone that the backward as a whole goes on to: an acquisition function's in the test points, not in
    the hyperparameters. ``KernelCovariance.apply(expression, *values)``; no value that requires a gradient may be a
    leaf.
    """

    @staticmethod
    def forward(ctx, expression: Expression, *values: Tensor) -> Tensor:
        r"""
        :param expression: The covariance matrix in terms of `values`.
        :param values: The tensors it is made of.
        :return: :math:`\mathbf K` (... x N x M).
        """
        ctx.save_for_backward(*values)
        ctx.expression, ctx.matrix = expression, None
        matrix = expression(values)
        if len(row_blocks(matrix.shape, matrix.device)) > 1:  # asking for the shape has bound it
            return evaluate(matrix)
        ctx.matrix = matrix
        return matrix.evaluate_at_once()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if must_be_differentiable():
            values = aliases(values)
            return None, *grad_of_plain(ctx.expression(values).plain(), values, needed, grad)
        needed = [
            need and torch._C._will_engine_execute_node(node)
            for need, (node, _) in zip(needed, ctx.next_functions, strict=True)
        ]
        cotangents = Cotangents(values, needed)
        if ctx.matrix is not None:
            ctx.matrix.pull_back(cotangents, grad)
            if not is_graph_kept():
                ctx.matrix = None
        else:
            matrix = ctx.expression(values)
            for start, stop in row_blocks(grad.shape, grad.device):
                rows = slice(start, stop)
                matrix.pull_back(cotangents, grad[..., rows, :], rows)
        return (None, *cotangents.sums)


def evaluate(matrix: Matrix) -> Tensor:
    """Return the whole of a bound expression's matrix."""
    return _assemble(matrix, upper=False)


def evaluate_upper(matrix: Matrix) -> Tensor:
    """Return a bound expression's square matrix. Elements left of the diagonal may hold anything."""
    return _assemble(matrix, upper=True)


def _assemble(matrix: Matrix, upper: bool) -> Tensor:
    bounds = row_blocks(matrix.shape, matrix.device)
    if len(bounds) == 1:
        return matrix.evaluate()
    whole = None
    for start, stop in bounds:
        rows, cols = slice(start, stop), slice(start, None) if upper else None
        block = matrix.evaluate(rows, cols)
        if whole is None:
            whole = block.new_empty(*block.shape[:-2], *matrix.shape[-2:])
        whole[..., rows, cols or slice(None)] = block
    return whole


def is_graph_kept() -> bool:
    """Return whether another backward may follow the one that asks."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def add_product_(target: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return `beta * target + alpha * left @ right`, in the memory of `target`."""
    if target.dim() == 2:
        return target.addmm_(left, right, beta=beta, alpha=alpha)
    if target.dim() == 3 and left.shape[:-2] == right.shape[:-2] == target.shape[:-2]:
        return target.baddbmm_(left, right, beta=beta, alpha=alpha)
    return (target if beta == 1 else target.mul_(beta)).add_(left @ right, alpha=alpha)


def aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return views, so that the derivative in one does not count what the same tensor does in another place."""
    return [tensor if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def grad_of_plain(
    output: Tensor | tuple[Tensor, ...],
    values: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor | tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Differentiate `output`, made by differentiable operations from `values`, so that the result can be again."""
    wanted = [value for value, need in zip(values, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needed]
