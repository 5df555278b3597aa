"""Gradients are forgotten, modes set and tensors converted as torch does, where there is anything to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from both_ways import exact_gp, inputs, loss
from torch import Tensor, nn

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


def tensors_of(module: nn.Module) -> list[tuple]:
    """What a conversion may change: each tensor itself, and what it is."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [(tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.is_shared()) for tensor in tensors]


CONVERSIONS = {
    "same dtype": lambda module: module.to(torch.float32),
    "other dtype": lambda module: module.to(torch.float64),
    "other dtype by name": lambda module: module.double(),
    "there and back": lambda module: module.double().float(),
    "same device": lambda module: module.cpu(),
    "shared memory": lambda module: module.share_memory(),
    "no data": lambda module: module.to_empty(device="meta"),
}


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_conversion_changes_what_upstreams_does(make, convert, has_gradients: bool) -> None:
    found = []
    for flag in (False, True):
        module = make().float()
        if has_gradients:
            with_gradients(module)
        before, parameters = tensors_of(module), list(nn.Module.parameters(module))
        with use_torch_tensors(flag):
            assert convert(module) is module
        # Addresses differ from module to module: whether they stay does not.
        found.append([(a[0] == b[0], *a[1:]) for a, b in zip(tensors_of(module), before, strict=True)])
        found[-1] += [a is b for a, b in zip(parameters, nn.Module.parameters(module), strict=True)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["overwrite", "swap"])
def test_new_parameters_are_made_where_torch_is_told_to(name: str) -> None:
    set_future = getattr(torch.__future__, f"set_{name}_module_params_on_conversion")
    kept = []
    set_future(True)
    try:
        for flag in (False, True):
            module = exact_gp(ScaleKernel(RBFKernel()), inputs(5))
            before = list(module.parameters())
            with use_torch_tensors(flag):
                module.double()
            kept.append([a is b for a, b in zip(before, module.parameters(), strict=True)])
    finally:
        set_future(False)
    assert kept[0] == kept[1]


def test_conversion_to_what_is_assigns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, assigned = exact_gp(ScaleKernel(RBFKernel()), inputs(5)).model, []
    monkeypatch.setattr(nn.Module, "__setattr__", lambda self, name, value: assigned.append(name))
    with use_torch_tensors():
        module.to(torch.float64)
    assert set(assigned) <= {"train_inputs", "train_targets"}  # which upstream's ExactGP converts before its modules


@pytest.mark.parametrize("own", [nn.LSTM(2, 2), None], ids=str)
@pytest.mark.parametrize("function", [lambda tensor: tensor.mul_(2), torch.rand_like])
def test_function_is_applied_to_each_tensor_once(function: Callable[[Tensor], Tensor], own: nn.Module | None) -> None:
    module = exact_gp(ScaleKernel(RBFKernel()), inputs(5)).model
    module.own, asked = deepcopy(own), []  # an LSTM has its own way to apply
    once = deepcopy(module)
    for flag, each in ((False, once), (True, module)):
        torch.manual_seed(0)
        with use_torch_tensors(flag):
            each._apply(lambda tensor: asked.append(1) or function(tensor))
    assert len(asked) % 2 == 0
    for ours, theirs in zip(module.parameters(), once.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", ["train", "_apply"])
def test_modules_own_way_is_theirs(name: str, where: str) -> None:
    called = []

    class Own(gpytorch.Module):
        pass

    module, own = gpytorch.Module(), Own()
    module.child = own.eval()
    module.eval()
    original = getattr(own, name)
    if where == "class":
        setattr(Own, name, lambda self, *args, **options: called.append(args) or original(*args, **options))
    else:
        setattr(own, name, lambda *args, **options: called.append(args) or original(*args, **options))
    with use_torch_tensors():
        module.eval()
        module.to(torch.float32)
    assert len(called) == 1


@pytest.mark.parametrize("flag", [False, True])
def test_evaluation_mode_reaches_whatever_is_not_in_it(flag: bool) -> None:
    module = DeepKernel().eval()
    module.features[1].train()
    module.kernel.kernels[0].train()
    with use_torch_tensors(flag):
        assert module.eval() is module
        assert not any(each.training for each in module.modules())
        assert module.train() is module and all(each.training for each in module.modules())


@pytest.mark.parametrize("flag", [False, True])
def test_caches_are_dropped_by_training_and_kept_by_evaluation(flag: bool) -> None:
    model = exact_gp(ScaleKernel(RBFKernel()), inputs(5)).model
    with use_torch_tensors(flag):
        model.eval()
        model(inputs(2)).variance  # noqa: B018 (fills the caches)
        strategy = model.prediction_strategy
        assert strategy is not None and model.eval().prediction_strategy is strategy
        assert model.train().prediction_strategy is None
