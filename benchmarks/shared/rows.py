"""Picking rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from .row import Case, Row


def grouped(rows: list[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """Return `rows` by `key`, in the order in which the keys first come up."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def setting(row: Row) -> tuple:
    """Return what the lines of a table have in common: machine, data type, kernel, settings."""
    return (row.case.device, tuple(sorted(row.machine.items())), row.case.dtype, row.case.kernel, row.case.settings)


def setting_and_mode(row: Row) -> tuple:
    """Return :func:`setting` and the mode."""
    return (*setting(row), row.mode)


def by_provider(rows: list[Row]) -> dict[str, Row]:
    """Return rows of one case and mode by their provider."""
    return {row.provider: row for row in rows}


def by_case(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Return rows of one mode by their case, and each case's by their provider."""
    return {case: by_provider(together) for case, together in grouped(rows, lambda row: row.case).items()}


def providers(rows: list[Row]) -> list[str]:
    """Return the providers of `rows` in the order in which they first come up."""
    return list(dict.fromkeys(row.provider for row in rows))
