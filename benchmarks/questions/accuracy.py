"""How far are loss, gradient and posterior from the truth as conditioning worsens, with the flag off and on?

The truth is the same GP in 50 digits (mpmath), at the very numbers that the model holds: inputs, targets and raw
parameters are taken over from its tensors bit by bit, so that rounding on the way is all that is left to see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import mpmath
import numpy as np
import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning

import gpytorch

from ..shared.machine import stamp
from ..shared.measuring import Advance, distance
from ..shared.models import ExactGP, dense_at_every_n, mean_and_variance, sample_problem, training_step
from ..shared.options import DTYPES, Options
from ..shared.pictures import Curve, Panel, curve_pictures
from ..shared.rows import Case, Row, by_case, by_provider, grouped, machine_of
from ..shared.tables import WAY, Table, case_tables, listed
from ..shared.ways import STOCK, TENSORS, WAYS

DRAWS, QUICK_DRAWS = 5, 2
TITLE = "Rounding errors as conditioning worsens"
NOISES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
N, D, TEST_POINTS, DIGITS = 40, 2, 10, 50
WHAT = ("loss", "gradient", "mean", "variance")


def cases(options: Options) -> list[Case]:
    settings = f"{QUICK_DRAWS if options.quick else DRAWS} draws"
    return [
        Case("accuracy", f"noise {noise:g}", n, D, dtype, options.device, m=TEST_POINTS, settings=settings)
        for dtype in options.choose("dtypes", ("float64", "float32"))
        for n in options.choose("sizes", (N,), quick=(20,))
        for noise in NOISES
    ]


def _noise(case: Case) -> float:
    return float(case.case.split()[1])


def _model(case: Case, seed: int) -> ExactGP:
    # Numbers that both data types can hold.
    x, y = (t.to(DTYPES[case.dtype]) for t in sample_problem(case.n, case.d, torch.float32, case.device, seed=seed))
    model = ExactGP(x, y).to(x)
    noise = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive())
    model.likelihood = noise.to(x)
    model.likelihood.noise = _noise(case)
    return model


def _test_points(case: Case) -> torch.Tensor:
    x, _ = sample_problem(case.m, case.d, torch.float32, case.device, seed=1)
    return x.to(DTYPES[case.dtype])


def _elementwise(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return np.vectorize(function, otypes=[object])


def _exact(tensor: torch.Tensor) -> np.ndarray:
    return _elementwise(mpmath.mpf)(tensor.detach().cpu().double().numpy())


def _correlation(x1: np.ndarray, x2: np.ndarray, lengthscale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the RBF kernel and the squared scaled differences, by input, that it is made of."""
    squares = ((x1[:, None] - x2[None]) / lengthscale) ** 2
    return _elementwise(mpmath.exp)(-squares.sum(-1) / 2), squares


