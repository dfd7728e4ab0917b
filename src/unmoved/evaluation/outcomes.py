"""Read, write, check and summarise the outcomes of an evaluation: a table with one row per sample and attack.

A sample counts as robust against an attack when its clean prediction is right and the attack did not succeed; success
is a wrong prediction within eps (a point outside, from a minimum-norm attack, does not count). ``by`` names what broke
the sample: a part of an ensemble, the attack itself, ``clean``, or ``none`` for a robust one. The worst case is taken
per sample, over all attacks: it is never above the accuracy under the strongest single attack.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError, require_columns
from unmoved.core.files import write_atomic

CLEAN, WORST = "clean", "worst case"
ROBUST = "none"


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        name: letters, digits and ``_``.
        dtype: of its values; ``object`` for names.
        older: a function of the other columns that makes this one for tables written without it; ``None`` if every
            table has it.
    """

    name: str
    dtype: type
    older: Callable[[pd.DataFrame], np.ndarray | pd.Series] | None = None


def _broken_by(table: pd.DataFrame) -> np.ndarray:
    """Name the attack itself where a table does not say which of its parts broke a sample."""
    by = table["attack"].where(table["clean_prediction"] == table["label"], CLEAN)
    return np.where(table["success"], by, ROBUST)


# A new column is a line here. The judge writes it; tables without it, and with columns of newer versions, can be read.
COLUMN_LIST = (
    Column("index", np.int64),
    Column("label", np.int64),
    Column("attack", object),
    Column("eps", np.float64),
    Column("norm", object),
    Column("clean_prediction", np.int64),
    Column("adversarial_prediction", np.int64),
    Column("distance", np.float64),
    Column("success", np.bool_),
    Column("by", object, older=_broken_by),
)
TYPES = {column.name: column.dtype for column in COLUMN_LIST}
COLUMNS = tuple(TYPES)
_REQUIRED = tuple(column.name for column in COLUMN_LIST if column.older is None)
EXPECTED = {np.int64: "an integer", object: "a name", np.float64: "a finite number >= 0", np.bool_: "True or False"}
EXACT = 2**53  # up to here whole numbers are exact as floats, in which pandas may hold them
MOST_TABLE = 2**28  # bytes: four million rows
MOST_HEADER, MOST_LINE = 1000, 2000  # bytes


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the outcomes as CSV, whole or not at all; floats come back bit for bit.

    Raises:
        UnmovedError: see `checked`; a full disk or a folder that cannot be written.
    """
    write_atomic(path, as_csv(table, str(path)))


def as_csv(table: pd.DataFrame, source: str = "outcomes") -> bytes:
    """Return the bytes that `write` writes."""
    return checked(table, source).to_csv(index=False, lineterminator="\n").encode()


def read(path: Path) -> pd.DataFrame:
    """Read outcomes that `write` wrote.

    Raises:
        UnmovedError: no such file, a file cut short, or what `checked` finds.
    """
    mend = "evaluate the run again to write it anew"
    try:
        data = untrusted.content(path, MOST_TABLE)
        if not data.endswith(b"\n"):
            raise UnmovedError(f"{path}: expected a line end after the last row, the file is cut short; {mend}")
        # Check the first line by itself, since pandas takes minutes over a header of a million columns.
        header = data[:MOST_HEADER].split(b"\n", 1)[0].rstrip(b"\r").decode().split(",")
        require_columns(pd.DataFrame(columns=header), _REQUIRED, str(path), may_be_empty=True)
        odd = [name for name in header if not name.isidentifier() or header.count(name) > 1]
        if odd or b"\n" not in data[:MOST_HEADER]:
            came = f"came a column {odd[0]!r:.80}" if odd else f"came a first line of more than {MOST_HEADER} bytes"
            raise UnmovedError(f"{path}: expected columns of different names in letters, digits and _, {came}; {mend}")
        longest = int(np.diff(np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")), prepend=-1).max())
        if longest > MOST_LINE:  # a row of a million values takes pandas minutes, too
            raise UnmovedError(f"{path}: expected lines of at most {MOST_LINE} bytes, came one of {longest}; {mend}")
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):  # pandas takes surplus values of every row for row names
            raise UnmovedError(f"{path}: expected {len(header)} values in a row, came more; {mend}")
    except FileNotFoundError:
        raise UnmovedError(f"{path}: expected an outcomes table, came no file; evaluate the run first") from None
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UnmovedError(
            f"{path}: expected an outcomes table in CSV, came {untrusted.brief(error)}; {mend}"
        ) from error
    return checked(table, str(path))


def checked(table: pd.DataFrame, source: str = "outcomes") -> pd.DataFrame:
    """Return the table with all `COLUMNS`, each of its type, after checking that its rows agree with each other.

    A column that older tables lack is made from the others; unknown columns follow, unchanged.

    Raises:
        UnmovedError: a missing column, a wrong type, no row; a sample twice under one attack and eps, or missing there;
            a sample with two labels or two clean predictions; several norms; a success that contradicts other columns.
    """
    require_columns(table, _REQUIRED, source)
    typed = {name: _typed(table[name], dtype, source) for name, dtype in TYPES.items() if name in table.columns}
    others = {name: table[name] for name in table.columns if name not in TYPES and str(name).isidentifier()}
    table = completed(pd.DataFrame(typed | others))
    reserved = {CLEAN, WORST} & set(table["attack"])
    if reserved:
        raise UnmovedError(f"{source}: attack name {min(reserved)!r} is a measure's name; call the attack otherwise")
    if table["norm"].nunique() > 1:
        raise UnmovedError(f"{source}: expected one norm, came {sorted(table['norm'].unique())}; one table per norm")
    _require_same_samples(table, source)
    wrong = table["adversarial_prediction"] != table["label"]
    slack = 1e-5 + 1e-4 * table["eps"]  # wider than any threat model's own tolerance for float32 rounding
    lie = (table["success"] & (~wrong | (table["distance"] > table["eps"] + slack))) | (
        ~table["success"] & wrong & (table["distance"] <= table["eps"])
    )
    if lie.any():
        row = table[lie].iloc[0]
        raise UnmovedError(
            f"{source}: success must be 'prediction is wrong and distance <= eps'; came success={row['success']} with "
            f"label {row['label']}, prediction {row['adversarial_prediction']}, distance {row['distance']:g}, "
            f"eps {row['eps']:g} (sample {row['index']}, attack {row['attack']!r})"
        )
    if ((table["by"] != ROBUST) != table["success"]).any():
        row = table[(table["by"] != ROBUST) != table["success"]].iloc[0]
        raise UnmovedError(
            f"{source}: by must be {ROBUST!r} where success is False and only there; came by={row['by']!r} with "
            f"success={row['success']} (sample {row['index']}, attack {row['attack']!r})"
        )
    return table


def completed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with all `COLUMNS` in order, missing ones made from the others, unknown ones last."""
    for column in COLUMN_LIST:
        if column.name not in table.columns and column.older is not None:
            table = table.assign(**{column.name: column.older(table)}).astype({column.name: column.dtype})
    return table[[*COLUMNS, *(name for name in table.columns if name not in TYPES)]]


