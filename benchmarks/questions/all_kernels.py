"""Models of every kernel that GPyTorch and BoTorch ship and that an exact GP can use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.functional import one_hot

import gpytorch
from gpytorch import kernels as k
from gpytorch import means
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, MultitaskGaussianLikelihood

from ..shared.models import sample_problem

D = 6
_CONTEXTS = {"a": [0, 1, 2], "b": [3, 4, 5]}


def _scaled(make: Callable[..., Kernel], *args, **kwargs) -> Callable[[], Kernel]:
    return lambda: k.ScaleKernel(make(*args, **kwargs))


def _botorchs(name: str, *args, module: str = "", **kwargs) -> Callable[[], Kernel]:
    def make() -> Kernel:
        return getattr(import_module("botorch.models.kernels" + module), name)(*args, **kwargs)

    return make


def mixed() -> Kernel:
    """Return the kernel of BoTorch's MixedSingleTaskGP, of four coordinates and two categories."""

    def of_points() -> Kernel:
        return k.MaternKernel(nu=2.5, ard_num_dims=4, active_dims=[0, 1, 2, 3])

    of_labels = _botorchs("CategoricalKernel", ard_num_dims=2, active_dims=[4, 5])
    return k.ScaleKernel(of_points() + k.ScaleKernel(of_labels())) + k.ScaleKernel(of_points() * of_labels())


#: By name, the kernel.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "RBF": _scaled(k.RBFKernel, ard_num_dims=D),
    "Matern 5/2": _scaled(k.MaternKernel, nu=2.5, ard_num_dims=D),
    "rational quadratic": _scaled(k.RQKernel, ard_num_dims=D),
    "periodic": _scaled(k.PeriodicKernel),
    "RBF + constant": lambda: k.ScaleKernel(k.RBFKernel()) + k.ConstantKernel(),
    "Matern + linear": lambda: k.ScaleKernel(k.MaternKernel(nu=2.5)) + k.LinearKernel(),
    "polynomial": lambda: k.PolynomialKernel(2),
    "cosine": lambda: k.CosineKernel(active_dims=[0]),
    "piecewise polynomial": _scaled(k.PiecewisePolynomialKernel, 2, ard_num_dims=D),
    "spectral mixture of 4": lambda: k.SpectralMixtureKernel(4, ard_num_dims=D),
    "Arc": _scaled(k.ArcKernel, k.MaternKernel(nu=2.5), ard_num_dims=D),
    "cylindrical": _scaled(k.CylindricalKernel, 5, k.MaternKernel(nu=2.5)),
    "Hamming IMQ": _scaled(k.HammingIMQKernel, 3),
    "symmetrized KL": _scaled(k.GaussianSymmetrizedKLKernel),
    "additive structure": lambda: k.AdditiveStructureKernel(k.RBFKernel(), D),
    "product structure": lambda: k.ProductStructureKernel(k.RBFKernel(), D),
    "Newton-Girard": lambda: k.NewtonGirardAdditiveKernel(k.RBFKernel(), D, max_degree=2),
    "RBF and gradient": lambda: k.RBFKernelGrad(ard_num_dims=D),
    "Matern 5/2 and gradient": lambda: k.Matern52KernelGrad(ard_num_dims=D),
    "categorical": lambda: k.ScaleKernel(_botorchs("CategoricalKernel", ard_num_dims=D)()),
    "mixed": mixed,
    "infinite-width network": lambda: k.ScaleKernel(_botorchs("InfiniteWidthBNNKernel", 2)()),
    "linear truncated fidelity": _botorchs("LinearTruncatedFidelityKernel", [5], dimension=D),
    "RBF x downsampling": lambda: k.RBFKernel() * _botorchs("DownsamplingKernel", active_dims=[5])(),
    "RBF x exponential decay": lambda: k.RBFKernel() * _botorchs("ExponentialDecayKernel", active_dims=[5])(),
    "orthogonal additive": _botorchs("OrthogonalAdditiveKernel", D, module=".orthogonal_additive_kernel"),
    "separate contexts": _botorchs("SACKernel", _CONTEXTS, torch.Size(), module=".contextual_sac"),
    "linear": lambda: k.LinearKernel(),
    "random features": lambda: k.RFFKernel(10, num_dims=D),
    "inducing points": lambda: k.InducingPointKernel(_scaled(k.RBFKernel)(), torch.rand(10, D), GaussianLikelihood()),
    "interpolated grid": lambda: k.GridInterpolationKernel(k.RBFKernel(), 30, num_dims=1, active_dims=[0]),
    "multitask": lambda: k.MultitaskKernel(k.RBFKernel(), 2),
    "coregionalization": lambda: k.LCMKernel([k.RBFKernel(), k.MaternKernel()], 2, rank=1),
}
#: Those that keep a structure, and stay upstream's.
LEFT = ("linear", "random features", "inducing points", "interpolated grid", "multitask", "coregionalization")
_OF_BOTORCH = ("categorical", "mixed", "infinite", "linear truncated", "RBF x", "orthogonal", "separate")


def available() -> tuple[str, ...]:
    """Return the names of the kernels, without BoTorch's where it is not installed."""
    has_botorch = find_spec("botorch") is not None
    return tuple(name for name in KERNELS if has_botorch or not name.startswith(_OF_BOTORCH))


def inputs_of(name: str, n: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return training inputs that the kernel of that name can take."""
    x, _ = sample_problem(n, D, dtype, device)
    if name in ("categorical", "mixed"):
        return torch.cat([x[:, :4], (3 * x[:, 4:]).floor()], dim=-1)
    if name == "Hamming IMQ":
        return one_hot((3 * x[:, :2]).long(), 3).flatten(-2).to(dtype)
    return x / 3 if name == "cylindrical" else x  # inside the unit sphere


def _made(name: str, dtype: torch.dtype) -> Kernel:
    # One of BoTorch's has tensors that are not converted with it.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.manual_seed(0)
            return KERNELS[name]()
    finally:
        torch.set_default_dtype(before)


class KernelGP(gpytorch.models.ExactGP):
    """A constant mean and the kernel of that name, of one output or several."""

    def __init__(self, name: str, x: torch.Tensor) -> None:
        kernel = _made(name, x.dtype).to(x)
        for part in kernel.modules():
            getattr(part, "_priors", {}).clear()  # some of BoTorch's bring their own
        outputs = kernel.num_outputs_per_input(x, x)
        y = torch.sin(3 * x).sum(-1) + 0.3 * torch.randn(x.size(0), generator=torch.Generator().manual_seed(0)).to(x)
        likelihood: Likelihood = GaussianLikelihood() if outputs == 1 else MultitaskGaussianLikelihood(outputs)
        super().__init__(x, y if outputs == 1 else y.unsqueeze(-1).repeat(1, outputs), likelihood)
        self.covar_module, self.is_multitask = kernel, outputs > 1
        mean = means.ConstantMean()
        if outputs > 1:
            mean = means.ConstantMeanGrad() if outputs > D else means.MultitaskMean(mean, outputs)
        self.mean_module = mean
        self.to(x)

    def forward(self, x: torch.Tensor) -> MultivariateNormal:
        """Return the prior at `x`."""
        distribution = MultitaskMultivariateNormal if self.is_multitask else MultivariateNormal
        return distribution(self.mean_module(x), self.covar_module(x))