def _reference(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Return loss, gradient with respect to the raw parameters, mean and variance, in 50 digits until the last line."""
    model = _model(case, seed)
    with mpmath.workdps(DIGITS):
        x, y, test_x = _exact(model.train_inputs[0]), _exact(model.train_targets), _exact(_test_points(case))
        raw = {name.rsplit(".", 1)[-1]: _exact(parameter).reshape(-1) for name, parameter in model.named_parameters()}
        softplus = _elementwise(lambda value: mpmath.log1p(mpmath.exp(value)))
        slope = _elementwise(lambda value: 1 / (1 + mpmath.exp(-value)))
        lengthscale = softplus(raw["raw_lengthscale"])
        outputscale, noise = softplus(raw["raw_outputscale"])[0], softplus(raw["raw_noise"])[0]
        k, squares = _correlation(x, x, lengthscale)
        covariance = mpmath.matrix((outputscale * k + noise * np.eye(len(y), dtype=int)).tolist())
        factor = mpmath.cholesky(covariance)
        inverse = np.array((covariance**-1).tolist(), dtype=object).reshape(k.shape)
        residual = y - raw["raw_constant"][0]
        alpha = inverse @ residual
        logdet = 2 * sum(mpmath.log(factor[i, i]) for i in range(len(y)))
        loss = (residual @ alpha + logdet + len(y) * mpmath.log(2 * mpmath.pi)) / (2 * len(y))
        g = (inverse - np.outer(alpha, alpha)) / (2 * len(y))
        by_name = {
            "raw_noise": np.trace(g) * slope(raw["raw_noise"]),
            "raw_constant": np.array([-alpha.sum() / len(y)]),
            "raw_outputscale": (g * k).sum() * slope(raw["raw_outputscale"]),
        }
        by_scaled = ((g * k * outputscale)[..., None] * squares).sum((0, 1))  # by the logarithms of the lengthscales
        by_name["raw_lengthscale"] = by_scaled / lengthscale * slope(raw["raw_lengthscale"])
        cross = outputscale * _correlation(test_x, x, lengthscale)[0]
        answer = {
            "loss": np.array([loss]),
            "gradient": np.concatenate([by_name[name] for name in raw]),
            "mean": cross @ alpha + raw["raw_constant"][0],
            "variance": outputscale - ((cross @ inverse) * cross).sum(-1),
        }
        return {name: torch.as_tensor(values.astype(float)) for name, values in answer.items()}


def _computed(case: Case, seed: int) -> dict[str, torch.Tensor]:
    model = _model(case, seed)
    loss = training_step(model)()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    mean, variance = mean_and_variance(model.eval(), _test_points(case)).chunk(2)
    answer = {"loss": loss.reshape(1), "gradient": gradient, "mean": mean, "variance": variance}
    return {name: tensor.double().cpu() for name, tensor in answer.items()}


def _errors(case: Case, way: str, truths: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the root mean square, over the draws, of the distances from the truth; and whether jitter was added."""
    distances: dict[str, list[float]] = {name: [] for name in WHAT}
    with dense_at_every_n(), WAYS[way](), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for seed, truth in enumerate(truths):
                for name, value in _computed(case, seed).items():
                    distances[name].append(distance(value, truth[name]))
        except NotPSDError as error:
            return {"failed": str(error)}
    errors = {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in distances.items()}
    return {**errors, "jitter": any(issubclass(warning.category, NumericalWarning) for warning in caught)}


def measure(case: Case, options: Options, advance: Advance) -> list[Row]:
    """Return each way's distance from the reference, and whether it had to add jitter."""
    draws, truths = int(case.settings.split()[0]), []
    for seed in range(draws):
        truths.append(_reference(case, seed))
        advance((seed + 1) / draws)
    return [
        Row(case, way, "loss, gradient, posterior", values=_errors(case, way, truths), **stamp(case.device))
        for way in (STOCK, TENSORS)
    ]


def _alike(row: Row) -> tuple:
    return (row.case.device, machine_of(row), row.case.dtype, row.case.n, row.case.settings)


def _title(row: Row) -> str:
    return f"{TITLE}: RBF, n = {row.case.n}, d = {D}, {row.case.dtype}"


def tables(rows: list[Row]) -> list[Table]:
    errors = {
        name: lambda row, found, name=name: f"{row.values[name]:.1e}" if name in row.values else "failed"
        for name in WHAT
    }
    return case_tables(
        rows,
        _title,
        {"case": lambda row, found: row.case.case}
        | WAY
        | errors
        | {"jitter": lambda row, found: "yes" if row.values.get("jitter", True) else "no"},
        f"Distance from the reference in {DIGITS} digits, relative to its norm; root mean square over "
        f"{rows[0].case.settings} of the data. Jitter: whether the covariance needed some to be factorized (as "
        "upstream does it), which shows in the errors.",
        key=_alike,
        ways=(STOCK, TENSORS),
    )


def remarks(rows: list[Row]) -> list[str]:
    """Return a paragraph for each data type, to be quoted: whose errors are larger, and how large they grow."""
    return [_remark(group) for group in grouped(rows, _alike).values()]


def _remark(rows: list[Row]) -> str:
    cases = dict(sorted(by_case(rows).items(), key=lambda item: -_noise(item[0])))
    noises = [f"{_noise(case):g}" for case in cases]
    ends, averages = [], []
    for name in WHAT:
        errors = [[row.values.get(name) for row in (found[STOCK], found[TENSORS])] for found in cases.values()]
        errors = [pair for pair in errors if all(pair)]  # neither failed, neither is exact
        if errors:
            first, last = (" / ".join(f"{error:.0e}" for error in errors[place]) for place in (0, -1))
            ends.append(f"from {first} to {last} in the {name}")
            averages.append(f"{np.exp(np.mean([np.log(ours / theirs) for theirs, ours in errors])):.2f} in the {name}")
    sentences = [
        f"How far from the truth ({rows[0].case.dtype}, RBF, n = {rows[0].case.n}, {rows[0].case.settings}, against "
        f"{DIGITS} digits): as the noise falls from {noises[0]} to {noises[-1]}, relative errors grow, stock's / on "
        f"tensors, {listed(ends)}. On average over the noises (geometric mean) errors on tensors are those of stock "
        f"times {listed(averages)}."
        if ends
        else "There is no noise at which both ways gave an answer."
    ]
    for what, key in (("Jitter was added", "jitter"), ("The covariance was found not positive definite", "failed")):
        at = {
            way: [noise for noise, found in zip(noises, cases.values(), strict=True) if found[way].values.get(key)]
            for way in (STOCK, TENSORS)
        }
        where = [f"at noise {listed(found)} by {way}" for way, found in at.items() if found]
        if at[STOCK] == at[TENSORS] != []:
            where = [f"at noise {listed(at[STOCK])} by both alike"]
        sentences.append(f"{what} {listed(where) if where else 'by neither'}.")
    return " ".join(sentences)


def _panels(rows: list[Row]) -> list[Panel]:
    def curve(lines: list[Row], name: str) -> Curve:
        return Curve([_noise(row.case) for row in lines], [row.values[name] for row in lines])

    known = {name: by_provider([row for row in rows if name in row.values]) for name in WHAT}
    return [
        Panel(f"Relative error of the {name}", {way: curve(lines, name) for way, lines in by_way.items()})
        for name, by_way in known.items()
    ]


pictures = partial(
    curve_pictures,
    title=_title,
    panels=_panels,
    x_label="Noise variance",
    x_falls=True,
    key=_alike,
    part=lambda row: (f"n{row.case.n}",),
)
