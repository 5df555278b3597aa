"""Both ways on one model: how far the numbers on plain tensors are from upstream's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dense, settings
from .mlls import ExactMarginalLogLikelihood, MarginalLogLikelihood
from .models import ExactGP, IndependentModelList

#: Test points up to which the whole posterior covariance is compared.
MAX_COVARIANCE_SIZE = 1000


class Difference(NamedTuple):
    """How far apart one quantity is.

    :ivar name: "loss", "grad of" a parameter, "posterior mean", "posterior variance" or "posterior covariance".
    :ivar size: The largest magnitude among the elements that upstream computes.
    :ivar absolute: The largest difference of an element. Infinite if one way has a gradient, shape or number where the
        other has none; two NaN count as equal.
    :ivar relative: `absolute` over `size`.
    """

    name: str
    size: float
    absolute: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Printed, it is a table.

    :ivar decisions: The routes that were taken with the flag on, each with its reason, in order.
    :ivar differences: The quantities that were compared.
    """

    decisions: tuple[str, ...]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        width = max(len(difference.name) for difference in self.differences)
        lines = [*self.decisions, "", f"{'':{width}}  {'size':>8}  {'absolute':>8}  {'relative':>8}"]
        for name, *numbers in self.differences:
            lines.append("  ".join([f"{name:{width}}", *(f"{number:8.1e}" for number in numbers)]))
        return "\n".join(lines)


Inputs = Tensor | Sequence[Tensor]
Params = Tensor | Sequence[Any] | Mapping[str, Any]


def compare(
    model: ExactGP | IndependentModelList,
    train_x: Inputs,
    train_y: Tensor | Sequence[Tensor],
    mll: MarginalLogLikelihood | None = None,
    test_x: Inputs | None = None,
    params: Params | Sequence[Params | None] | None = None,
) -> Comparison:
    r"""
    Computes the loss, its gradients and a posterior with :class:`gpytorch.settings.use_torch_tensors` off and on, and
    compares them: :math:`\max_i \vert a_i - b_i \vert` and, relative to that, :math:`\max_i \vert b_i \vert`.

    All is computed on a copy of the model, so that neither its mode nor its gradients nor its caches change, and with
    the same random numbers, which are given back. Other settings hold as they are around the call.

    :param model: The model; or a list of models, and then `train_x`, `train_y`, `test_x` and `params` have one
        entry for each.
    :param train_x: The inputs that the model is trained on (... x N x D), or several of them.
    :param train_y: The targets (... x N): `model.train_targets`.
    :param mll: The marginal log likelihood of the model. (Default: the exact one, with the model's likelihood.)
    :param test_x: Where to predict (... x M x D), or several inputs. The whole covariance is compared up to M = 1000.
        (Default: no prediction.)
    :param params: What `mll` hands on to the likelihood: a tensor (task indices, say), a list of what comes after the
        targets, or a dictionary of what is given by name (`{"noise": noise}`). (Default: of a BoTorch model the
        transformed training inputs, as when BoTorch fits it, otherwise nothing.)
    :raises TypeError: If an argument is not of the types above, or `mll` does not take `params`.
    :raises ValueError: If shapes or numbers of arguments do not fit the model, or the marginal log likelihood is
        another model's.
    """
    if isinstance(model, IndependentModelList):
        return _compare_each(model, train_x, train_y, mll, test_x, params)
    if not isinstance(model, ExactGP):
        raise TypeError(f"The model must be an ExactGP or a list of them. Got {type(model).__name__}.")
    if mll is None:
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
    if not isinstance(mll, MarginalLogLikelihood):
        raise TypeError(f"mll must be a MarginalLogLikelihood. Got {type(mll).__name__}.")
    if mll.model is not model:
        raise ValueError("mll is the marginal log likelihood of another model.")
    inputs = _as_inputs("train_x", train_x)
    points = None if test_x is None else _as_inputs("test_x", test_x)
    if not isinstance(train_y, Tensor):
        raise TypeError(f"train_y must be a tensor. Got {type(train_y).__name__}.")
    args, kwargs = _as_params(params)
    # The copy has no prediction caches, which may be large or part of a graph.
    mll = copy.deepcopy(mll, {id(model.prediction_strategy): None}).train()
    _check_shapes(mll.model, inputs, train_y, points)
    if params is None and isinstance(mll, ExactMarginalLogLikelihood) and hasattr(mll.model, "transform_inputs"):
        args = [mll.model.transform_inputs(X=each) for each in inputs]

    def log_likelihood() -> Tensor:
        return mll(mll.model(*inputs), train_y, *args, **kwargs)

    (expected, _), (actual, decisions) = (_evaluate(mll, log_likelihood, points, flag) for flag in (False, True))
    differences = (_difference(name, actual.get(name), value) for name, value in expected.items())
    return Comparison(decisions, tuple(differences))


