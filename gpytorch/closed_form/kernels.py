"""Kernels as expressions that are evaluated and differentiated in closed form.

Three questions, in this order: has any part of the kernel a closed form, and would upstream factorize the whole as a
dense matrix (:func:`is_dense_in_parts`, of the modules alone); what is the expression (:func:`write_kernel`, of the
inputs' shapes, too); and, for parts without a closed form, what is their matrix, which their own `forward` evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
from linear_operator.operators import DiagLinearOperator, KernelLinearOperator, LinearOperator, ZeroLinearOperator
from torch import Tensor

from .. import _upstream, settings
from .._shapes import broadcast_shapes
from ..constraints.unconstrained import Unconstrained, unconstrained
from ..kernels.constant_kernel import ConstantKernel
from ..kernels.cosine_kernel import CosineKernel
from ..kernels.index_kernel import IndexKernel
from ..kernels.kernel import AdditiveKernel, Kernel, ProductKernel
from ..kernels.linear_kernel import LinearKernel
from ..kernels.matern_kernel import MaternKernel
from ..kernels.periodic_kernel import PeriodicKernel
from ..kernels.rbf_kernel import RBFKernel
from ..kernels.rq_kernel import RQKernel
from ..kernels.scale_kernel import ScaleKernel
from ..lookup import child
from .bilinear import Bilinear, indicators
from .given import Given
from .matrix import Node, Step, scaled
from .parameters import Parameter
from .profiles import COSINE, MATERN, RATIONAL_QUADRATIC, RBF, Profile
from .stationary import Stationary


class Terms:
    """An expression and the tensors that it is made of.

    :param evaluates: Whether parts of a kernel that have no closed form are evaluated and given as tensors.
    :ivar expression: The expression.
    :ivar values: The tensors.
    :ivar batch_shapes: Their batch shapes.
    :ivar row_slots: Where the inputs of the rows stand among them.
    :ivar matrix_shape: The number of rows and of columns.
    """

    __slots__ = ("batch_shapes", "evaluates", "expression", "matrix_shape", "row_slots", "values")

    def __init__(self, evaluates: bool = False) -> None:
        self.evaluates = evaluates
        self.expression: list[Step] = []
        self.values: list[Tensor] = []
        self.batch_shapes: set[torch.Size] = set()
        self.row_slots: list[int] = []

    def add(self, tensor: Tensor, event_dim: int) -> int:
        """Add a tensor, and return where it stands.

        :param tensor: The tensor.
        :param event_dim: How many of its dimensions, at the end, are not batch dimensions.
        """
        self.values.append(tensor)
        self.batch_shapes.add(tensor.shape[: tensor.dim() - event_dim])
        return len(self.values) - 1

    def add_parameter(self, parameter: Unconstrained, event_dim: int) -> Parameter:
        """Add a parameter, and return how it comes from the values.

        :param parameter: The parameter, before its constraint is applied or after.
        :param event_dim: How many of its dimensions, at the end, are not batch dimensions.
        """
        tensor, is_raw, lower_bound = parameter
        return Parameter(self.add(tensor, event_dim), is_raw, lower_bound)

    @property
    def batch_shape(self) -> torch.Size:
        """The covariance matrix's batch shape."""
        shapes = self.batch_shapes
        return next(iter(shapes)) if len(shapes) == 1 else broadcast_shapes(*shapes)

    def add_inputs(self, x1: Tensor, x2: Tensor) -> tuple[int, int]:
        """Add the inputs of rows and columns, once if they are the same, and return where they stand."""
        self.matrix_shape = (x1.size(-2), x2.size(-2))
        slot = self.add(x1, 2)
        self.row_slots.append(slot)
        return slot, slot if x1 is x2 else self.add(x2, 2)

    def at_rows(self, rows: Tensor) -> Terms:
        """Return the same with some of the rows.

        :param rows: Their numbers.
        """
        terms = Terms()
        terms.expression, terms.batch_shapes, terms.row_slots = self.expression, self.batch_shapes, self.row_slots
        terms.values = [
            value.index_select(-2, rows) if slot in self.row_slots else value for slot, value in enumerate(self.values)
        ]
        terms.matrix_shape = (len(rows), self.matrix_shape[1])
        return terms

    def add_given(self, matrix: Tensor) -> None:
        """Add a matrix that is a tensor already (... x N x M)."""
        self.matrix_shape = tuple(matrix.shape[-2:])
        self.expression.append(Given(self.add(matrix, 2)))

    def forget(self, num_steps: int, num_values: int, num_row_slots: int, batch_shapes: set[torch.Size]) -> None:
        """Go back to so many steps and tensors, with these batch shapes."""
        del self.expression[num_steps:], self.values[num_values:], self.row_slots[num_row_slots:]
        self.batch_shapes = batch_shapes

    def hold(self, with_cols: bool) -> None:
        """Hold the tensors as they are, for what is read after they are written to.

        :param with_cols: Whether the inputs of the columns are held, too.
        """
        for step in self.expression:
            if not isinstance(step, Node):
                step.hold(self.values, with_cols)


