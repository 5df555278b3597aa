"""Record the sources of what the overlay replaces or stands for: `python test/overlay/record_sources.py [FOLDER ...]`.

They are those of the GPyTorch that is installed, and of others that lie in folders, for instance of `pip install
--no-deps --target FOLDER gpytorch==1.15`. To be run for releases that the suite has passed with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "gpytorch" / "_tested.py"


def main(folders: list[Path]) -> None:
    sys.path.insert(0, str(ROOT))
    from gpytorch import _upstream

    for module in (ROOT / "gpytorch").rglob("*.py"):  # some are imported only when they are needed
        import_module(".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    sources: dict[str, set[str]] = {}
    names = [name for name in _upstream.checked if not name.startswith("torch.")]  # torch's are no part of a release
    for root in [_upstream._ROOT, *(folder / "gpytorch" for folder in folders)]:
        _upstream._ROOT = root
        for name, digest in _upstream.digests(names).items():
            sources.setdefault(name, set()).add(digest)
    head = FILE.read_text("utf-8").partition("SOURCES")[0]
    text = json.dumps({name: sorted(found) for name, found in sorted(sources.items())}, indent=4)
    FILE.write_text(f"{head}SOURCES: dict[str, list[str]] = {text}\n", "utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(FILE)], check=True)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
