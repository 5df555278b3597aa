"""What does a user of BoTorch gain? Its models as they come, on Hartmann's function of six variables.

BoTorch sets GPyTorch's settings when it is imported; they are left as BoTorch wants them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from linear_operator.operators import BlockDiagLinearOperator, DenseLinearOperator, LinearOperator

from ..shared.measuring import Advance, Variant, check_same, distance, noted, rows_in_turn
from ..shared.models import D, loss_and_gradient
from ..shared.options import DTYPES, InputError, Options
from ..shared.pictures import dot_pictures
from ..shared.rows import Case, Row
from ..shared.tables import IN_TURN, TIMES_AND_RATIO, N, case_tables, conditions, over
from ..shared.ways import STOCK, TENSORS, run_in

try:
    from botorch import acquisition
    from botorch.acquisition import AcquisitionFunction
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP, MultiTaskGP, SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.posteriors import GPyTorchPosterior
    from botorch.sampling import SobolQMCNormalSampler
    from botorch.test_functions import Hartmann
    from botorch.version import version as botorch_version

    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from gpytorch.mlls import ExactMarginalLogLikelihood
except ImportError as error:
    raise InputError("The question bo needs BoTorch: python -m pip install botorch.") from error

TITLE = "BoTorch"
MODEL = "SingleTaskGP unless named, Hartmann-6"
ROUNDS, QUICK_ROUNDS, FIRST_POINTS = 10, 2, 12
CANDIDATES, SAMPLES, FANTASIES, DISCRETE = 16, 128, 16, 1000
THOMPSON, QUICK_THOMPSON, DRAWS = 5000, 500, 8
KEPT = 40  # of the points observed, where a noisy objective leaves so many that may be best

BY_HAND, KNOWING = "posterior by hand", "by hand, knowing the observed"

STEP = "value and gradient"
STEP_OF_TASKS = "value and gradient, MultiTaskGP of 2 tasks"
FITS = {"fit_gpytorch_mll": 1, "fit_gpytorch_mll, 2 outputs": 2, "fit_gpytorch_mll, 4 outputs": 4}
SAMPLING = f"{DRAWS} joint samples of m candidates"
OPTIMIZE, LOOP = "optimize_acqf", "whole loop"
# Optimizers branch on rounding, and the factor of a covariance that is all but singular magnifies it: such results are
# compared, not held to a tolerance.
BRANCHING = (*FITS, SAMPLING, OPTIMIZE, LOOP)


class Task(NamedTuple):
    """Work to be timed.

    :param result: Turns what `run` returns into the numbers to compare.
    """

    run: Callable[[], Any]  # the work
    prepare: Callable[[], object] = lambda: None  # what has to happen before each run and is not timed
    result: Callable[[Any], torch.Tensor] = lambda found: found.detach().reshape(-1).double().cpu()


def cases(options: Options) -> list[Case]:
    def at(task: str, *sizes: int) -> list[tuple[str, int]]:
        return [(task, n) for n in options.choose("sizes", sizes, quick=sizes[:1])]

    tasks = [*at(STEP, 30, 300), *at(STEP_OF_TASKS, 30, 300)]
    tasks += [each for task in FITS for each in at(task, 30, 50, 100, 300)]
    tasks += [each for task, asked in ACQUISITIONS.items() for each in at(task, *asked.sizes)]
    tasks += [*at(SAMPLING, 200, 500), *at(OPTIMIZE, 30, 300), (LOOP, FIRST_POINTS)]
    settings = f"{options.effort}, BoTorch {botorch_version}"
    m = {SAMPLING: QUICK_THOMPSON if options.quick else THOMPSON}
    return [
        Case("bo", task, n, D, dtype, options.device, m=m.get(task, 0), settings=settings)
        for dtype in options.choose("dtypes", ("float64",))
        for task, n in tasks
    ]


def _points(case: Case, count: int) -> torch.Tensor:
    """Return the first points of a Sobol sequence."""
    x = torch.quasirandom.SobolEngine(D, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return x.to(dtype=DTYPES[case.dtype], device=case.device)


def _observations(case: Case, outputs: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points and Hartmann's function at them, to be maximized; further outputs are it of inputs in turn."""
    x = _points(case, case.n)
    return x, torch.cat([_hartmann(x.roll(k, dims=-1)) for k in range(outputs)], dim=-1)


def _hartmann(x: torch.Tensor) -> torch.Tensor:
    return Hartmann(negate=True).to(x)(x).unsqueeze(-1)


