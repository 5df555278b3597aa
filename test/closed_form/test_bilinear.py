"""Kernels of labels among others, and noise that goes with the label: against upstream's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import pytest
import torch
from both_ways import assert_near, compare_step, evaluate, exact_gp, inputs, loss, routes, scatter
from botorch.models.kernels.positive_index import PositiveIndexKernel
from torch import Tensor

from gpytorch import kernels as k
from gpytorch.closed_form import matrix as kernel_matrix
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import HadamardGaussianLikelihood
from gpytorch.settings import use_torch_tensors

LABELS = 3
NONE = torch.Size([])


def labelled(n: int, batch: tuple = (), dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Points of two coordinates and a label, each label at some of them."""
    labels = torch.arange(n).remainder(LABELS).flip(0).to(dtype).expand(*batch, n)
    return torch.cat([inputs(n, 2, batch, dtype=dtype, seed=seed), labels.unsqueeze(-1)], dim=-1)


def of_labels(rank: int = 2, b: torch.Size = NONE, cls: type[Kernel] = k.IndexKernel) -> Kernel:
    torch.manual_seed(0)
    return cls(num_tasks=LABELS, rank=rank, active_dims=[2], batch_shape=b)


def of_points(b: torch.Size = NONE, cls: type[Kernel] = k.RBFKernel) -> Kernel:
    return cls(active_dims=[0, 1], batch_shape=b)


DENSE: dict[str, Callable[[torch.Size], Kernel]] = {
    "points times labels": lambda b: of_points(b) * of_labels(b=b),
    "labels times points": lambda b: of_labels(b=b) * of_points(b),
    "scaled": lambda b: k.ScaleKernel(of_points(b, k.MaternKernel) * of_labels(1, b), batch_shape=b),
    "positive": lambda b: of_points(b) * of_labels(b=b, cls=PositiveIndexKernel),
    "coregionalization": lambda b: of_points(b) * of_labels(b=b) + of_points(b, k.MaternKernel) * of_labels(1, b),
    "scaled labels": lambda b: k.ScaleKernel(of_labels(b=b), batch_shape=b) * of_points(b),
    "sum of labels times points": lambda b: (of_labels(b=b) + of_labels(1, b)) * of_points(b),
    "labels plus points": lambda b: of_labels(b=b) + of_points(b),
    "labels plus labels": lambda b: of_labels(b=b) + of_labels(1, b),
    "labels times labels": lambda b: of_labels(b=b) * of_labels(1, b),
    "linear plus points": lambda b: k.LinearKernel(batch_shape=b) + of_points(b),
}
STRUCTURED: dict[str, Callable[[], Kernel]] = {
    "labels": of_labels,
    "scaled labels": lambda: k.ScaleKernel(of_labels()),
}


def skip_where_botorch_has_none(kernel: str, batch: tuple) -> None:
    version = tuple(map(int, metadata.version("botorch").split(".")[:2]))
    if kernel == "positive" and batch and version < (0, 18):
        pytest.skip("BoTorch 0.16 and 0.17 raise on batches of PositiveIndexKernel")


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kernel", DENSE)
def test_step_matches_upstream(kernel: str, batch: tuple) -> None:
    skip_where_botorch_has_none(kernel, batch)
    compare_step(exact_gp(DENSE[kernel](torch.Size(batch)), labelled(13, batch)))


@pytest.mark.parametrize("kernel", ["points times labels", "coregionalization"])
def test_step_in_blocks_of_rows_matches_upstream(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_matrix._ELEMENTS, "cpu", (100, 40))
    monkeypatch.setattr(kernel_matrix, "_LEAST_ROWS", 4)
    compare_step(exact_gp(DENSE[kernel](NONE), labelled(20)))


@pytest.mark.parametrize("kernel", STRUCTURED)
def test_structured_covariance_stays_upstream(kernel: str) -> None:
    compare_step(exact_gp(STRUCTURED[kernel](), labelled(13)), route="upstream")


def test_single_precision_is_about_as_far_off_as_upstreams() -> None:
    off = {False: 0.0, True: 0.0}
    for make in DENSE.values():
        exact = exact_gp(make(NONE), labelled(30))
        reference = evaluate(lambda mll=exact: loss(mll), dict(exact.named_parameters()), flag=False)
        for flag in off:
            single = exact_gp(make(NONE), labelled(30, dtype=torch.float32))
            single.load_state_dict(exact.state_dict())
            found = evaluate(lambda mll=single: loss(mll), dict(single.named_parameters()), flag)
            for name, grad in reference.grads.items():
                off[flag] += ((found.grads[name] - grad).abs().max() / grad.abs().max()).item()
    assert off[True] <= 2 * off[False]


