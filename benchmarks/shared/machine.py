"""The machine: what rows say of it (processor, threads, versions, commit, date; no host name), its free memory."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
MEASURED = (
    "gpytorch",
    "benchmarks/*.py",
)  # folders within as well; a change elsewhere (README, tests, results) leaves the rows valid


@cache
def versions() -> dict[str, str]:
    """Return the versions of what is measured."""

    def installed(distribution: str, missing: str) -> str:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return missing

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpytorch": installed("gpytorch", "unknown"),
        "linear_operator": installed("linear_operator", "unknown"),
        "overlay": installed("gpytorch-tensors", "checkout"),
    }


def _processor() -> str:
    """Return the processor's model; `platform` knows only its architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """Return what the time depends on: processor, threads, memory and, on CUDA, the GPU."""
    facts = {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@cache
def commit() -> str:
    """Return the last commit of the code that is measured, with a hash of what is not committed; or "unknown"."""
    try:
        last = _git("log", "-1", "--format=%h", "--", *MEASURED).strip()
        changes = _git("diff", "HEAD", "--", *MEASURED)
        for name in _git("ls-files", "--others", "--exclude-standard", "--", *MEASURED).splitlines():
            changes += name + (ROOT / name).read_text()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{last}+{hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else last


def stamp(device: str) -> dict[str, Any]:
    """Return the fields of a row that state its conditions."""
    return {
        "versions": versions(),
        "machine": machine(device),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),  # noqa: UP017 (Python 3.10 has no datetime.UTC)
    }


def synchronize(device: str) -> None:
    """Wait until `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def available_bytes(device: str) -> int:
    """Return how much memory is free on `device`."""
    if torch.device(device).type == "cuda":
        # What torch's allocator keeps for later is free to torch, though not to the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def release(device: str) -> None:
    """Give back the memory that torch's allocator keeps on `device` for later, where it does so."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
