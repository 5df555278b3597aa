"""What does a user of BoTorch gain? SingleTaskGP and MultiTaskGP as they come, on Hartmann's function of six variables.

BoTorch sets GPyTorch's settings when it is imported; they are left as BoTorch wants them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path

import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator

from .agreement import check_same, distance, noted
from .compare import both_times, case_tables, dot_pictures
from .measuring import rows_in_turn
from .models import loss_and_gradient
from .options import DTYPES, InputError, Options
from .row import Case, Row
from .show import Table, conditions, ratio, times
from .timing import Variant
from .ways import STOCK, TENSORS, run_in

try:
    from botorch.acquisition import AcquisitionFunction, LogExpectedImprovement, qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import MultiTaskGP, SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.sampling import SobolQMCNormalSampler
    from botorch.test_functions import Hartmann
    from botorch.version import version as botorch_version

    from gpytorch.distributions import MultivariateNormal
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.models.posterior_covariance import LazyCovariance
except ImportError as error:
    raise InputError("The question bo needs BoTorch: python -m pip install botorch.") from error

TITLE = "BoTorch"
MODEL = "SingleTaskGP unless named, Hartmann-6"
D = 6
ROUNDS, QUICK_ROUNDS, FIRST_POINTS = 10, 2, 12
CANDIDATES, TOGETHER, SAMPLES = 16, 4, 128

BY_HAND = "posterior by hand"

STEP = "value and gradient"
STEP_OF_TASKS = "value and gradient, MultiTaskGP of 2 tasks"
ACQUISITION = f"LogEI of {CANDIDATES} x 1 points, with gradient"
SAMPLED = f"qLogEI of {CANDIDATES} x {TOGETHER} points, {SAMPLES} samples, with gradient"
FIT, OPTIMIZE, LOOP = "fit_gpytorch_mll", "optimize_acqf", "whole loop"
BRANCHING = (FIT, OPTIMIZE, LOOP)  # their optimizers branch on rounding: results are compared, not held to a tolerance


def cases(options: Options) -> list[Case]:
    """Return one case for each data type, task and n."""
    sizes = options.choose("sizes", (30, 300))
    optimized = sizes[:1] if options.quick else sizes
    tasks = [(task, n) for task in (STEP, STEP_OF_TASKS, ACQUISITION, SAMPLED) for n in sizes]
    tasks += [(task, n) for task in (FIT, OPTIMIZE) for n in optimized] + [(LOOP, FIRST_POINTS)]
    settings = f"{options.effort}, BoTorch {botorch_version}"
    return [
        Case("bo", task, n, D, dtype, options.device, settings=settings)
        for dtype in options.choose("dtypes", ("float64",))
        for task, n in tasks
    ]


def _observations(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of a Sobol sequence and Hartmann's function at them, to be maximized."""
    x = torch.quasirandom.SobolEngine(D, scramble=True, seed=0).draw(case.n, dtype=torch.float64)
    x = x.to(dtype=DTYPES[case.dtype], device=case.device)
    return x, _hartmann(x)


def _hartmann(x: torch.Tensor) -> torch.Tensor:
    return Hartmann(negate=True).to(x)(x).unsqueeze(-1)


def _bounds(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])


def _parameters(model: SingleTaskGP) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).double().cpu() for parameter in model.parameters()])


def _step(case: Case) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    return _step_of(SingleTaskGP(*_observations(case)))


def _step_of_tasks(case: Case) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    x, y = _observations(case)
    tasks = torch.arange(case.n, device=x.device).remainder(2).unsqueeze(-1)
    torch.manual_seed(0)  # the covariance of the tasks begins at random
    model = MultiTaskGP(torch.cat([x, tasks.to(x)], dim=-1), y, task_feature=-1)
    return _step_of(model, list(model.train_inputs))  # its noise depends on the task


def _step_of(model: SingleTaskGP | MultiTaskGP, *params: object) -> tuple[Callable[[], torch.Tensor], Callable]:
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    mll.train()

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = -mll(model(*model.train_inputs), model.train_targets, *params)
        loss.backward()
        return loss.detach()

    return lambda: loss_and_gradient(model, step), lambda: None


