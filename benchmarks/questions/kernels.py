"""What does a training step gain with every kernel, and what could be had at all?

Beside the flag off and on stands a step written by hand: the kernel's own forward and backward by autograd, the
factorization and the inverse, and no module or operator but the kernel's between them. A closed form may do better; a
kernel without one cannot. What has structure stays upstream's, and is to take as long as with the flag off.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch.nn.functional import one_hot, softplus

import gpytorch
from gpytorch import kernels as k
from gpytorch import means, variational
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, MultitaskGaussianLikelihood

from ..shared.measuring import STOCK_MATRICES, Advance, Variant, check_same, fits, noted, rows_in_turn, steps_in
from ..shared.models import D, dense_at_every_n, loss_and_gradient, sample_problem, training_step
from ..shared.options import DTYPES, InputError, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row, machine_of
from ..shared.tables import IN_TURN, TIMES, Table, case_tables, conditions, over
from ..shared.ways import STOCK, TENSORS, run_in, takes_tensors

TITLE = "A training step with every kernel"
BY_HAND = "by hand"
_WITH_GRADIENT = "and gradient"
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
KRONECKER, VARIATIONAL = "KroneckerMultiTaskGP", "variational GP"
#: What keeps a structure, and stays upstream's.
LEFT = ("linear", "random features", "inducing points", "interpolated grid", "multitask", "coregionalization")
LEFT += (KRONECKER, VARIATIONAL)
_OF_BOTORCH = ("categorical", "mixed", "infinite", "linear truncated", "RBF x", "orthogonal", "separate", KRONECKER)


def available() -> tuple[str, ...]:
    """Return the names of the kernels and of the models, without BoTorch's where it is not installed."""
    has_botorch = find_spec("botorch") is not None
    return tuple(name for name in (*KERNELS, KRONECKER, VARIATIONAL) if has_botorch or not name.startswith(_OF_BOTORCH))


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


def _targets(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x).sum(-1) + 0.3 * torch.randn(x.size(0), generator=torch.Generator().manual_seed(0)).to(x)


class KernelGP(gpytorch.models.ExactGP):
    """A constant mean and the kernel of that name, of one output or several."""

    def __init__(self, name: str, x: torch.Tensor) -> None:
        kernel = _made(name, x.dtype).to(x)
        for part in kernel.modules():
            getattr(part, "_priors", {}).clear()  # some of BoTorch's bring their own
        outputs = kernel.num_outputs_per_input(x, x)
        y = _targets(x)
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


class VariationalGP(gpytorch.models.ApproximateGP):
    """A constant mean and an RBF kernel, with the first training points for inducing points."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        inducing_points = x[:20].clone()
        distribution = variational.CholeskyVariationalDistribution(len(inducing_points), mean_init_std=0)
        super().__init__(variational.VariationalStrategy(self, inducing_points, distribution))
        self.mean_module, self.covar_module = means.ConstantMean(), _scaled(k.RBFKernel)()
        self.likelihood, self.train_inputs, self.train_targets = GaussianLikelihood(), (x,), y
        self.to(x)

    def forward(self, x: torch.Tensor) -> MultivariateNormal:
        """Return the prior at `x`."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _model(name: str, x: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)  # some parameters begin at random
    y = _targets(x)
    if name == VARIATIONAL:
        return VariationalGP(x, y)
    if name == KRONECKER:
        return import_module("botorch.models").KroneckerMultiTaskGP(x, torch.stack([y, y.flip(0)], dim=-1))
    return KernelGP(name, x)


def _step(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
    bound = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=len(model.train_targets))
    return training_step(model, bound if isinstance(model, VariationalGP) else None)