@pytest.mark.parametrize("kernel", ["points times labels", "coregionalization"])
def test_second_derivatives_match_differences_of_the_first(kernel: str) -> None:
    # Upstream's are not to be relied on: those in the covariance of the labels, through its interpolation, are wrong.
    mll = exact_gp(DENSE[kernel](NONE), labelled(9))
    parameters = list(mll.parameters())

    def size_of_gradient(create_graph: bool = False) -> Tensor:
        grads = torch.autograd.grad(loss(mll), parameters, create_graph=create_graph)
        return sum(grad.square().sum() for grad in grads)

    with use_torch_tensors():
        second = torch.autograd.grad(size_of_gradient(create_graph=True), parameters)
        for parameter, found in zip(parameters, second, strict=True):
            elements, expected = parameter.data.view(-1), []
            for i in range(elements.numel()):
                ends = []
                for step in (1e-5, -2e-5):
                    elements[i] += step
                    ends.append(size_of_gradient())
                elements[i] += 1e-5
                expected.append((ends[0] - ends[1]) / 2e-5)
            assert_near(found.reshape(-1), torch.stack(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kernel", [kernel for kernel in DENSE if "points" in kernel])
def test_prediction_matches_upstream(kernel: str, batch: tuple) -> None:
    skip_where_botorch_has_none(kernel, batch)
    mll, found = exact_gp(DENSE[kernel](torch.Size(batch)), labelled(13, batch)).eval(), []
    for flag, expected in ((False, {}), (True, {"tensors": 1})):
        mll.model.prediction_strategy = None
        x = labelled(5, batch, seed=3).requires_grad_()
        with use_torch_tensors(flag), routes(**expected):
            prediction = mll.model(x)
            read = [prediction.mean, prediction.variance, prediction.covariance_matrix]
        found.append(read + [torch.autograd.grad(part.sin().sum(), x, retain_graph=True)[0] for part in read])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_near(actual.detach(), expected.detach())


@pytest.mark.parametrize("label", [-1, LABELS])
def test_label_of_none_is_an_error_both_ways(label: int) -> None:
    x = labelled(7)
    x[2, 2] = label
    for flag in (False, True):
        with use_torch_tensors(flag), pytest.raises(RuntimeError):
            loss(exact_gp(DENSE["points times labels"](NONE), x))


def test_several_labels_of_a_point_stay_upstream() -> None:
    x = torch.cat([labelled(9), labelled(9)[:, 2:]], dim=-1)
    kernel = of_points() * k.IndexKernel(num_tasks=LABELS, rank=1, active_dims=[2, 3])
    compare_step(exact_gp(kernel, x))


def test_subclass_with_its_own_covariance_keeps_it() -> None:
    class Twice(k.IndexKernel):
        def forward(self, i1: Tensor, i2: Tensor, **params):
            return super().forward(i1, i2, **params) * 2.0

    compare_step(exact_gp(of_points() * of_labels(cls=Twice), labelled(9)))


def with_noise_of_labels(index: int | None, labels: int = LABELS, batch: tuple = ()):
    likelihood = HadamardGaussianLikelihood(labels, task_feature_index=index, batch_shape=torch.Size(batch))
    return exact_gp(DENSE["points times labels"](torch.Size(batch)), labelled(13, batch), likelihood=likelihood)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("labels", [1, LABELS, LABELS + 1])
@pytest.mark.parametrize("in_list", [False, True])
def test_noise_of_labels_matches_upstream(in_list: bool, labels: int, batch: tuple) -> None:
    mll = with_noise_of_labels(-1, labels, batch)
    x = labelled(13, batch)
    compare_step(mll, [x] if in_list else x)
    only = with_noise_of_labels(None, labels, batch)
    compare_step(only, x[..., 2:])


def test_noise_of_labels_matches_upstream_in_predictions() -> None:
    mll, found = with_noise_of_labels(-1).eval(), []
    x = labelled(5, seed=3)
    for flag, expected in ((False, {}), (True, {"tensors": 1})):
        mll.model.prediction_strategy = None
        with use_torch_tensors(flag), routes(**expected), torch.no_grad():
            prediction = mll.model(x)
            found.append([prediction.mean, prediction.variance, mll.likelihood(prediction, x).variance])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize(
    ("index", "params"),
    [(None, lambda x: (x,)), (-1, lambda x: (x[:5],)), (-1, lambda x: ([],)), (-1, lambda x: ())],
    ids=["no index", "other points", "empty list", "nothing"],
)
def test_labels_that_do_not_fit_are_upstreams_error(index: int | None, params: Callable) -> None:
    said = []
    for flag in (False, True):
        with use_torch_tensors(flag), pytest.raises(ValueError) as raised:
            loss(with_noise_of_labels(index), *params(labelled(13)))
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_gradient_reaches_the_noise_of_each_label_alone() -> None:
    mll = scatter(with_noise_of_labels(-1))
    with use_torch_tensors():
        loss(mll, labelled(13)).backward()
    grad = mll.likelihood.noise_covar.raw_noise.grad
    assert grad.numel() == LABELS and grad.abs().min() > 0


def test_labels_in_another_precision_match_upstream() -> None:
    mll = exact_gp(of_points() * of_labels(), labelled(13))
    mll.model.covar_module.kernels[1].float()
    compare_step(mll, rtol=1e-6)
