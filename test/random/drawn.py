"""Scripts that draw on much of GPyTorch: a model, and what a user does with it in turn, as text that can be run again.

A script defines `program(note, dtype)`, which calls `note(name, tensor)` for each number that it computes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

PREAMBLE = """
import copy, io, math, pickle
import torch
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models import kernels as bk
from botorch.models.kernels.infinite_width_bnn import InfiniteWidthBNNKernel
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import IIDNormalSampler
from gpytorch import kernels as k, likelihoods, means, mlls, settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ExactGP

class GP(ExactGP):
    def __init__(self, x, y, likelihood, mean, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel
    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

class OfAllPoints(means.Mean):
    def forward(self, x):
        return x.sum(-1) - x.mean((-2, -1), keepdim=True).squeeze(-1)

class Embeds(GP):
    def forward(self, x):
        return super().forward(torch.tanh(2 * x - 1))

def draw(kind, *shape, seed):
    return getattr(torch, kind)(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def scatter(module, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in module.parameters():
            factor = (0.3 * torch.randn(each.shape, generator=rng, dtype=torch.float64)).exp().to(each)
            each.mul_(factor).add_(0.1 * factor)  # what is positive stays so

def grads(note, value, tensors):
    found = torch.autograd.grad(value.sum(), tensors, allow_unused=True)
    note("gradients", torch.cat([each.reshape(-1) for each in found if each is not None] + [value.new_zeros(1)]))
    note("which have none", torch.tensor([float(each is None) for each in found]))
"""

# Kernels of one lengthscale or one for each dimension, and the rest; the second number is how often each is drawn.
STATIONARY = [
    ("k.RBFKernel({})", 4),
    ("k.MaternKernel(0.5, {})", 1),
    ("k.MaternKernel(1.5, {})", 2),
    ("k.MaternKernel(2.5, {})", 4),
    ("k.RQKernel({})", 2),
    ("k.PeriodicKernel({})", 2),
    ("k.PiecewisePolynomialKernel(q=2, {})", 1),
    ("bk.CategoricalKernel({})", 1),
]
OTHERS = [
    ("k.CosineKernel({})", 1),
    ("k.LinearKernel({})", 1),
    ("k.PolynomialKernel(power=2, {})", 1),
    ("k.ConstantKernel({})", 1),
    ("InfiniteWidthBNNKernel(depth=2, {})", 1),
    ("bk.DownsamplingKernel({})", 1),
    ("bk.ExponentialDecayKernel({})", 1),
    ("bk.LinearTruncatedFidelityKernel(fidelity_dims=[0], dimension={d}, {})", 1),
]
SETTINGS = [
    "settings.fast_pred_var()",
    "settings.detach_test_caches(False)",
    "settings.lazily_evaluate_kernels(False)",
    "settings.fast_computations(False, False, False)",
    "settings.debug(False)",
    "settings.skip_posterior_variances()",
    "settings.cholesky_jitter(1e-5, 1e-7)",
    "settings.observation_nan_policy('mask')",
    "settings.memory_efficient()",
    "settings.max_eager_kernel_size(4)",
]
COPIES = [
    "model = copy.deepcopy(model).eval()\nlikelihood = model.likelihood",
    "model.load_state_dict(copy.deepcopy(model.state_dict()))",
    "file = io.BytesIO()\ntorch.save((likelihood, model.train().eval()), file)\nfile.seek(0)\n"
    "likelihood, model = torch.load(file, weights_only=False)",
    """
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    scatter(model, 1)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    """,
]


@dataclass(frozen=True)
class Drawn:
    """A script, whether its numbers are rough for upstream too, and how many uses of the model it makes."""

    text: str
    dtype: str
    is_rough: bool
    uses: int


class _Script:
    # What is drawn so far
    def __init__(self, seed: int) -> None:
        self.rng, self.seed, self.lines = Random(seed), seed, []
        self.d, self.n = self.rng.randint(1, 4), self.rng.choice([1, 2, 5, 8, 15, 30])
        self.is_single = self.rng.random() < 0.25
        self.is_rough = False

    def one_of(self, pairs: Sequence[tuple[str, int]]) -> str:
        return self.rng.choices([each for each, _ in pairs], [weight for _, weight in pairs])[0]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def new_seed(self) -> int:
        return self.rng.randint(0, 2**16)

    def add(self, text: str) -> None:
        self.lines += textwrap.dedent(text).strip("\n").split("\n")

    def kernel(self, batch: tuple[int, ...], depth: int = 0) -> str:
        shape = f"batch_shape=torch.Size({list(batch)})"
        kind = self.one_of([("leaf", 3 + 3 * depth), ("scale", 4), ("sum", 1), ("product", 1)])
        if kind == "scale":
            return f"k.ScaleKernel({self.kernel(batch, depth + 1)}, {shape})"
        if kind in ("sum", "product"):
            left, right = self.kernel(batch, depth + 1), self.kernel(batch, depth + 1)
            self.is_rough |= kind == "product"
            return f"({left} {'+' if kind == 'sum' else '*'} {right})"
        leaf = self.one_of(STATIONARY if self.chance(0.85) else OTHERS)
        self.is_rough |= "0.5" in leaf
        options, dims = shape, self.d
        if self.d > 1 and self.chance(0.2) and "{d}" not in leaf:
            dims = self.d - 1
            options += f", active_dims={sorted(self.rng.sample(range(self.d), dims))}"
        if leaf in [each for each, _ in STATIONARY] and self.chance(0.5):
            options += f", ard_num_dims={dims}"
        return leaf.replace("{d}", str(self.d)).replace("{}", options)

    def make_gp(self) -> None:
        batch = self.rng.choice([(), (), (), (2,), (3, 2)])
        shape = f"batch_shape=torch.Size({list(batch)})"
        self.batch = batch
        self.add(f"""
        x = draw("rand", *{batch}, {self.n}, {self.d}, seed={self.new_seed()}).to(dtype)
        y = (torch.sin(5 * x.sum(-1)) + 0.3 * draw("randn", *{batch}, {self.n}, seed={self.new_seed()})).to(dtype)
        """)
        noise = self.rng.choice([0.01, 0.1, 0.3])
        likelihood = self.one_of(
            [
                (f"likelihoods.GaussianLikelihood({shape})", 4),
                (f"likelihoods.FixedNoiseGaussianLikelihood({noise} + 0.1 * y.abs())", 2),
                (
                    f"likelihoods.FixedNoiseGaussianLikelihood({noise} + 0.1 * y.abs(), learn_additional_noise=True, "
                    f"{shape})",
                    1,
                ),
            ]
        )
        mean = self.one_of(
            [
                (f"means.ConstantMean({shape})", 4),
                (f"means.ZeroMean({shape})", 1),
                (f"means.LinearMean({self.d}, {shape})", 1),
                ("OfAllPoints()", 1),
            ]
        )
        model = self.one_of([("GP", 5), ("Embeds", 1)])
        self.add(f"""
        likelihood = {likelihood}
        model = {model}(x, y, likelihood, {mean}, {self.kernel(batch)}).to(dtype)
        scatter(model, {self.new_seed()})
        """)
        if likelihood.startswith("likelihoods.G"):
            self.add(f"likelihood.noise = {noise}")
        self.noise = "noise=torch.full_like(targets, 0.2)" if "Fixed" in likelihood else ""
        self.is_fixed = "Fixed" in likelihood

    def make_botorch(self) -> None:
        self.batch, m = (), self.rng.choice([1, 1, 2])
        transforms = ""
        if self.chance(0.5):
            transforms += f", outcome_transform=Standardize({m})"
        if self.chance(0.5):
            transforms += f", input_transform=Normalize({self.d})"
        if transforms == "":
            transforms = ", outcome_transform=None"
        self.m = m
        self.add(f"""
        x = draw("rand", {self.n}, {self.d}, seed={self.new_seed()}).to(dtype)
        y = torch.sin(5 * x.sum(-1, keepdim=True)) + draw("rand", {self.n}, {m}, seed={self.new_seed()}).to(dtype)
        """)
        kind = self.one_of([("plain", 3), ("fixed", 1), ("kernel", 2), ("tasks", 2 if m == 1 and self.n > 1 else 0)])
        if kind == "tasks":
            self.add(f"""
            x = torch.cat([x, (torch.arange({self.n}) % 2).to(x).unsqueeze(-1)], dim=-1)
            model = MultiTaskGP(x, y, task_feature=-1, outcome_transform=None)
            """)
            self.d += 1
        elif kind == "kernel":
            kernel = self.kernel((m,) if m > 1 else ())
            self.add(f"model = SingleTaskGP(x, y, covar_module={kernel}{transforms})")
        else:
            noise = ", torch.full_like(y, 0.2)" if kind == "fixed" else ""
            self.add(f"model = SingleTaskGP(x, y{noise}{transforms})")
        self.add(f"""
        likelihood = model.to(dtype).likelihood
        scatter(model, {self.new_seed()})
        """)
        self.is_tasks, self.is_fixed = kind == "tasks", kind == "fixed"

    # What is done with a GP of GPyTorch's

    def points(self, count: int, name: str = "points", batch: tuple[int, ...] | None = None) -> str:
        batch = self.batch if batch is None else batch
        return f'{name} = draw("rand", *{batch}, {count}, {self.d}, seed={self.new_seed()}).to(dtype)'

    def trains(self) -> None:
        mll = self.one_of([("mlls.ExactMarginalLogLikelihood", 3), ("mlls.LeaveOneOutPseudoLikelihood", 1)])
        steps = self.rng.choice([1, 1, 3])
        self.add(f"""
        model.train()
        mll = {mll}(likelihood, model)
        params = [model.train_inputs] if isinstance(model, MultiTaskGP) else []
        optimizer = torch.optim.SGD(mll.parameters(), lr=0.01)
        for _ in range({steps}):
            optimizer.zero_grad()
            loss = -mll(model(*model.train_inputs), model.train_targets, *params)
            note("loss", loss)
            grads(note, loss, [*mll.parameters()])
            (-mll(model(*model.train_inputs), model.train_targets, *params)).sum().backward()
            optimizer.step()
        model.eval()
        """)

    def predicts(self, model: str = "model", batch: tuple[int, ...] | None = None) -> None:
        self.add(self.points(self.rng.choice([1, 3, 6]), batch=batch))
        self.add(f"""
        points.requires_grad_()
        posterior = {model}(points)
        note("mean", posterior.mean)
        note("variance", posterior.variance)
        note("covariance", posterior.covariance_matrix)
        grads(note, posterior.mean.sum() + posterior.variance.sum(), [points])
        """)

    def predicts_in_a_batch(self) -> None:
        self.predicts(batch=(4, *self.batch))

    def differentiates_in_parameters(self) -> None:
        self.add(self.points(3))
        self.add("""
        with settings.detach_test_caches(False):
            model.train().eval()
            posterior = model(points)
            grads(note, posterior.mean.sum() + posterior.variance.sum(), [*model.parameters()])
            model.train().eval()
        """)

    def samples(self) -> None:
        self.add(self.points(4))
        noise = ", noise=torch.full_like(points[..., 0], 0.2)" if self.is_fixed else ""
        self.add(f"""
        observed = likelihood(model(points){noise})
        base = draw("randn", 3, *observed.mean.shape, seed={self.new_seed()}).to(dtype)
        note("samples", observed.rsample(torch.Size([3]), base_samples=base))
        note("log_prob", observed.log_prob(torch.ones_like(observed.mean)))
        """)

    def fantasizes(self) -> None:
        count = self.rng.choice([1, 2])
        self.add(f"model(x[..., :1, :] + 0.01).mean\nfantasies = model\n{self.points(count, 'inputs')}")
        for _ in range(self.rng.choice([1, 1, 2])):
            self.add(f"""
            inputs = (inputs + 0.05).contiguous()
            targets = inputs.sum(-1).sin()
            fantasies = fantasies.get_fantasy_model(inputs, targets{", " + self.noise if self.noise else ""})
            """)
        self.predicts("fantasies")

    def changes_parameters(self) -> None:
        # Without the reset, what upstream predicts depends on which of its caches are there.
        self.add(f"scatter(model, {self.new_seed()})\nmodel.train().eval()")
        self.predicts()

    def has_new_data(self) -> None:
        if self.is_fixed:
            return self.predicts()
        self.add(f"model.set_train_data(*(lambda z: (z, z.sum(-1).cos()))({self.points(self.n)[9:]}), strict=False)")
        return self.predicts()

    def is_copied(self) -> None:
        self.add(self.rng.choice(COPIES))
        self.predicts()

    def moves(self) -> None:
        if self.is_single:
            self.add("dtype = torch.float64\nmodel = model.to(dtype)\nx, y = x.to(dtype), y.to(dtype)")
        self.add("model.train().eval()")
        self.predicts()

    # And with one of BoTorch's

    def posterior(self, model: str = "model", batch: tuple[int, ...] = ()) -> None:
        q = self.rng.choice([1, 3])
        self.add(self.points(q, batch=batch))
        if self.is_tasks:
            self.add("points[..., -1] = (torch.arange(points.size(-2)) % 2).to(points)")
        self.add(f"""
        points.requires_grad_()
        posterior = {model}.posterior(points, observation_noise={self.chance(0.3) and not self.is_fixed})
        note("mean", posterior.mean)
        note("variance", posterior.variance)
        grads(note, posterior.mean.sum() + posterior.variance.sum(), [points])
        base = draw("randn", 3, *posterior.mean.shape, seed={self.new_seed()}).to(dtype)
        """)

    def posterior_of_a_batch(self) -> None:
        self.posterior(batch=self.rng.choice([(3,), (2, 3)]))

    def conditions(self) -> None:
        self.add(f"model.posterior(x[:1] + 0 if {self.is_tasks} else x[:1] + 0.01).mean\n{self.points(2, 'inputs')}")
        if self.is_tasks:
            self.add("inputs[..., -1] = (torch.arange(inputs.size(-2)) % 2).to(inputs)")
        m = 1 if self.is_tasks else self.m
        noise = f", noise=torch.full(({2}, {m}), 0.2, dtype=dtype)" if self.is_fixed else ""
        self.add(f"""
        targets = inputs.sum(-1, keepdim=True).sin().expand(-1, {m})
        fantasies = model.condition_on_observations(inputs, targets{noise})
        """)
        self.posterior("fantasies")

    def changes_and_asks(self) -> None:
        self.add(f"scatter(model, {self.new_seed()})\nmodel.train().eval()")
        self.posterior()


GP_USES = [
    ("trains", 4),
    ("predicts", 5),
    ("predicts_in_a_batch", 2),
    ("differentiates_in_parameters", 1),
    ("samples", 2),
    ("fantasizes", 3),
    ("changes_parameters", 2),
    ("has_new_data", 1),
    ("is_copied", 1),
    ("moves", 1),
]
BOTORCH_USES = [
    ("trains", 3),
    ("posterior", 3),
    ("posterior_of_a_batch", 3),
    ("conditions", 2),
    ("changes_and_asks", 1),
]


def draw(seed: int) -> Drawn:
    """Draw a script.

    :param seed: What it is drawn by.
    """
    script = _Script(seed)
    is_botorchs = script.chance(0.3)
    script.make_botorch() if is_botorchs else script.make_gp()
    script.add("model.eval()")
    count = script.rng.randint(2, 5)
    for _ in range(count):
        use = script.one_of(BOTORCH_USES if is_botorchs else GP_USES)
        start = len(script.lines)
        getattr(script, use)()
        if script.chance(0.35):
            setting = script.rng.choice(SETTINGS)
            body = [f"    {line}" for line in script.lines[start:]]
            script.lines[start:] = [f"with {setting}:", *body]
        # Upstream's conjugate gradients draw probe vectors.
        script.lines[start:start] = [f"# {use.replace('_', ' ')}", "torch.manual_seed(0)"]
    # From the first to the last use: what is cached is of one way. BoTorch solves without conjugate gradients in part.
    if not is_botorchs and script.chance(0.1):
        script.is_rough = True
        script.lines = ["with settings.max_cholesky_size(6):", *(f"    {line}" for line in script.lines)]
    body = textwrap.indent("\n".join(script.lines), "    ")
    dtype = "float32" if script.is_single else "float64"
    return Drawn(f"{PREAMBLE}\ndef program(note, dtype):\n{body}\n", dtype, script.is_rough, count)