def is_dense_in_parts(kernel: Kernel, called: bool = True) -> bool | None:
    """Return whether upstream would factorize the covariance of a kernel as a dense matrix, going by those parts of it
    that have a closed form: a sum always, a product if one of its factors is dense.

    :param kernel: The kernel.
    :param called: Whether upstream would go through the kernel's `__call__`.
    :return: None if no part has a closed form.
    """
    forward = _forward_of(kernel, called)
    if forward is ScaleKernel.forward:
        return is_dense_in_parts(child(kernel, "base_kernel", ScaleKernel), called=False)
    if forward is AdditiveKernel.forward or forward is ProductKernel.forward:
        parts = [is_dense_in_parts(part) for part in kernel.kernels]
        if all(part is None for part in parts):
            return None
        return any(parts) or (forward is AdditiveKernel.forward and len(parts) > 1)
    return None if forward is None else forward not in _STRUCTURED


def write_kernel(kernel: Kernel, x1: Tensor, x2: Tensor, terms: Terms, called: bool = True) -> bool:
    """Write the covariance of a kernel as an expression, if the kernel is made of such as have one.

    A kernel is known by its methods: a subclass that overrides one which upstream would call has no closed form here.

    :param kernel: The kernel.
    :param x1: The inputs of the rows, with the kernel's active dimensions selected (... x N x D).
    :param x2: The inputs of the columns (... x M x D).
    :param terms: Where the expression and its tensors are added.
    :param called: Whether upstream would go through the kernel's `__call__`.
    :return: Whether it is written. If not, `terms` may have grown.
    """
    forward = _forward_of(kernel, called)
    if forward is None:
        return False
    if kernel.ard_num_dims is not None and kernel.ard_num_dims != x1.size(-1):
        return False  # upstream says what is wrong
    return _WRITERS[forward](kernel, x1, x2, terms)


def _forward_of(kernel: Kernel, called: bool) -> Callable | None:
    # The kernel's `forward`, if it has a closed form and that is all that upstream would call. A method's function,
    # asked for in the way that torch.compile can trace.
    forward = kernel.forward.__func__ if isinstance(kernel.forward, MethodType) else None
    if forward not in _WRITERS or type(kernel).covar_dist is not Kernel.covar_dist:
        return None
    return None if called and type(kernel).__call__ is not Kernel.__call__ else forward