def _compare_each(models: IndependentModelList, train_x, train_y, mll, test_x, params) -> Comparison:
    count = len(models.models)
    mlls = [None] * count if mll is None else getattr(mll, "mlls", [mll])
    tests = [None] * count if test_x is None else test_x
    params = [None] * count if params is None else params
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise TypeError(f"params must be a list of an entry for each model. Got {type(params).__name__}.")
    given = {"train_x": train_x, "train_y": train_y, "mll": mlls, "test_x": tests, "params": params}
    for name, entries in given.items():
        if len(entries) != count:
            raise ValueError(f"{name} must have an entry for each of the {count} models. Got {len(entries)}.")
    decisions, differences = [], []
    for i, arguments in enumerate(zip(models.models, train_x, train_y, mlls, tests, params, strict=True)):
        found = compare(*arguments)
        decisions += [f"model {i}: {decision}" for decision in found.decisions]
        differences += [each._replace(name=f"model {i}: {each.name}") for each in found.differences]
    return Comparison(tuple(decisions), tuple(differences))


def _as_inputs(name: str, given: Any) -> list[Tensor]:
    inputs = [given] if isinstance(given, Tensor) else given
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(each, Tensor) for each in inputs):
        raise TypeError(f"{name} must be a tensor or a list of tensors. Got {type(given).__name__}.")
    return [each.unsqueeze(-1) if each.dim() == 1 else each for each in inputs]


def _as_params(given: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if given is None:
        return [], {}
    if isinstance(given, Mapping):
        return [], given
    if isinstance(given, Tensor):
        return [given], {}
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"params must be a tensor, a list or a dictionary. Got {type(given).__name__}.")
    return given, {}


def _check_shapes(model: ExactGP, inputs: list[Tensor], targets: Tensor, points: list[Tensor] | None) -> None:
    if model.train_inputs is None or model.train_targets is None:
        raise ValueError("The model has no training data.")
    own = [tuple(each.shape) for each in model.train_inputs]
    if (given := [tuple(each.shape) for each in inputs]) != own:
        raise ValueError(f"train_x must be the model's training inputs, of the shapes {own}. Got {given}.")
    if targets.shape != model.train_targets.shape:
        raise ValueError(
            f"train_y must be model.train_targets, of the shape {tuple(model.train_targets.shape)}. Got "
            f"{tuple(targets.shape)}."
        )
    if points is not None and [each.shape[-1] for each in points] != [shape[-1] for shape in own]:
        raise ValueError(
            f"test_x must have the dimensions of train_x, {[shape[-1] for shape in own]}. Got "
            f"{[each.shape[-1] for each in points]}."
        )


def _evaluate(
    mll: MarginalLogLikelihood, log_likelihood: Callable[[], Tensor], points: list[Tensor] | None, flag: bool
) -> tuple[dict[str, Tensor | None], tuple[str, ...]]:
    cuda = {tensor.device for tensor in mll.model.train_inputs if tensor.is_cuda}
    mll.train()
    mll.zero_grad()
    with settings.use_torch_tensors(flag), torch.random.fork_rng(cuda), torch.enable_grad(), _decisions() as decisions:
        torch.manual_seed(0)  # conjugate gradients draw probe vectors
        loss = -log_likelihood()
        parameters = [parameter for parameter in mll.parameters() if parameter.requires_grad]
        if parameters and loss.requires_grad:
            loss.sum().backward(inputs=parameters)  # and of no tensor of the caller's
        found = {"loss": loss.detach()}
        found |= {f"grad of {name}": parameter.grad for name, parameter in mll.named_parameters()}
        if points is not None:
            mll.eval()
            with torch.no_grad():
                found |= _predict(mll.model, points)
    return found, tuple(dict.fromkeys(decisions))


def _predict(model: ExactGP, points: list[Tensor]) -> dict[str, Tensor]:
    # A BoTorch model transforms inputs and outputs on its way from `posterior`.
    posterior = model.posterior(*points) if hasattr(model, "posterior") else model(*points)
    found = {"posterior mean": posterior.mean, "posterior variance": posterior.variance}
    distribution = getattr(posterior, "distribution", posterior)
    if hasattr(distribution, "covariance_matrix") and points[0].size(-2) <= MAX_COVARIANCE_SIZE:
        found["posterior covariance"] = distribution.covariance_matrix
    return found


@contextmanager
def _decisions() -> Iterator[list[str]]:
    """Collect what is logged of the decisions in the block, and let nobody else see it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = dense.logger
    before = logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]


def _difference(name: str, actual: Tensor | None, expected: Tensor | None) -> Difference:
    if actual is None or expected is None or actual.shape != expected.shape:
        largest = 0.0 if actual is None and expected is None else float("inf")
        return Difference(name, 0.0, largest, largest)
    if expected.numel() == 0:
        return Difference(name, 0.0, 0.0, 0.0)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    off = (actual - expected).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    absolute, size = off.max().item(), expected.abs().nan_to_num(nan=0.0, posinf=float("inf")).max().item()
    relative = 0.0 if absolute == 0.0 else float("inf")
    if 0.0 < size < float("inf"):
        relative = absolute / size
    return Difference(name, size, absolute, relative)