def _typed(column: pd.Series, dtype: type, source: str) -> pd.Series:
    """Convert a column to its type, and raise `UnmovedError` at the first value that is none."""
    if dtype is object:
        typed, good = column, column.map(lambda value: isinstance(value, str) and value != "").to_numpy(bool)
    elif dtype is np.bool_:
        typed = column.map(lambda value: str(value) == "True")
        good = column.map(str).isin(["True", "False"]).to_numpy()
    else:
        typed = pd.to_numeric(column, errors="coerce")
        values = typed.to_numpy(float)
        good = np.isfinite(values)
        if dtype is np.int64:
            good &= (typed == typed.round()).to_numpy() & (np.abs(values) <= EXACT)
        else:
            good &= values >= 0
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise UnmovedError(
            f"{source}: column {column.name!r}, row {row + 1}: expected {EXPECTED[dtype]}, "
            f"came {column.iloc[row]!r:.80}; evaluate the run again"
        )
    return typed.astype(dtype)


def _require_same_samples(table: pd.DataFrame, source: str) -> None:
    """Raise `UnmovedError` unless each attack has each sample once, with one label and one clean prediction."""
    keys = ["attack", "eps"]
    twice = table.duplicated([*keys, "index"])
    if twice.any():
        row = table[twice].iloc[0]
        raise UnmovedError(f"{source}: sample {row['index']} stands twice under {row['attack']!r}, eps {row['eps']:g}")
    samples = table["index"].nunique()
    for (attack, eps), rows in table.groupby(keys, sort=False):
        if len(rows) != samples:
            raise UnmovedError(
                f"{source}: expected every attack on the same {samples} samples, came {len(rows)} under {attack!r}, "
                f"eps {eps:g}; evaluate all attacks on the same samples"
            )
    for name, within in (("label", ["index"]), ("clean_prediction", ["index", "eps"])):  # each eps may be a new pass
        kinds = table.groupby(within)[name].nunique()
        if (kinds > 1).any():
            sample = table.loc[table.groupby(within)[name].transform("nunique") > 1, "index"].iloc[0]
            raise UnmovedError(f"{source}: sample {sample} has {kinds.max()} different values of {name!r}")


