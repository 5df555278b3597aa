"""The exact marginal log likelihood on plain tensors, from the model's output to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _upstream, settings
from ..constraints import unconstrained
from ..distributions import MultivariateNormal
from ..functions.log_normal_log_prob import sum_of_log_normals
from ..lookup import child
from ..module import Module
from ..priors import LogNormalPrior, Prior
from ..priors.log_normal import log_normal_arguments
from .marginal import closed_form_marginal

_upstream.extend(__name__)

_upstream_forward = ExactMarginalLogLikelihood.forward  # noqa: F821 (from the installed module)
_upstream_add_other_terms = ExactMarginalLogLikelihood._add_other_terms  # noqa: F821


@_upstream.replaces(ExactMarginalLogLikelihood)  # noqa: F821
def forward(self, function_dist: MultivariateNormal, target: Tensor, *params: Any, **kwargs: Any) -> Tensor:
    r"""
    With :class:`gpytorch.settings.use_torch_tensors` on, and a kernel whose gradient has a closed form, the noise of
    the likelihood goes onto the diagonal of the kernel's matrix with no
    :obj:`~linear_operator.LinearOperator` in between.
    """
    covar = None
    if settings.use_torch_tensors.on():
        likelihood = child(self, "likelihood", ExactMarginalLogLikelihood)  # noqa: F821
        covar = closed_form_marginal(likelihood, function_dist, params, kwargs)
    if covar is None:
        return _upstream_forward(self, function_dist, target, *params, **kwargs)
    num_data, residual = function_dist.event_shape.numel(), target - function_dist.loc
    is_own = getattr(self._add_other_terms, "__func__", None) is _add_other_terms
    terms = _other_terms(child(self, "model", ExactMarginalLogLikelihood)) if is_own else None  # noqa: F821
    if terms == ([], []):
        return covar.log_prob(residual, num_data)
    res = covar.log_prob(residual)
    res = self._add_other_terms(res, params) if terms is None else _add_terms(res, params, *terms)
    return res / num_data


@_upstream.replaces(ExactMarginalLogLikelihood)  # noqa: F821
def _add_other_terms(self, res: Tensor, params: tuple) -> Tensor:
    terms = _other_terms(self.model) if settings.use_torch_tensors.on() else None
    return _upstream_add_other_terms(self, res, params) if terms is None else _add_terms(res, params, *terms)


def _other_terms(model: Module) -> tuple[list[tuple], list] | None:
    # The priors and the added loss terms, or None where the model has its own way to find them
    cls = type(model)
    if cls.named_priors is not Module.named_priors or cls.added_loss_terms is not Module.added_loss_terms:
        return None
    priors: list[tuple] = []
    added_loss_terms: list = []
    _collect_terms(model, priors, added_loss_terms)
    return priors, added_loss_terms


def _add_terms(res: Tensor, params: tuple, priors: list[tuple], added_loss_terms: list) -> Tensor:
    for added_loss_term in added_loss_terms:
        res = res.add(added_loss_term.loss(*params))
    if not priors:
        return res
    terms = [(prior, closure(module)) for module, prior, closure in priors]
    if res.ndim == 0:
        return _add_log_probs(res, terms)
    for prior, value in terms:
        term = prior.log_prob(value)
        res = res.add(term.view(*term.shape[: res.ndim], -1).sum(dim=-1))
    return res


def _add_log_probs(res: Tensor, terms: list[tuple[Prior, Tensor]]) -> Tensor:
    # Those of log normal priors, which every BoTorch model has two of, in one autograd node
    log_normals: list[tuple[Tensor, Tensor, Tensor]] = []
    for prior, value in terms:
        if getattr(prior.log_prob, "__func__", None) is LogNormalPrior.log_prob and isinstance(value, Tensor):
            log_normals.append(log_normal_arguments(prior, value))
        else:
            res = res.add(prior.log_prob(value).sum())
    return res.add(sum_of_log_normals(log_normals)) if log_normals else res


def _collect_terms(module: torch.nn.Module, priors: list[tuple], added_loss_terms: list) -> None:
    # One walk over the modules in place of two that also make up their names
    attributes = module.__dict__
    if isinstance(module, Module) and (own_priors := attributes["_priors"]):
        priors += [(module, prior, closure) for prior, closure, _ in own_priors.values() if prior is not None]
    if own_terms := attributes.get("_added_loss_terms"):
        added_loss_terms += [
            term for term in dict.fromkeys(own_terms.values()) if term is not None and term not in added_loss_terms
        ]
    children = attributes["_modules"].values()
    for part in dict.fromkeys(children) if len(children) > 1 else children:
        if part is not None and type(part) not in unconstrained.CONSTRAINTS:
            _collect_terms(part, priors, added_loss_terms)
