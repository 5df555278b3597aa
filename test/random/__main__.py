"""Run drawn scripts with the flag off and on: `python test/random [seconds of one core] [the first script's number]`.

What differs is printed as a script; `python test/random FILE` runs one again.
"""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (behind the path, so that the overlay comes first)
from differences import difference, routes  # noqa: E402
from drawn import Drawn, draw  # noqa: E402


def again(file: Path) -> int:
    """Run a script that was printed, and return the exit status."""
    text = file.read_text()
    dtype = "float32" if "# float32" in text else "float64"
    found = difference(Drawn(text, dtype, "rough" in text.partition("\n")[0], 0))
    print(found or "the same numbers")
    return int(found is not None)


def run(seconds: float, first: int) -> int:
    """Run scripts for so many seconds of one core, and return the exit status."""
    torch.set_num_threads(1)
    uses, failed, start = 0, 0, time.process_time()
    for seed in count(first):
        if time.process_time() - start > seconds:
            break
        drawn = draw(seed)
        uses += drawn.uses
        found = difference(drawn)
        if found is not None:
            failed += 1
            kind = f"{drawn.dtype}{', rough' if drawn.is_rough else ''}"
            print(f"# {kind}: script {seed}: {found}\n{drawn.text}", flush=True)
    cases = seed - first
    spent = time.process_time() - start
    print(f"{cases} scripts, {uses} uses, {routes()} on tensors, {spent:.0f} s of one core: {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    given = sys.argv[1:] or ["60"]
    if Path(given[0]).is_file():
        sys.exit(again(Path(given[0])))
    sys.exit(run(float(given[0]), int(given[1]) if len(given) > 1 else 0))