def by_sample(table: pd.DataFrame, *, is_checked: bool = False) -> pd.DataFrame:
    """Make one row per sample: index, label, and whether it is right clean, under each attack, and in the worst case.

    Args:
        is_checked: the table is as `checked` or `read` returned it, and is not looked through again.

    Raises:
        UnmovedError: see `checked`; several eps (a worst case over different balls means nothing).
    """
    table = table if is_checked else checked(table)
    if table["eps"].nunique() > 1:
        raise UnmovedError(
            f"outcomes: expected one eps, came {sorted(table['eps'].unique().tolist())}; "
            "the worst case is taken within one ball; for several eps use curve_summary"
        )
    wide = table.drop_duplicates("index").set_index("index")[["label", "clean_prediction"]]
    wide[CLEAN] = wide["label"] == wide.pop("clean_prediction")
    attacks = list(table["attack"].unique())
    for attack in attacks:
        rows = table[table["attack"] == attack].set_index("index")
        wide[attack] = wide[CLEAN] & ~rows["success"]
    wide[WORST] = wide[attacks].all(axis=1)
    return wide.reset_index()


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a share.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes/n.

    Raises:
        UnmovedError: n < 1, successes outside 0..n, or a level outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n or not 0 < level < 1:
        raise UnmovedError(
            f"wilson: expected 0 <= successes <= n, n >= 1 and 0 < level < 1, "
            f"came successes={successes}, n={n}, level={level}"
        )
    # Not scipy's binomtest, whose import would cost each command and each worker a second.
    p, z = int(successes) / int(n), NormalDist().inv_cdf((1 + level) / 2)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def _counted(keys: dict[str, object], right: pd.Series) -> dict[str, object]:
    correct, n = int(right.sum()), len(right)
    low, high = wilson(correct, n)
    return {**keys, "correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}


def summary(table: pd.DataFrame, *, is_checked: bool = False) -> pd.DataFrame:
    """Summarise in rows "clean", each attack, "worst case"; columns measure, eps, correct, n, accuracy, low, high.

    ``low`` and ``high`` are the ends of a 95 % Wilson interval.

    Raises:
        UnmovedError: see `by_sample`.
    """
    samples, eps = by_sample(table, is_checked=is_checked), float(table["eps"].astype(float).iloc[0])
    return pd.DataFrame(
        [
            _counted({"measure": name, "eps": 0.0 if name == CLEAN else eps}, samples[name])
            for name in samples.columns[2:]
        ]
    )


def per_class(table: pd.DataFrame, *, is_checked: bool = False) -> pd.DataFrame:
    """Summarise two rows per class, "clean" and "worst case"; columns class, measure, correct, n, accuracy, low, high.

    Raises:
        UnmovedError: see `by_sample`.
    """
    return pd.DataFrame(
        [
            _counted({"class": label, "measure": name}, rows[name])
            for label, rows in by_sample(table, is_checked=is_checked).groupby("label")
            for name in (CLEAN, WORST)
        ]
    )


def curve_summary(table: pd.DataFrame, *, is_checked: bool = False) -> pd.DataFrame:
    """Summarise one row per attack and eps, ascending; columns attack, eps, correct, n, accuracy, low, high.

    Args:
        is_checked: see `by_sample`.

    Raises:
        UnmovedError: see `checked`.
    """
    table = table if is_checked else checked(table)
    robust = (table["clean_prediction"] == table["label"]) & ~table["success"]
    groups = robust.groupby([table["attack"], table["eps"]])
    return pd.DataFrame([_counted({"attack": attack, "eps": eps}, rows) for (attack, eps), rows in groups])


def across_seeds(
    tables: Sequence[pd.DataFrame], measure: Callable[[pd.DataFrame], pd.DataFrame] = summary
) -> pd.DataFrame:
    """Summarise several seeds of one recipe, one row per measure: the mean of the accuracies, and how they spread.

    Counts are not pooled: seeds share the test images, so their outcomes are not independent, and an interval of the
    pooled count would be too narrow. Each seed keeps its own Wilson interval; ``low`` and ``high`` are the lowest and
    the highest end of these. ``std`` divides by seeds - 1 and is NaN for a single seed.

    Args:
        tables: the outcomes of each seed.
        measure: `summary`, `per_class` or `curve_summary`, or a function that returns one of these tables.

    Returns:
        The measure's own key columns, then seeds, n (per seed; the smallest if they differ), accuracy, std, low, high.

    Raises:
        UnmovedError: no table; seeds with different attacks; see `checked`.
    """
    if not tables:
        raise UnmovedError("across_seeds: expected the outcomes of at least one seed, came none")
    rows = [measure(table) for table in tables]
    keys = list(rows[0].columns[: rows[0].columns.get_loc("correct")])
    attacked = [name for name in keys if name != "class"]  # a small sample may miss a class, never an attack
    for other in rows[1:]:
        first, second = (set(r[attacked].itertuples(index=False, name=None)) for r in (rows[0], other))
        if first != second:
            odd = min(first ^ second, key=str)
            raise UnmovedError(f"across_seeds: {odd} was measured for some seeds only; evaluate all seeds alike")
    groups = pd.concat(rows).groupby(keys, sort=False)
    return groups.agg(
        seeds=("n", "size"),
        n=("n", "min"),
        accuracy=("accuracy", "mean"),
        std=("accuracy", "std"),
        low=("low", "min"),
        high=("high", "max"),
    ).reset_index()
