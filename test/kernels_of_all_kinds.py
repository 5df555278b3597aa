"""Every kernel that GPyTorch and BoTorch ship and that an exact GP of one output can use, and two of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import torch
from both_ways import inputs
from botorch.models import kernels as b
from botorch.models.kernels.contextual_lcea import LCEAKernel
from botorch.models.kernels.contextual_sac import SACKernel
from botorch.models.kernels.orthogonal_additive_kernel import OrthogonalAdditiveKernel
from torch import Tensor, nn

from gpytorch import kernels as k
from gpytorch.kernels import Kernel

D = 4


class OfAUser(Kernel):
    """exp(-|x - x'|_1 / lengthscale), which upstream does not have."""

    has_lengthscale = True

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        distance = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs().sum(-1)
        covar = torch.exp(-distance / self.lengthscale)
        return covar.diagonal(dim1=-1, dim2=-2) if diag else covar


class WithNetwork(Kernel):
    """A polynomial of the features that a network finds."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.network = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        z1, z2 = self.network(x1), self.network(x2)
        return ((z1 * z2).sum(-1) + 1).square() if diag else (z1 @ z2.mT + 1).square()


def points(n: int, batch: tuple = (), seed: int = 0) -> Tensor:
    return inputs(n, D, batch, seed=seed) * 0.4  # inside the unit sphere, for the cylindrical kernel


def labels(n: int, batch: tuple = (), seed: int = 0) -> Tensor:
    """Two coordinates and two categories."""
    x = inputs(n, D, batch, seed=seed)
    return torch.cat([x[..., :2], (3 * x[..., 2:]).floor()], dim=-1)


def one_hot(n: int, batch: tuple = (), seed: int = 0) -> Tensor:
    letters = (2 * inputs(n, 2, batch, seed=seed)).long()
    return nn.functional.one_hot(letters, 2).flatten(-2).double()


def mixed(batch: torch.Size) -> Kernel:
    """The kernel of BoTorch's MixedSingleTaskGP."""

    def of_points() -> Kernel:
        return k.MaternKernel(nu=2.5, ard_num_dims=2, active_dims=[0, 1], batch_shape=batch)

    def of_labels() -> Kernel:
        return b.CategoricalKernel(ard_num_dims=2, active_dims=[2, 3], batch_shape=batch)

    added = k.ScaleKernel(of_points() + k.ScaleKernel(of_labels(), batch_shape=batch), batch_shape=batch)
    return added + k.ScaleKernel(of_points() * of_labels(), batch_shape=batch)


def orthogonal_additive(batch: torch.Size) -> Kernel:
    base = signature(OrthogonalAdditiveKernel).parameters["base_kernel"]
    own = {} if base.default is None else {"base_kernel": k.RBFKernel(batch_shape=batch)}  # BoTorch 0.16 has no default
    return OrthogonalAdditiveKernel(dim=D, batch_shape=batch, dtype=torch.float64, **own)


CLOSED, PARTS, GIVEN = "the kernel has a closed-form", "parts of the kernel", "upstream would factorize"

#: The kernel of a batch shape; its inputs; and the reason for the tensor path.
DENSE: dict[str, tuple[Callable[[torch.Size], Kernel], Callable[..., Tensor], str]] = {
    "constant and rbf": (lambda s: k.ConstantKernel(batch_shape=s) + k.RBFKernel(batch_shape=s), points, CLOSED),
    "matern and linear": (
        lambda s: k.MaternKernel(ard_num_dims=D, batch_shape=s) + k.ScaleKernel(k.LinearKernel(D, batch_shape=s)),
        points,
        CLOSED,
    ),
    "linear and linear": (
        lambda s: k.LinearKernel(batch_shape=s) + k.LinearKernel(batch_shape=s, active_dims=[0, 2]),
        points,
        CLOSED,
    ),
    "rbf times linear": (lambda s: k.RBFKernel(batch_shape=s) * k.LinearKernel(batch_shape=s), points, CLOSED),
    "linear times linear": (
        lambda s: k.LinearKernel(batch_shape=s) * k.LinearKernel(batch_shape=s, active_dims=[0, 2]),
        points,
        GIVEN,
    ),
    "polynomial": (lambda s: k.ScaleKernel(k.PolynomialKernel(2, batch_shape=s), batch_shape=s), points, GIVEN),
    "cosine": (lambda s: k.CosineKernel(active_dims=[0], batch_shape=s), points, CLOSED),
    "piecewise polynomial": (lambda s: k.PiecewisePolynomialKernel(2, batch_shape=s), points, GIVEN),
    "spectral mixture": (lambda s: k.SpectralMixtureKernel(2, D, batch_shape=s), points, GIVEN),
    "arc": (
        lambda s: k.ScaleKernel(k.ArcKernel(k.MaternKernel(batch_shape=s), ard_num_dims=D, batch_shape=s)),
        points,
        GIVEN,
    ),
    "cylindrical": (lambda s: k.CylindricalKernel(3, k.MaternKernel(batch_shape=s), batch_shape=s), points, GIVEN),
    "hamming": (lambda s: k.HammingIMQKernel(2), one_hot, GIVEN),
    "symmetrized KL": (lambda s: k.GaussianSymmetrizedKLKernel(batch_shape=s), points, GIVEN),
    "additive structure": (lambda s: k.AdditiveStructureKernel(k.RBFKernel(batch_shape=s), D), points, GIVEN),
    "product structure": (lambda s: k.ProductStructureKernel(k.RBFKernel(batch_shape=s), D), points, GIVEN),
    "scaled product structure": (
        lambda s: k.ScaleKernel(k.ProductStructureKernel(k.RBFKernel(batch_shape=s), D), batch_shape=s),
        points,
        GIVEN,
    ),
    "matern and product structure": (
        lambda s: k.MaternKernel(batch_shape=s) + k.ProductStructureKernel(k.RBFKernel(batch_shape=s), D),
        points,
        PARTS,
    ),
    "categorical": (lambda s: b.CategoricalKernel(ard_num_dims=D, batch_shape=s), labels, GIVEN),
    "mixed": (mixed, labels, PARTS),
    "infinite-width network": (lambda s: b.InfiniteWidthBNNKernel(2, batch_shape=s), points, GIVEN),
    "linear truncated fidelity": (
        lambda s: b.LinearTruncatedFidelityKernel([3], dimension=D, batch_shape=s),
        points,
        GIVEN,
    ),
    "downsampling": (
        lambda s: k.RBFKernel(active_dims=[0, 1], batch_shape=s) * b.DownsamplingKernel(active_dims=[3], batch_shape=s),
        points,
        PARTS,
    ),
    "exponential decay": (
        lambda s: k.RBFKernel(batch_shape=s) * b.ExponentialDecayKernel(active_dims=[3], batch_shape=s),
        points,
        PARTS,
    ),
    "orthogonal additive": (orthogonal_additive, points, GIVEN),
    "separate contexts": (lambda s: SACKernel({"a": [0, 1], "b": [2, 3]}, s), points, GIVEN),
    "embedded contexts": (lambda s: LCEAKernel({"a": [0, 1], "b": [2, 3]}, s), points, GIVEN),
    "a user's": (lambda s: OfAUser(batch_shape=s), points, GIVEN),
    "a user's, scaled": (lambda s: k.ScaleKernel(OfAUser(batch_shape=s), batch_shape=s), points, GIVEN),
    "a user's and matern": (
        lambda s: (
            k.MaternKernel(ard_num_dims=D, batch_shape=s) + k.ScaleKernel(OfAUser(active_dims=[1, 2], batch_shape=s))
        ),
        points,
        PARTS,
    ),
    "with a network": (lambda s: WithNetwork(batch_shape=s), points, GIVEN),
    "with a network, times rbf": (lambda s: k.RBFKernel(batch_shape=s) * WithNetwork(batch_shape=s), points, PARTS),
}
