"""The command line: ``python -m benchmarks [question] [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from .shared.models import KERNELS
from .shared.options import DTYPES, InputError, Options
from .shared.run import answer, question_called, show

MAIN_JOB = "uci"
QUESTIONS = {
    "uci": "the main job: train on real data with the flag off and on (runs if no question is given)",
    "train": "time of a training step against n",
    "kernels": "a training step with every kernel, and what could be had by hand (--sets picks kernels)",
    "attribution": "where the gain comes from: copy, operators, closed-form backward, kernel",
    "memory": "peak memory of a training step and of a prediction; the largest n that trains in a given memory",
    "predict": "time and memory of predictions, first and later calls",
    "fantasies": "making fantasies, and their first query",
    "batch": "batches of models",
    "bo": "BoTorch: fit, posterior, acquisition, a whole loop",
    "ax": "Ax's Client as people run it: seconds of its own work, and whose they are",
    "threshold": "a step beyond max_cholesky_size: stock's conjugate gradients against exact tensors",
    "peers": "value and gradient, and prediction, against other libraries",
    "accuracy": "rounding errors against a high-precision reference as conditioning worsens",
    "limits": "a step over the factorization alone, over GEMM, over a copy",
    "inverse": "the ways from a Cholesky factor to the inverse",
    "launches": "operators of a step; on CUDA its kernel launches and waits",
    "graph": "a step compiled, or captured as a CUDA graph",
    "parity": "whether a device computes what the CPU computes",
    "largest": "the largest n that trains, tried",
}
COMMANDS = {
    "report": "one page for this machine: what the flag gains, where, and whether to switch it on",
    "cuda": "all of it that needs a GPU, in one call of ten minutes, or --minutes; --device cpu --quick is a dry run",
    "readme": "write the recorded results into the README's tables",
}


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of GiB")
    return value


def _one_of(text: str, names: dict, **others: str) -> str:
    """Return one of `names`, or the one that one of `others` stands for."""
    text = others.get(text, text)
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
    return text


def _several(convert: Callable[..., object], *arguments: object, **others: str) -> Callable[[str], tuple]:
    """Return a converter of comma-separated values, for argparse."""
    return lambda text: tuple(convert(part.strip(), *arguments, **others) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12s} {about}" for name, about in {**QUESTIONS, **COMMANDS}.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="python -m benchmarks [question] [options]; --help lists them",
        description=f"Exact GPs with gpytorch.settings.use_torch_tensors off and on.\n\nquestions:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = [*QUESTIONS, *COMMANDS]
    parser.add_argument("question", nargs="?", default=MAIN_JOB, choices=choices, metavar="question", help="see above")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cpu; of the command cuda: cuda)")
    parser.add_argument("--dtype", dest="dtypes", type=_several(_one_of, DTYPES), help="float64, float32 or both")
    parser.add_argument("--n", dest="sizes", type=_several(_count), help="numbers of training points: 100,1000")
    kernel = _several(_one_of, KERNELS, matern52="matern")
    parser.add_argument("--kernel", dest="kernels", type=kernel, help="rbf, matern52 or both")
    parser.add_argument("--only", type=_several(str), help="only cases with one of these in the name: fit,qLogNEI")
    parser.add_argument("--quick", action="store_true", help="under two minutes: small sizes, few repetitions")
    parser.add_argument("--threads", type=_count, help="threads of torch (default: torch's choice)")
    parser.add_argument("--output", type=Path, help=f"folder of the results (default: {Options.output})")
    parser.add_argument("--minutes", type=_count, help="begin no further case after so many minutes (cuda)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is on record already")
    real = parser.add_argument_group("real data (uci)")
    real.add_argument("--data", type=Path, help="folder of folders with data.csv.gz and test_mask.csv.gz")
    real.add_argument("--sets", type=_several(str), help="only these data sets: energy,wine (kernels: these kernels)")
    real.add_argument("--split", type=int, default=0, help="column of test_mask.csv.gz (default: 0)")
    real.add_argument("--csv", type=Path, help="a table of yours, with a header; a fifth of its rows is for testing")
    real.add_argument("--target", help="the table's column to predict; all others are inputs")
    real.add_argument("--steps", type=_count, help="steps of Adam (default: 200, with --quick 20)")
    gibibytes = _several(_gibibytes)
    parser.add_argument("--memory", type=gibibytes, help="GiB in which to find the largest n (memory, largest)")
    parser.add_argument("--check", action="store_true", help="do not write, fail if the README is out of date (readme)")
    return parser


def _check_device(device: str, hint: str = "") -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {device!r} cannot be used here: {str(error).splitlines()[0]}{hint}") from None


def _run(arguments: argparse.Namespace) -> int:
    if arguments.question == "readme":
        from .readme import update

        return update(check=arguments.check)
    given = {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__}
    options = Options(**{name: value for name, value in given.items() if value is not None})
    hint = ""
    if arguments.question == "cuda" and arguments.device is None:
        options = replace(options, device="cuda")
        hint = ". `python -m benchmarks cuda --device cpu --quick` tries all but what only a GPU can count."
    _check_device(options.device, hint)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.question in COMMANDS:
        return import_module(f".{arguments.question}", __package__).write(options)
    question = question_called(arguments.question)
    show(question, answer(question, options), options)
    return 0


def main(words: list[str] | None = None) -> int:
    """Run the command line `words` and return its exit status."""
    arguments = _parser().parse_args(words)
    try:
        return _run(arguments)
    except InputError as error:
        print(f"python -m benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What was measured is kept; the same command goes on from there.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
