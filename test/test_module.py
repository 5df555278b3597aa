"""Gradients are forgotten as torch forgets them."""

from __future__ import annotations

import warnings

import pytest
import torch
from both_ways import exact_gp, inputs, loss
from torch import nn

import gpytorch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.settings import use_torch_tensors


class DeepKernel(gpytorch.Module):
    """Modules of torch among those of GPyTorch, one of them twice, one of them missing."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
        self.head = self.features[0]
        self.kernel = ScaleKernel(RBFKernel()) + MaternKernel()
        self.absent = None
        self.register_parameter("nothing", None)


class FrozenToZeroGrad(gpytorch.Module):
    """Names fewer parameters than it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def parameters(self, recurse: bool = True):
        yield self.first


def frozen_by_hand() -> gpytorch.Module:
    module = ScaleKernel(RBFKernel())
    module.parameters = lambda recurse=True: iter([module.raw_outputscale])
    return module


def with_gradients(module: nn.Module) -> list[nn.Parameter]:
    parameters = list(nn.Module.parameters(module))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


MODULES = {
    "likelihood and model": lambda: exact_gp(ScaleKernel(RBFKernel()), inputs(5)),
    "deep kernel": DeepKernel,
    "own parameters()": FrozenToZeroGrad,
    "an instance's parameters()": frozen_by_hand,
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_same_gradients_are_left(make, set_to_none: bool) -> None:
    module, left = make(), []
    for flag in (False, True):
        parameters = with_gradients(module)
        with use_torch_tensors(flag):
            module.zero_grad(set_to_none)
        left.append([None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters])
    assert left[0] == left[1]
    assert any(grad is None for grad in left[1]) == set_to_none


@pytest.mark.parametrize("flag", [False, True])
def test_zero_grad_of_another_base_is_called(flag: bool) -> None:
    called = []

    class Base(nn.Module):
        def zero_grad(self, set_to_none: bool = True) -> None:
            called.append(set_to_none)

    class Both(gpytorch.Module, Base):
        pass

    with use_torch_tensors(flag):
        Both().zero_grad()
    assert called == [True]


def test_modules_that_hold_one_another_are_visited_once() -> None:
    module, other = DeepKernel(), DeepKernel()
    module.other, other.other = other, module
    parameters = with_gradients(module)
    with use_torch_tensors():
        module.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_replica_warns_as_torchs() -> None:
    module = DeepKernel()
    module._is_replica = True
    with use_torch_tensors(), pytest.warns(UserWarning, match="zero_grad"):
        module.zero_grad()


def test_gradients_of_a_step_are_forgotten_before_the_next() -> None:
    mll = exact_gp(ScaleKernel(RBFKernel()), inputs(5))
    with use_torch_tensors(), warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = []
        for _ in range(2):
            mll.zero_grad()
            loss(mll).backward()
            grads.append([parameter.grad.clone() for parameter in mll.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))