def _best(function: AcquisitionFunction, x: torch.Tensor) -> torch.Tensor:
    """Return the candidate of the unit cube that `optimize_acqf` finds."""
    bounds = torch.stack([torch.zeros_like(x[0]), torch.ones_like(x[0])])
    return optimize_acqf(function, bounds, q=1, num_restarts=4, raw_samples=64)[0]


def _mll_of(model: SingleTaskGP | MultiTaskGP) -> ExactMarginalLogLikelihood:
    return ExactMarginalLogLikelihood(model.likelihood, model).train()


def _step_of_tasks(case: Case) -> Task:
    x, y = _observations(case)
    tasks = torch.arange(case.n, device=x.device).remainder(2).unsqueeze(-1)
    torch.manual_seed(0)  # the covariance of the tasks begins at random
    model = MultiTaskGP(torch.cat([x, tasks.to(x)], dim=-1), y, task_feature=-1)
    return _step_of(model, list(model.train_inputs))  # its noise depends on the task


def _loss(mll: ExactMarginalLogLikelihood, *params: object) -> torch.Tensor:
    return -mll(mll.model(*mll.model.train_inputs), mll.model.train_targets, *params)


def _step_of(model: SingleTaskGP | MultiTaskGP, *params: object) -> Task:
    mll = _mll_of(model)

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = _loss(mll, *params)
        loss.backward()
        return loss.detach()

    return Task(lambda: loss_and_gradient(model, step))


def _fit(case: Case) -> Task:
    mll = _mll_of(SingleTaskGP(*_observations(case, FITS[case.case])))
    start = deepcopy(mll.state_dict())

    @torch.no_grad()
    def loss(mll: ExactMarginalLogLikelihood) -> torch.Tensor:
        """Return the loss at the end: in flat directions parameters say nothing."""
        return _loss(mll.train()).reshape(-1).double().cpu()

    return Task(partial(fit_gpytorch_mll, mll), lambda: (mll.load_state_dict(start), mll.train()), loss)


class _Points(NamedTuple):
    """Points, scaled (... x q x D), with K(points, X) L^-T (... x q x N) and the posterior mean (... x q)."""

    z: torch.Tensor
    half: torch.Tensor
    mean: torch.Tensor


class _GPByHand(SingleTaskGP):
    """Its posterior is written by hand, in as few operations of torch as there are.

    Acquisition functions with a cached root ask for the points observed together with candidates, and read the rows of
    the latter. Of the former all is known beforehand, and nothing is differentiated in them, if :attr:`observed` says
    which they are: no model is told.
    """

    observed: torch.Tensor | None = None

    def posterior(self, X: torch.Tensor, observation_noise: bool = False, **_: object) -> GPyTorchPosterior:
        X = X.unsqueeze(-3) if self.num_outputs > 1 else X
        count = 0 if self.observed is None else self.observed.size(-2)
        if count and not (X.size(-2) > count and bool((X[..., :count, :] == self.observed).all())):
            count = 0
        points = self._at(X[..., count:, :])
        no = _Points(*(tensor.new_empty(0, tensor.size(-1)) for tensor in points[:2]), points.mean[..., :0])
        known = self._known if count else no
        mean = torch.cat([known.mean.expand(*points.mean.shape[:-1], count), points.mean], dim=-1)
        covar = _CovarianceByHand(points.z, points.half, known.z, known.half, self._of_training["scale"])
        if observation_noise:
            covar = covar.add_diagonal(self._of_training["noise"][..., 0])
        if self.num_outputs == 1:
            return GPyTorchPosterior(MultivariateNormal(mean, covar))
        joint = BlockDiagLinearOperator(covar, block_dim=-3)
        return GPyTorchPosterior(MultitaskMultivariateNormal(mean.mT, joint, interleaved=False))

    def _at(self, x: torch.Tensor) -> _Points:
        known = self._of_training
        z = x / known["lengthscale"]
        cross = known["scale"] * _rbf(z, known["z"])
        mean = known["constant"] + (cross @ known["alpha"]).squeeze(-1)
        return _Points(z, _solve(known["factor"], cross.mT).mT, mean)

    @cached_property
    def _known(self) -> _Points:
        return self._at(self.observed)

    @cached_property
    def _of_training(self) -> dict[str, torch.Tensor]:
        """What the training points leave behind, in the units of the observations (... x N x _)."""
        with torch.no_grad():
            per_output = (-1, 1) if self.num_outputs > 1 else (-1,)
            transform = self.outcome_transform
            shift, deviation = (t.view(per_output) for t in (transform.means, transform.stdvs))
            lengthscale = self.covar_module.lengthscale
            z, scale = self.train_inputs[0] / lengthscale, deviation.square().unsqueeze(-1)
            noise = scale * self.likelihood.noise.unsqueeze(-1)
            factor = torch.linalg.cholesky(scale * _rbf(z, z) + noise * torch.eye(z.size(-2)).to(z))
            constant = self.mean_module.constant.view(per_output)
            alpha = torch.cholesky_solve((deviation * (self.train_targets - constant)).unsqueeze(-1), factor)
            found = {"lengthscale": lengthscale, "z": z, "scale": scale, "noise": noise, "factor": factor}
            return found | {"alpha": alpha, "constant": shift + deviation * constant}


