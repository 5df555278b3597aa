"""Everything that needs a GPU, in a single call: tests, parity with the CPU, launches and waits, times, memory, graphs.

What is measured is kept as it comes, and the page is written anew after every section, so that a machine which is taken
away in the middle leaves what it had. A section that fails is reported with its traceback, and the others go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from xml.etree import ElementTree

import torch

from .questions.parity import differs
from .report import measured_on, section
from .shared.machine import ROOT, stamp
from .shared.options import InputError, Options
from .shared.rows import Row, read
from .shared.run import answer, question_called
from .shared.tables import Table, markdown_table, print_table, say

MINUTES = 8.5  # of ten that a call may take: the last case begun, and the pictures, come on top
TESTS_MINUTES, GRAPH_MINUTES = 2.5, 2.0
GRAPH_SIZES = (50, 200, 1000)
SIZES, QUICK_SIZES = (50, 200, 1000, 5000, 10000, 20000), (20, 50)
LARGEST_BATCH = 200  # of models with more points each a GPU is full
TIMED = {"train": "Training", "limits": "A step over the machine's limits", "predict": "Prediction", "batch": "Batches"}
QUESTIONS = {
    "parity": "Parity with the CPU",
    "launches": "Launches and waits",
    "graph": "Graphs",
    "inverse": "The inverse",
    "memory": "Memory",
    "largest": "Largest n that trains",
}
DRY = "a dry run on {}: what only CUDA can count is left out by name, and no time in it means anything"


@dataclass
class Run:
    """What a call was asked for, when it begins no further case, and what it has so far."""

    options: Options
    until: float
    facts: dict[str, object] = field(default_factory=dict)  # the environment
    tests: dict[str, object] = field(default_factory=dict)  # the outcome of the tests
    rows: dict[str, list[Row]] = field(default_factory=dict)  # the rows of each question
    failures: dict[str, str] = field(default_factory=dict)  # the tracebacks of what failed, by section

    def seconds(self, minutes: float) -> float:
        """Return the seconds that are left for something that may take so many minutes."""
        return max(30.0, min(minutes * 60, self.until - monotonic()))

    @property
    def wrong(self) -> list[str]:
        """What there is to say against it, a line each."""
        said = [f"The section {name!r} failed; its traceback stands at the end." for name in self.failures]
        if self.tests.get("failed"):
            said.append(f"{self.tests['failed']} tests failed; see tests.txt.")
        if any(map(differs, self.rows.get("parity", []))):
            said.append("Results differ from the CPU's.")
        return said


def environment(device: str) -> dict[str, object]:
    """Return what the results depend on, for the record."""
    facts: dict[str, object] = {**stamp(device), "device": device}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "device memory (GiB)": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "TF32 in products": torch.backends.cuda.matmul.allow_tf32,
            "linear algebra by": str(torch.backends.cuda.preferred_linalg_library()),
        }
    return facts


def outcome(report: Path) -> dict[str, object]:
    """Return how the tests of a JUnit report went: how many, how many failed, how many were skipped and why."""
    root = ElementTree.parse(report).getroot()
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in root.iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    )
    reasons = sorted({each.get("message", "") for each in root.iter("skipped")} - {""})
    return {"tests": tests, "failed": failures + errors, "skipped": skipped, "reasons": reasons}


def _run_tests(run: Run) -> None:
    """Run the tests that have `cuda` in their names, but for those of the benchmarks, in a process of their own."""
    folder = run.options.output
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda and not benchmarks", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.resolve()}", "test"]
    with (folder / "tests.txt").open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=run.seconds(TESTS_MINUTES)
        )
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {done.returncode} and left no report; see tests.txt.")
    run.tests = outcome(report)


def _run_graph(run: Run) -> None:
    """Ask the question `graph` in a process of its own: a capture that fails may leave the device unusable."""
    options = run.options
    sizes = QUICK_SIZES[:1] if options.quick else GRAPH_SIZES
    words = f"graph --quick --dtype float64 --device {options.device} --n {','.join(map(str, sizes))}".split()
    words += ["--output", str(options.output.resolve()), *(["--fresh"] if options.fresh else [])]
    command = [sys.executable, "-m", "benchmarks", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=run.seconds(GRAPH_MINUTES))
        if done.returncode:
            raise RuntimeError(f"python -m benchmarks graph ended with status {done.returncode}.")
    finally:  # cut off or not, what it has is kept
        run.rows["graph"] = read(options.output / "graph.json")


def _asked(*names: str, **chosen: object) -> Callable[[Run], None]:
    """Return what answers questions, and adds their rows to those that there are."""

    def ask(run: Run) -> None:
        for name in names:
            rows = answer(question_called(name), replace(run.options, **chosen), run.until)
            run.rows[name] = [*run.rows.get(name, []), *rows]

    return ask


def _plan(options: Options) -> list[tuple[str, Callable[[Run], None]]]:
    """Return the sections in their order: what decides first, then times from small n to large."""
    brief = {"quick": True}  # five rounds of each case, not eight seconds: all of it has ten minutes
    small = {"sizes": (20,)} if options.quick else {}
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    dtypes = {"dtypes": options.dtypes or ("float64", "float32")}
    plan = [
        ("parity", _asked("parity", **small)),
        ("tests", _run_tests),
        ("launches", _asked("launches", **small, **dtypes)),
    ]
    before_graph = max((n for n in sizes if n <= GRAPH_SIZES[-1]), default=sizes[0])
    for n in sizes:
        names = [name for name in TIMED if name != "batch" or n <= LARGEST_BATCH]
        if n == sizes[-1] and not options.quick:  # first what nothing else tells
            plan.append(("memory", _asked("memory", sizes=(1000, 5000), dtypes=("float64",))))
            plan.append(("largest", _asked("largest", dtypes=("float64",))))
        plan.append((f"inverse, n = {n:,}", _asked("inverse", sizes=(n,), **brief, **dtypes)))
        plan += [(f"{name}, n = {n:,}", _asked(name, sizes=(n,), **brief, **dtypes)) for name in names]
        if n == before_graph:
            plan.append(("graph", _run_graph))
    if options.quick:
        plan.append(("memory and largest", _asked("memory", "largest", sizes=(20,), dtypes=("float64",))))
    return plan


def _flat(facts: dict[str, object]) -> list[list[str]]:
    """Return facts, those within facts among them, as lines of name and value."""
    lines = []
    for name, value in facts.items():
        lines += _flat(value) if isinstance(value, dict) else [[str(name), str(value)]]
    return lines


def page(run: Run, pictures: Path | None) -> str:
    """Return the page that `run` makes so far, with pictures if there is a folder to draw them in."""
    device = run.options.device
    parts = [f"# gpytorch.settings.use_torch_tensors on {device}"]
    if torch.device(device).type != "cuda":
        parts.append(f"This is {DRY.format(device)}.")
    parts += measured_on([row for rows in run.rows.values() for row in rows])
    wrong = "\n".join(f"- **{line}**" for line in run.wrong)
    parts.append(wrong or "Nothing failed, and nothing differs from the CPU.")
    parts.append(markdown_table(Table("Environment", ["", ""], _flat(run.facts))))
    if run.tests:
        counts = ", ".join(f"{run.tests[name]} {name}" for name in ("tests", "failed", "skipped"))
        reasons = "".join(f"\n- skipped: {reason}" for reason in run.tests.get("reasons", []))
        parts.append(f"## Tests\n\n{counts}{reasons}")
    for name, title in {**QUESTIONS, **TIMED}.items():
        if run.rows.get(name):
            parts.append(section(title, [], question_called(name), run.rows[name], pictures))
    parts += [f"## Failed: {name}\n\n```\n{text}```" for name, text in run.failures.items()]
    return "\n\n".join(parts) + "\n"


def write(options: Options, minutes: float = MINUTES) -> int:
    """Do everything, and write the page, the environment, the rows and the tests' output into the output folder.

    :param minutes: After so many no further case is begun.
    :return: The exit status: 1 if something failed or differs from the CPU.
    """
    run = Run(options, until=monotonic() + (options.minutes or minutes) * 60)
    options.output.mkdir(parents=True, exist_ok=True)
    run.facts = environment(options.device)
    (options.output / "environment.json").write_text(json.dumps(run.facts, indent=1) + "\n")
    if torch.device(options.device).type != "cuda":
        say(f"This is {DRY.format(options.device)}.")
    target = options.output / "cuda.md"
    plan = _plan(options)
    started = monotonic()
    for number, (name, work) in enumerate(plan, 1):
        say(f"[{number}/{len(plan)}, {monotonic() - started:.0f} s] {name}")
        try:
            work(run)
        except InputError:
            raise
        except Exception:  # the other sections are worth having all the same; the status says that this one is not
            run.failures[name] = traceback.format_exc()
            say(run.failures[name])
        target.write_text(page(run, None))  # pictures take seconds, which belong to the GPU until the end
    target.write_text(page(run, options.output))
    for name in {**QUESTIONS, **TIMED}:
        for table in question_called(name).tables(run.rows[name]) if run.rows.get(name) else []:
            print_table(table)
    for line in run.wrong:
        say(line)
    say(f"Written: {target}")
    return int(bool(run.wrong))
