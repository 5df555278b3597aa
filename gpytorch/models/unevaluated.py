"""The covariances of a prediction, and of fantasies, before they are evaluated, with closed forms or without."""

from __future__ import annotations

from linear_operator.operators import DenseLinearOperator, LinearOperator, to_linear_operator
from torch import Tensor

from ..closed_form.covariance import ClosedForm, ClosedFormPrior, closed_form


class Evaluated:
    """A covariance matrix whose kernel has no closed form, with the methods of :class:`ClosedForm` and
    :class:`ClosedFormPrior` that predictions and fantasies call.

    :param covar: The matrix as an operator.
    """

    terms = None  # it has no expression

    def __init__(self, covar: LinearOperator) -> None:
        self.covar = covar.evaluate_kernel()
        self.shape = self.covar.shape

    def to_dense(self, rows: slice | None = None) -> Tensor:
        return (self.covar if rows is None else self.covar[..., rows, :]).to_dense()

    def block(self, rows: slice | None, cols: slice | None) -> Tensor:
        return self.covar[..., rows or slice(None), cols or slice(None)].to_dense()

    def diagonal(self) -> Tensor:
        return self.covar.diagonal(dim1=-1, dim2=-2)

    def at_rows(self, rows: Tensor) -> Evaluated:
        return Evaluated(self.covar[..., rows, :])

    def at(self, rows: Tensor) -> Evaluated:
        return Evaluated(DenseLinearOperator(self.covar.to_dense()[..., rows, :][..., rows]))


def unevaluated(
    prior: LinearOperator | Tensor | ClosedFormPrior, cross: LinearOperator | Tensor | ClosedForm
) -> tuple[ClosedFormPrior | Evaluated, ClosedForm | Evaluated]:
    """Return what gives the covariance matrices of a prediction, or parts of them, when asked.

    :param prior: K(test, test) (... x M x M).
    :param cross: K(test, train) (... x M x N).
    """
    if isinstance(cross, ClosedForm):
        return prior, cross
    prior, cross = to_linear_operator(prior), to_linear_operator(cross)
    form = closed_form(cross)
    if form is None or type(prior) is not type(cross) or prior.kernel is not cross.kernel or prior.x1 is not cross.x1:
        return Evaluated(prior), Evaluated(cross)
    return ClosedFormPrior(form), form