def cases(options: Options) -> list[Case]:
    names = available() if options.sets is None else options.sets
    unknown = [name for name in names if name not in available()]
    if unknown:
        raise InputError(f"There is no kernel called {unknown[0]!r}; there are {', '.join(available())}.")
    return [
        Case("kernels", name, n, D, dtype, options.device, kernel="", settings=options.effort)
        for name in names
        for dtype in options.choose("dtypes", ("float64",))
        for n in options.choose("sizes", (30, 100, 500, 1000), quick=(30, 100))
        if n <= 100 or not name.endswith(_WITH_GRADIENT)  # of which there are seven rows a point
    ]


def by_hand(model: KernelGP) -> Callable[[], torch.Tensor]:
    """Return the step with nothing but the kernel's own operations and LAPACK's, for a model of one output.

    With K = L L^T and alpha = K^-1 (y - c), the gradient of the loss in K is (K^-1 - alpha alpha^T) / 2n.
    """
    (x,), y = model.train_inputs, model.train_targets
    raw_noise, constant = model.likelihood.noise_covar.raw_noise, model.mean_module.raw_constant
    bound, n = model.likelihood.noise_covar.raw_noise_constraint.lower_bound, len(y)
    parameters = list(model.parameters())

    def step() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        covar = model.covar_module(x).to_dense()
        noisy = covar.detach().clone()
        noisy.diagonal().add_(softplus(raw_noise.detach()) + bound)
        factor = psd_safe_cholesky(noisy)
        residual = (y - constant.detach()).unsqueeze(-1)
        alpha = torch.cholesky_solve(residual, factor)
        grad = torch.cholesky_inverse(factor).addmm_(alpha, alpha.mT, alpha=-1).div_(2 * n)
        covar.backward(grad)
        raw_noise.grad = (grad.trace() * torch.sigmoid(raw_noise)).detach()
        constant.grad = -alpha.sum().view_as(constant) / n
        deviance = (residual.mT @ alpha).squeeze() + 2 * factor.diagonal().log().sum() + n * math.log(2 * math.pi)
        return deviance / (2 * n)

    return step


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a step in every way, in turn."""
    rows_a_point = D + 1 if case.case.endswith(_WITH_GRADIENT) else 1
    if not fits(case, STOCK_MATRICES * rows_a_point**2):
        return []
    x = inputs_of(case.case, case.n, DTYPES[case.dtype], case.device)
    with dense_at_every_n(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants, results = steps_in((STOCK, TENSORS), partial(_model, case.case, x), _step)
        is_left = case.case in LEFT
        if takes_tensors(variants[TENSORS].run) == is_left:
            raise RuntimeError(f"The training step of {case} {'took' if is_left else 'did not take'} the tensor path.")
        model = _model(case.case, x)
        if not is_left and not model.is_multitask:
            variants[BY_HAND] = Variant(run_in(STOCK, by_hand(model)))
            results[BY_HAND] = loss_and_gradient(model, variants[BY_HAND].run)
        distances = check_same(results, case.dtype, f"loss and gradient, {case.case}, n = {case.n}")
        return rows_in_turn(case, "step", variants, options, advance, noted(distances))


def _of_table(row: Row) -> tuple:
    return row.case.n, row.case.device, machine_of(row), row.case.dtype, row.case.settings


def _title(row: Row) -> str:
    return f"{TITLE}: n = {row.case.n:,}, d = {D}, {row.case.dtype}, {conditions(row)}"


def tables(rows: list[Row]) -> list[Table]:
    name = {"kernel": lambda row, found: row.case.case + (" (left to upstream)" if row.case.case in LEFT else "")}
    return case_tables(
        sorted(rows, key=lambda row: row.case.n),
        _title,
        name | TIMES | {f"stock / {way}": over(STOCK, way) for way in (TENSORS, BY_HAND)},
        f"{IN_TURN} {BY_HAND.capitalize()}: the kernel's own forward and backward, and the factorization and inverse, "
        "with nothing around them.",
        key=_of_table,
    )


pictures = partial(
    dot_pictures,
    title=_title,
    what="Time",
    label=lambda row: row.case.case,
    key=_of_table,
    part=lambda row: (f"n{row.case.n}",),
)