class _CovarianceByHand(LinearOperator):
    """The posterior covariance of known points, if any, and then of candidates, whose rows can be read alone."""

    def __init__(self, z, half, known_z, known_half, scale):
        super().__init__(z, half, known_z, known_half, scale)
        self.z, self.half, self.known_z, self.known_half, self.scale = z, half, known_z, known_half, scale

    def _size(self) -> torch.Size:
        m = self.known_z.size(-2) + self.z.size(-2)
        return torch.Size((*self.half.shape[:-2], m, m))

    def _diagonal(self) -> torch.Tensor:
        diagonals = [self.scale[..., 0] - half.square().sum(-1) for half in (self.known_half, self.half)]
        return torch.cat([diagonals[0].expand(*diagonals[1].shape[:-1], -1), diagonals[1]], dim=-1)

    def _rows(self) -> torch.Tensor:
        """Return the rows of the candidates."""
        return torch.cat(
            [
                self.scale * _rbf(self.z, z) - self.half @ half.mT
                for z, half in ((self.known_z, self.known_half), (self.z, self.half))
            ],
            dim=-1,
        )

    def to_dense(self) -> torch.Tensor:
        rows, count = self._rows(), self.known_z.size(-2)
        if not count:
            return rows
        known = self.scale * _rbf(self.known_z, self.known_z) - self.known_half @ self.known_half.mT
        top = torch.cat([known.expand(*rows.shape[:-2], -1, -1), rows[..., :count].mT], dim=-1)
        return torch.cat([top, rows], dim=-2)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        count = self.known_z.size(-2)
        start, stop, step = row_index.indices(self.size(-2)) if isinstance(row_index, slice) else (-1, 0, 1)
        if start < count or step != 1:
            return DenseLinearOperator(self.to_dense())._getitem(row_index, col_index, *batch_indices)
        return DenseLinearOperator(self._rows())._getitem(slice(start - count, stop - count), col_index, *batch_indices)

    # ModelListGP puts its models into a dimension of the batch: what is the same for all of the batch needs none.
    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return _CovarianceByHand(self.z.unsqueeze(dim), self.half.unsqueeze(dim), *self._args[2:])

    def _permute_batch(self, *dims: int) -> LinearOperator:
        z, half = (tensor.permute(*dims, -2, -1) for tensor in (self.z, self.half))
        return _CovarianceByHand(z, half, *self._args[2:])

    def _transpose_nonbatch(self) -> LinearOperator:
        return self

    def _matmul(self, rhs: torch.Tensor) -> torch.Tensor:
        return self.to_dense() @ rhs