def _fit(case: Case) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    model = SingleTaskGP(*_observations(case))
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    start = deepcopy(model.state_dict())

    def fit() -> torch.Tensor:
        fit_gpytorch_mll(mll)
        return _parameters(model)

    return fit, lambda: (model.load_state_dict(start), mll.train())


class _GPByHand(SingleTaskGP):
    """Its posterior is written by hand, in as few operations of torch as there are."""

    def __call__(self, x: torch.Tensor) -> MultivariateNormal:
        lengthscale, train, factor, alpha = self._of_training
        z = x / lengthscale
        cross = _rbf(z, train)
        half = torch.linalg.solve_triangular(factor, cross.flatten(0, -2).mT, upper=False).mT.view_as(cross)
        return MultivariateNormal(self.mean_module.constant + cross @ alpha, _CovarianceByHand(z, half))

    @cached_property
    def _of_training(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            lengthscale = self.covar_module.lengthscale
            train = self.train_inputs[0] / lengthscale
            covar = _rbf(train, train) + self.likelihood.noise * torch.eye(len(train)).to(train)
            factor = torch.linalg.cholesky(covar)
            residual = self.train_targets - self.mean_module.constant
            return lengthscale, train, factor, torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1)


class _CovarianceByHand(LazyCovariance):
    def __init__(self, z: torch.Tensor, half: torch.Tensor):
        super().__init__(torch.Size((*z.shape[:-1], z.size(-2))), z)
        self.z, self.half = z, half

    def _diagonal(self) -> torch.Tensor:
        return 1 - self.half.square().sum(-1)

    def evaluate_kernel(self) -> LinearOperator:
        return DenseLinearOperator(_rbf(self.z, self.z) - self.half @ self.half.mT)

    def _transpose_nonbatch(self) -> LinearOperator:
        return self


def _rbf(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    squares = z1.square().sum(-1, keepdim=True) + z2.square().sum(-1).unsqueeze(-2)
    return (z1 @ z2.mT - 0.5 * squares).exp()


def _log_ei(case: Case, of: type[SingleTaskGP] = SingleTaskGP) -> LogExpectedImprovement:
    x, y = _observations(case)
    return LogExpectedImprovement(of(x, y).eval(), best_f=y.max())


def _acquisition(
    case: Case, of: type[SingleTaskGP] = SingleTaskGP
) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    points, _ = _observations(case)
    return _gradient_of(_log_ei(case, of), points[:CANDIDATES].unsqueeze(1))


def _sampled(
    case: Case, of: type[SingleTaskGP] = SingleTaskGP
) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    x, y = _observations(case)
    sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=0)
    q_log_ei = qLogExpectedImprovement(of(x, y).eval(), best_f=y.max(), sampler=sampler)
    points = torch.stack([x.roll(i, dims=0)[:CANDIDATES] for i in range(TOGETHER)], dim=1)
    return _gradient_of(q_log_ei, points)