def _write_given(kernel: Kernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    # The matrix of a part, as upstream evaluates it where it is not to be lazy. Of a sum or product with a dense matrix
    # upstream makes a dense one, whatever the other is, but not of those left out here.
    if not terms.evaluates:
        return False
    with settings.lazily_evaluate_kernels(False):
        covar = kernel(x1, x2)
    covar = covar.evaluate_kernel() if isinstance(covar, LinearOperator) else covar
    if isinstance(covar, DiagLinearOperator | ZeroLinearOperator) or is_never_held(covar):
        return False
    if covar.shape[-2:] != (x1.size(-2), x2.size(-2)):
        return False
    terms.add_given(covar.to_dense())
    return True


def is_never_held(covar: LinearOperator) -> bool:
    """Return whether a covariance is made of one whose matrix is never held as a whole, but computed in pieces."""
    return isinstance(covar, KernelLinearOperator) or any(
        is_never_held(part) for part in covar._args if isinstance(part, LinearOperator)
    )


def _stationary(
    profile: Profile, kernel: Kernel, x1: Tensor, x2: Tensor, terms: Terms, alpha: Tensor | None = None
) -> bool:
    return _write_stationary(profile, unconstrained(kernel, "lengthscale", Kernel), x1, x2, terms, alpha)


def _write_stationary(
    profile: Profile, own: Unconstrained, x1: Tensor, x2: Tensor, terms: Terms, alpha: Tensor | None = None
) -> bool:
    if own[0].dim() > 1 and own[0].size(-2) != 1:
        return False  # a lengthscale of a user's own, for each point another
    rows, cols = terms.add_inputs(x1, x2)
    lengthscale = terms.add_parameter(own, 2)
    shape = None if alpha is None else terms.add_parameter((alpha, False, None), 2)
    terms.expression.append(Stationary(profile, rows, cols, lengthscale, shape))
    return True


def _matern(kernel: MaternKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    return _stationary(MATERN[kernel.nu], kernel, x1, x2, terms)


def _cosine(kernel: CosineKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    return _write_stationary(COSINE, unconstrained(kernel, "period_length", CosineKernel), x1, x2, terms)


def _rational_quadratic(kernel: RQKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    return _stationary(RATIONAL_QUADRATIC, kernel, x1, x2, terms, kernel.alpha.unsqueeze(-1))


def _periodic(kernel: PeriodicKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    # 4 sin^2(pi (x - x') / p) is the squared distance of the points that x and x' have at the angles 2 pi x / p on the
    # unit circle: the periodic kernel is the RBF kernel of these points, over the root of its lengthscale.
    frequency = 2 * math.pi / kernel.period_length
    radius = kernel.lengthscale.rsqrt()

    def on_circles(x: Tensor) -> Tensor:
        angle = x * frequency
        return torch.cat([angle.cos() * radius, angle.sin() * radius], dim=-1)

    points1 = on_circles(x1)
    rows, cols = terms.add_inputs(points1, points1 if x1 is x2 else on_circles(x2))
    terms.expression.append(Stationary(RBF, rows, cols))
    return True


def _index(kernel: IndexKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    if x1.size(-1) != 1 or x2.size(-1) != 1:
        return False  # upstream adds up the covariances of several labels
    covar = kernel._eval_covar_matrix()
    rows1 = indicators(x1.squeeze(-1).long(), covar)
    rows, cols = terms.add_inputs(rows1, rows1 if x1 is x2 else indicators(x2.squeeze(-1).long(), covar))
    terms.expression.append(Bilinear(rows, cols, terms.add_parameter((covar, False, None), 2)))
    return True


def _scale(kernel: ScaleKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    if not write_kernel(child(kernel, "base_kernel", ScaleKernel), x1, x2, terms, called=False):
        return False
    scaled(terms.expression, terms.add_parameter(unconstrained(kernel, "outputscale", ScaleKernel), 0))
    return True


def _linear(kernel: LinearKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    variance, d = kernel.variance, x1.size(-1)
    if variance.dim() < 2 or variance.size(-2) != 1 or variance.size(-1) not in (1, d):
        return False  # of a user's own
    rows, cols = terms.add_inputs(x1, x2)
    covar = torch.diag_embed(variance.squeeze(-2).expand(*variance.shape[:-2], d))
    terms.expression.append(Bilinear(rows, cols, terms.add_parameter((covar, False, None), 2)))
    return True


def _constant(kernel: ConstantKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    ones = x1.new_ones(*x1.shape[:-1], 1)
    rows, cols = terms.add_inputs(ones, ones if x1 is x2 else x2.new_ones(*x2.shape[:-1], 1))
    constant, is_raw, lower_bound = unconstrained(kernel, "constant", ConstantKernel)
    if constant.dtype is not x1.dtype or constant.device != x1.device:
        constant, is_raw, lower_bound = kernel.constant.to(x1), False, None
    covar = terms.add_parameter((constant.unsqueeze(-1), is_raw, lower_bound), 2)
    terms.expression.append(Bilinear(rows, cols, covar))
    return True


def _composite(node: Node, kernel: AdditiveKernel | ProductKernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    for i, part in enumerate(kernel.kernels):
        if not (_write_part(part, x1, x2, terms) or _write_given(part, x1, x2, terms)):
            return False
        if i > 0:
            terms.expression.append(node)
    return len(kernel.kernels) > 0


def _write_part(part: Kernel, x1: Tensor, x2: Tensor, terms: Terms) -> bool:
    if is_dense_in_parts(part) is None:
        return False
    before = len(terms.expression), len(terms.values), len(terms.row_slots), terms.batch_shapes.copy()
    if part.active_dims is not None:
        x1_ = x1.index_select(-1, part.active_dims)
        x1, x2 = x1_, x1_ if x2 is x1 else x2.index_select(-1, part.active_dims)
    if write_kernel(part, x1, x2, terms):
        return True
    terms.forget(*before)
    return False


_WRITERS: dict[Callable, Callable] = {
    RBFKernel.forward: partial(_stationary, RBF),
    MaternKernel.forward: _matern,
    RQKernel.forward: _rational_quadratic,
    PeriodicKernel.forward: _periodic,
    CosineKernel.forward: _cosine,
    IndexKernel.forward: _index,
    LinearKernel.forward: _linear,
    ConstantKernel.forward: _constant,
    ScaleKernel.forward: _scale,
    AdditiveKernel.forward: partial(_composite, Node.SUM),
    ProductKernel.forward: partial(_composite, Node.PRODUCT),
}
_upstream.stands_for(*_WRITERS, Kernel.__call__, Kernel.covar_dist)

# Whose matrices upstream keeps a structure of, where they stand alone
_STRUCTURED = {IndexKernel.forward, LinearKernel.forward}
