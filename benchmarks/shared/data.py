"""Real data, for the question uci: what comes with scikit-learn, a folder of data sets, or a table of the user's."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import datasets

from .options import InputError, Options

FEWEST_ROWS = 10
TEST_SHARE = 0.2


@dataclass(frozen=True)
class DataSet:
    """A regression problem, standardized with the mean and standard deviation of its training rows."""

    name: str  # its name
    train_x: np.ndarray  # training inputs `(n, d)`
    train_y: np.ndarray  # training targets `(n,)`
    test_x: np.ndarray  # test inputs
    test_y: np.ndarray  # test targets

    @property
    def fingerprint(self) -> str:
        """A checksum: rows measured on other data of the same name are not reused."""
        arrays = (self.train_x, self.train_y, self.test_x, self.test_y)
        return f"{zlib.crc32(b''.join(np.ascontiguousarray(array).tobytes() for array in arrays)):08x}"


def load(options: Options) -> list[DataSet]:
    """Return the data sets that `options` name: a table, a folder, or else those that come with scikit-learn."""
    if options.csv is not None and options.data is not None:
        raise InputError("Give either --csv or --data, not both.")
    if options.csv is not None:
        return [_from_csv(options.csv, options.target)]
    if options.target is not None:
        raise InputError("--target names a column of a table; give the table with --csv FILE.")
    found = _embedded() if options.data is None else _from_folder(options.data, options.split, options.sets)
    if options.sets is None:
        return found
    unknown = set(options.sets) - {data.name for data in found}
    if unknown:
        names = ", ".join(data.name for data in found)
        raise InputError(f"No data set called {', '.join(sorted(unknown))}; there are {names}.")
    return [data for data in found if data.name in options.sets]


def _standardized(name: str, x: np.ndarray, y: np.ndarray, is_test: np.ndarray) -> DataSet:
    """Split and standardize; `name` is for messages, too."""
    train_x, train_y = x[~is_test], y[~is_test]
    if len(train_y) < 2 or len(train_y) == len(y):
        raise InputError(f"{name}: {len(train_y)} training and {len(y) - len(train_y)} test rows are too few.")
    if np.ptp(train_y) == 0:
        raise InputError(f"{name}: the target is constant ({train_y[0]:g}) on the training rows; nothing to learn.")
    constant = np.ptp(train_x, axis=0) == 0
    x = (x - train_x.mean(0)) / np.where(constant, 1.0, train_x.std(0))
    y = (y - train_y.mean()) / train_y.std()
    return DataSet(name, x[~is_test], y[~is_test], x[is_test], y[is_test])


def _random_split(rows: int) -> np.ndarray:
    """Return which rows are test rows: the same ones at every run."""
    is_test = np.zeros(rows, dtype=bool)
    is_test[np.random.default_rng(0).permutation(rows)[: max(1, round(TEST_SHARE * rows))]] = True
    return is_test


def _embedded() -> list[DataSet]:
    """Return data that comes with scikit-learn: nothing is downloaded."""
    iris = datasets.load_iris().data  # petal width from the flower's other three measures
    problems = {
        "iris": (iris[:, :3], iris[:, 3]),
        "diabetes": datasets.load_diabetes(return_X_y=True),
        "digits": datasets.load_digits(return_X_y=True),  # the number shown, from 64 pixels
    }
    return [_standardized(name, x, y.astype(float), _random_split(len(y))) for name, (x, y) in problems.items()]


def _read_table(path: Path, header: int | None) -> pd.DataFrame:
    if path.is_dir():
        raise InputError(f"{path} is a folder; a table is a file with comma-separated values.")
    try:
        table = pd.read_csv(path, header=header, skipinitialspace=True)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty.") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not a table of comma-separated values: {' '.join(str(error).split())}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes surplus values for row labels
        raise InputError(f"{path} is not a table: its lines hold more values than its header has names.")
    return table


def _numbers(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Return the table's values, or say which column is at fault."""
    for column, values in table.items():
        if not pd.api.types.is_numeric_dtype(values):
            odd = values[pd.to_numeric(values, errors="coerce").isna() & values.notna()]
            if len(odd):
                text = f"holds text ({str(odd.iloc[0])!r}); leave it out or encode it as numbers."
                raise InputError(f"{path}: column {column!r} {text}")
        bad = ~np.isfinite(values.to_numpy(dtype=float, na_value=np.nan))
        if bad.any():
            raise InputError(
                f"{path}: column {column!r} has {bad.sum()} missing or infinite value(s), first in data row "
                f"{bad.argmax() + 1}; remove these rows or fill them in."
            )
    return table.to_numpy(dtype=float)


def _from_csv(path: Path, target: str | None) -> DataSet:
    """Return the table at `path` with the target in column `target`, a fifth of its rows for testing."""
    table = _read_table(path, header=0)
    columns = ", ".join(map(str, table.columns))
    if target is None:
        raise InputError(f"Name the column to predict with --target; {path} has {columns}.")
    if pd.to_numeric(pd.Series(table.columns), errors="coerce").notna().all():
        raise InputError(f"{path} has no header: its first line is all numbers. Put a line of column names on top.")
    if target not in table.columns:
        raise InputError(f"{path} has no column {target!r}; it has {columns}.")
    if len(table.columns) < 2:
        raise InputError(f"{path} has no column but the target; at least one input is needed.")
    if len(table) < FEWEST_ROWS:
        raise InputError(f"{path} has too few rows: {len(table)}, and at least {FEWEST_ROWS} are needed.")
    _numbers(table, path)
    x, y = table.drop(columns=target).to_numpy(dtype=float), table[target].to_numpy(dtype=float)
    return _standardized(path.stem, x, y, _random_split(len(y)))


def _from_folder(folder: Path, split: int, names: tuple[str, ...] | None) -> list[DataSet]:
    """Return the data sets in the sub-folders of `folder` (of those called `names`), or the one in `folder` itself."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    single = (folder / "data.csv.gz").exists()
    subfolders = [folder] if single else sorted(file.parent for file in folder.glob("*/data.csv.gz"))
    if not subfolders:
        raise InputError(f"{folder} has no sub-folder with a data.csv.gz in it.")
    chosen = [f for f in subfolders if names is None or f.resolve().name in names]
    return [_from_subfolder(f, split) for f in chosen or subfolders]


def _from_subfolder(folder: Path, split: int) -> DataSet:
    data_path, mask_path = folder / "data.csv.gz", folder / "test_mask.csv.gz"
    values, masks = (_numbers(_read_table(path, header=None), path) for path in (data_path, mask_path))
    if len(masks) != len(values):
        raise InputError(f"{mask_path} has {len(masks)} rows, and data.csv.gz beside it has {len(values)}.")
    if not 0 <= split < masks.shape[1]:
        raise InputError(f"{mask_path} has splits 0 to {masks.shape[1] - 1}; there is no split {split}.")
    if values.shape[1] < 2:
        raise InputError(f"{data_path} has no column but the target; at least one input is needed.")
    return _standardized(folder.resolve().name, values[:, :-1], values[:, -1], masks[:, split] == 1)