def _gradient_of(
    acquisition: AcquisitionFunction, points: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    points = (points + 0.01).requires_grad_(True)

    def evaluate() -> torch.Tensor:
        value = acquisition(points)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        return torch.cat([value.detach(), gradient.reshape(-1)]).double().cpu()

    return evaluate, lambda: None


def _optimize(case: Case) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    log_ei = _log_ei(case)
    bounds = _bounds(_observations(case)[0])

    def optimize() -> torch.Tensor:
        return optimize_acqf(log_ei, bounds, q=1, num_restarts=4, raw_samples=64)[0].double().cpu().reshape(-1)

    return optimize, lambda: torch.manual_seed(0)


def _rounds(case: Case) -> int:
    return QUICK_ROUNDS if case.settings.startswith("quick") else ROUNDS


def _round(x: torch.Tensor, y: torch.Tensor) -> tuple[LogExpectedImprovement, torch.Tensor]:
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    log_ei = LogExpectedImprovement(model, best_f=y.max())
    return log_ei, optimize_acqf(log_ei, _bounds(x), q=1, num_restarts=4, raw_samples=64)[0]


def _loop(case: Case) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    def loop() -> torch.Tensor:
        x, y = _observations(case)
        for _ in range(_rounds(case)):
            _, candidate = _round(x, y)
            x, y = torch.cat([x, candidate]), torch.cat([y, _hartmann(candidate)])
        return torch.cat([x.reshape(-1), y.max().reshape(1)]).double().cpu()

    return loop, lambda: torch.manual_seed(0)


def _candidates_apart(case: Case) -> float:
    """Return how far stock's LogEI holds the two ways' candidates apart, each round starting from the same data.

    From one round to the next optimizers amplify rounding: of loops of their own nothing could be said.
    """
    x, y = _observations(case)
    apart = 0.0
    for _ in range(_rounds(case)):
        candidates = {}
        for way in (TENSORS, STOCK):
            torch.manual_seed(0)
            log_ei, candidates[way] = run_in(way, partial(_round, x, y))()
        worth = log_ei(torch.stack([candidates[STOCK], candidates[TENSORS]])).detach()
        apart = max(apart, float((worth[1] - worth[0]).abs()))
        x, y = torch.cat([x, candidates[STOCK]]), torch.cat([y, _hartmann(candidates[STOCK])])
    return apart


TASKS = {
    STEP: _step,
    STEP_OF_TASKS: _step_of_tasks,
    ACQUISITION: _acquisition,
    SAMPLED: _sampled,
    FIT: _fit,
    OPTIMIZE: _optimize,
    LOOP: _loop,
}
OF_ANY_MODEL = (ACQUISITION, SAMPLED)


def measure(case: Case, options: Options, advance: Callable[[float], None]) -> list[Row]:
    """Time a task both ways, in turn, and compare what it finds."""
    variants, results = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's advice on scaling and restarts would tear the progress bar
        made = {way: TASKS[case.case](case) for way in (STOCK, TENSORS)}
        if case.case in OF_ANY_MODEL:
            made[BY_HAND] = TASKS[case.case](case, of=_GPByHand)
        for way, (run, prepare) in made.items():
            variants[way] = Variant(run_in(TENSORS if way == BY_HAND else way, run), prepare)
            prepare()
            results[way] = variants[way].run()
        if case.case not in BRANCHING:
            check_same(results, case.dtype, f"{case.case}, n = {case.n}")
        values = noted({way: distance(result, results[STOCK]) for way, result in results.items()})
        if case.case == LOOP:
            for way, result in results.items():
                values[way]["best"] = float(result[-1])
            values[TENSORS]["distance_from_stock"] = _candidates_apart(case)
        brief = case.case in BRANCHING
        return rows_in_turn(
            case, case.case, variants, options, advance, values, with_memory=not brief, least=3 if brief else 5
        )


def _lines(case: Case, found: dict[str, Row]) -> list[list[str]]:
    gain, most = (times(ratio(found[STOCK], found.get(other))) for other in (TENSORS, BY_HAND))
    apart = f"{found[TENSORS].values['distance_from_stock']:.0e}"
    return [[case.case, f"{case.n:,}", *both_times(found), gain, most, apart]]


def tables(rows: list[Row]) -> list[Table]:
    """Return one table for each data type."""
    return case_tables(
        rows,
        lambda row: f"{TITLE}: {MODEL}, {row.case.dtype}, {row.case.settings}; {conditions(row)}",
        ["task", "n", "stock (ms)", "tensors (ms)", "ratio", f"stock / {BY_HAND}", "distance of results"],
        _lines,
        f"Medians and [20 %, 80 %] quantiles, in turn. {BY_HAND.capitalize()}: of a model whose posterior is a few "
        "operations of torch, with nothing of GPyTorch's in between. Distance: of the numbers found, relative; in the "
        "loop, of what the candidates of both ways are worth to stock's acquisition function, each round from the same "
        f"data. The loop starts with {FIRST_POINTS} points and takes {ROUNDS} rounds ({QUICK_ROUNDS} in a quick run).",
    )


def pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Plot times and ratios, one picture for each data type."""
    return dot_pictures(
        rows,
        folder,
        lambda row: f"{TITLE}: {MODEL}, {row.case.dtype}; {conditions(row)}",
        "Time",
        label=lambda row: f"{row.case.case}, n = {row.case.n:,}",
    )
