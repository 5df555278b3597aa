"""Rows on disk. A case is written as soon as it is measured, so that an interrupted run goes on from there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .options import InputError
from .row import Case, Row


def read(path: Path) -> list[Row]:
    """Return the rows in the file at `path`; none if there is no file."""
    if not path.exists():
        return []
    try:
        return [Row.from_dict(flat) for flat in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not hold benchmark rows ({error}); move it away, or give another --output."
        ) from None


def recall(rows: list[Row], case: Case, now: Row) -> list[Row]:
    """Return those of `rows` that answer `case` under the conditions of `now`: same machine, versions and commit."""
    return [row for row in rows if row.case == case and row.conditions() == now.conditions()]


def write(path: Path, rows: list[Row]) -> None:
    """Write `rows` to `path`, one a line, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text("[\n" + ",\n".join(json.dumps(row.as_dict()) for row in rows) + "\n]\n")
    os.replace(draft, path)


def supersede(rows: list[Row], new: list[Row]) -> list[Row]:
    """Return `rows` with those of the same case and machine replaced by `new`, whatever commit they were of."""
    replaced = {(row.case, tuple(sorted(row.machine.items()))) for row in new}
    return [row for row in rows if (row.case, tuple(sorted(row.machine.items()))) not in replaced] + new