def _solve(factor: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve for a batch (b x ... x N x q) of right-hand sides as for one of b times as many columns."""
    if rhs.dim() <= factor.dim():
        return torch.linalg.solve_triangular(factor, rhs, upper=False)
    columns = rhs.movedim(0, -2)  # ... x N x b x q
    return torch.linalg.solve_triangular(factor, columns.flatten(-2), upper=False).view(columns.shape).movedim(-2, 0)


def _rbf(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    squares = z1.square().sum(-1, keepdim=True) + z2.square().sum(-1).unsqueeze(-2)
    return (z1 @ z2.mT - 0.5 * squares).exp()


def _one_model(kind: type[SingleTaskGP], x: torch.Tensor, y: torch.Tensor) -> SingleTaskGP:
    return kind(x, y)


def _model_list(kind: type[SingleTaskGP], x: torch.Tensor, y: torch.Tensor) -> ModelListGP:
    return ModelListGP(*(kind(x, column) for column in y.split(1, dim=-1)))


def _sampler(samples: int = SAMPLES) -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(torch.Size([samples]), seed=0)


def _q_log_nei(
    model: Any, x: torch.Tensor, y: torch.Tensor, prune: bool = True, kept: int | None = None
) -> AcquisitionFunction:
    return acquisition.qLogNoisyExpectedImprovement(model, x[:kept], sampler=_sampler(), prune_baseline=prune)


def _q_log_nehvi(model: Any, x: torch.Tensor, y: torch.Tensor) -> AcquisitionFunction:
    reference = y.min(dim=0).values
    return qLogNoisyExpectedHypervolumeImprovement(model, reference, x, sampler=_sampler(), prune_baseline=True)


def _q_log_ei(model: Any, x: torch.Tensor, y: torch.Tensor) -> AcquisitionFunction:
    return acquisition.qLogExpectedImprovement(model, best_f=y.max(), sampler=_sampler())


def _log_ei(model: Any, x: torch.Tensor, y: torch.Tensor) -> AcquisitionFunction:
    return acquisition.LogExpectedImprovement(model, best_f=y.max())


class Acquisition(NamedTuple):
    """An acquisition function, its value and gradient at a batch of candidates."""

    make: Callable[[Any, torch.Tensor, torch.Tensor], AcquisitionFunction]  # makes it of a model and its data
    q: int  # how many candidates are judged together
    sizes: tuple[int, ...] = (200, 500)  # numbers of training points
    outputs: int = 1  # the model's outputs
    # makes the model, of a kind of model and its data
    model: Callable[[type[SingleTaskGP], torch.Tensor, torch.Tensor], SingleTaskGP | ModelListGP] = _one_model
    by_hand: bool = True  # whether a posterior is all that it asks the model for


SIZES = (30, 200, 500)
_q_log_nei_of_kept = partial(_q_log_nei, prune=False, kept=KEPT)
ACQUISITIONS = {
    "LogEI of 16 x 1 points, with gradient": Acquisition(_log_ei, 1, SIZES),
    "UCB of 16 x 1 points, with gradient": Acquisition(
        lambda model, x, y: acquisition.UpperConfidenceBound(model, beta=2.0), 1, SIZES
    ),
    "qLogEI of 16 x 1 points, with gradient": Acquisition(_q_log_ei, 1, SIZES),
    "qLogEI of 16 x 4 points, with gradient": Acquisition(_q_log_ei, 4, SIZES),
    "qLogNEI of 16 x 1 points, with gradient": Acquisition(_q_log_nei, 1, SIZES),
    "qLogNEI of 16 x 4 points, with gradient": Acquisition(_q_log_nei, 4, SIZES),
    f"qLogNEI of 16 x 1 points, with gradient, {KEPT} kept": Acquisition(_q_log_nei_of_kept, 1),
    f"qLogNEI of 16 x 4 points, with gradient, {KEPT} kept": Acquisition(_q_log_nei_of_kept, 4),
    "qLogNEI of 16 x 1 points, with gradient, nothing pruned": Acquisition(partial(_q_log_nei, prune=False), 1),
    "qLogNEHVI of 16 x 1 points, with gradient, 2 outputs": Acquisition(_q_log_nehvi, 1, outputs=2),
    "qLogNEHVI of 16 x 1 points, with gradient, ModelListGP": Acquisition(
        _q_log_nehvi, 1, outputs=2, model=_model_list
    ),
    "qKG of 16 x 1 points, with gradient": Acquisition(
        lambda model, x, y: acquisition.qKnowledgeGradient(model, FANTASIES, _sampler(FANTASIES)),
        1 + FANTASIES,
        by_hand=False,
    ),
    "qMES of 16 x 1 points, with gradient": Acquisition(
        lambda model, x, y: acquisition.qMaxValueEntropy(model, torch.rand(DISCRETE, D).to(x)), 1
    ),
}


def _acquisition(case: Case, by_hand: bool, knows_observed: bool) -> Task | None:
    asked = ACQUISITIONS[case.case]
    x, y = _observations(case, asked.outputs)
    model = asked.model(_GPByHand if by_hand else SingleTaskGP, x, y).eval()
    torch.manual_seed(0)  # which points a function prunes, or what it discretizes, is drawn
    function = asked.make(model, x, y)
    if knows_observed and not hasattr(function, "X_baseline"):
        return None
    if knows_observed:
        for part in getattr(model, "models", [model]):
            part.observed = function.X_baseline
    points = _points(case, CANDIDATES * asked.q).flip(0).view(CANDIDATES, asked.q, D).add(0.01).requires_grad_(True)

    def evaluate() -> torch.Tensor:
        value = function(points)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        return torch.cat([value.detach(), gradient.reshape(-1)])

    return Task(evaluate)


def _sampling(case: Case, by_hand: bool) -> Task:
    model = (_GPByHand if by_hand else SingleTaskGP)(*_observations(case)).eval()
    candidates = _points(case, case.n + case.m)[case.n :]

    @torch.no_grad()
    def sample() -> torch.Tensor:
        return model.posterior(candidates).rsample(torch.Size([DRAWS]))

    return Task(sample, lambda: torch.manual_seed(0))


def _optimize(case: Case) -> Task:
    x, y = _observations(case)
    return Task(partial(_best, _log_ei(SingleTaskGP(x, y).eval(), x, y), x), lambda: torch.manual_seed(0))


def _rounds(case: Case) -> int:
    return QUICK_ROUNDS if case.settings.startswith("quick") else ROUNDS


def _round(x: torch.Tensor, y: torch.Tensor) -> tuple[AcquisitionFunction, torch.Tensor]:
    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(_mll_of(model))
    log_ei = _log_ei(model, x, y)
    return log_ei, _best(log_ei, x)


def _loop(case: Case) -> Task:
    def loop() -> torch.Tensor:
        x, y = _observations(case)
        for _ in range(_rounds(case)):
            _, candidate = _round(x, y)
            x, y = torch.cat([x, candidate]), torch.cat([y, _hartmann(candidate)])
        return torch.cat([x.reshape(-1), y.max().reshape(1)])

    return Task(loop, lambda: torch.manual_seed(0))


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


NOT_BY_HAND = {
    STEP: lambda case: _step_of(SingleTaskGP(*_observations(case))),
    STEP_OF_TASKS: _step_of_tasks,
    OPTIMIZE: _optimize,
    LOOP: _loop,
} | dict.fromkeys(FITS, _fit)


def _task(case: Case, provider: str) -> Task | None:
    """Return the work of `case`, or None where it cannot be done by hand."""
    by_hand = provider in (BY_HAND, KNOWING)
    if case.case in ACQUISITIONS and (ACQUISITIONS[case.case].by_hand or not by_hand):
        return _acquisition(case, by_hand, provider == KNOWING)
    if case.case == SAMPLING and provider != KNOWING:
        return _sampling(case, by_hand)
    return None if by_hand else NOT_BY_HAND[case.case](case)


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Time a task both ways, and by hand, in turn, and compare what it finds."""
    variants, results, brief = {}, {}, case.case in BRANCHING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's advice on scaling and restarts would tear the progress bar
        for provider in (STOCK, TENSORS, BY_HAND, KNOWING):
            way = STOCK if provider == STOCK else TENSORS
            task = run_in(way, partial(_task, case, provider))()
            if task is None:
                continue
            variants[provider] = Variant(run_in(way, task.run), task.prepare)
            task.prepare()
            results[provider] = run_in(STOCK, partial(task.result, variants[provider].run()))()
        if not brief:
            check_same(results, case.dtype, f"{case.case}, n = {case.n}")
        values = noted({provider: distance(result, results[STOCK]) for provider, result in results.items()})
        if case.case == LOOP:
            for provider, result in results.items():
                values[provider]["best"] = float(result[-1])
            values[TENSORS]["distance_from_stock"] = _candidates_apart(case)
        return rows_in_turn(
            case, case.case, variants, options, advance, values, with_memory=not brief, least=3 if brief else 5
        )


def _label(case: Case) -> str:
    return case.case.replace(" m ", f" {case.m:,} ")


tables = partial(
    case_tables,
    title=lambda row: f"{TITLE}: {MODEL}, {row.case.dtype}, {row.case.settings}; {conditions(row)}",
    columns={"task": lambda row, found: _label(row.case)}
    | N
    | TIMES_AND_RATIO
    | {
        **{f"stock / {provider}": over(STOCK, provider) for provider in (BY_HAND, KNOWING)},
        "distance of results": lambda row, found: f"{found[TENSORS].values['distance_from_stock']:.0e}",
    },
    caption=f"{IN_TURN} {BY_HAND.capitalize()}: of a model whose posterior is a few operations of torch, with nothing "
    "of GPyTorch's in between (of ModelListGP, each of its models). Knowing the observed: it is told which points "
    "those are, and differentiates nothing in them. Functions keep of the points observed those that may be best, "
    f"unless nothing is pruned, or they are given {KEPT} and keep them. Samples: {SAMPLES}; fantasies of qKG: "
    f"{FANTASIES}. Distance: of the numbers found, relative; of a fit the loss at its end; in the loop, of what the "
    "candidates of both ways are worth to stock's acquisition function, each round from the same data. The loop starts "
    f"with {FIRST_POINTS} points and takes {ROUNDS} rounds ({QUICK_ROUNDS} in a quick run).",
)
pictures = partial(
    dot_pictures,
    title=lambda row: f"{TITLE}: {MODEL}, {row.case.dtype}; {conditions(row)}",
    what="Time",
    label=lambda row: f"{_label(row.case)}, n = {row.case.n:,}",
)
