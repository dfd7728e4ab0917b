"""Read, write, check and summarise the outcomes of an evaluation: a table with one row per sample and attack."""

from unmoved.evaluation.outcomes import (
    COLUMNS,
    EXACT,
    EXPECTED,
    MOST_TABLE,
    ROBUST,
    TYPES,
    across_seeds,
    as_csv,
    by_sample,
    checked,
    curve_summary,
    per_class,
    read,
    summary,
    wilson,
    write,
)

__all__ = [
    "COLUMNS",
    "EXACT",
    "EXPECTED",
    "MOST_TABLE",
    "ROBUST",
    "TYPES",
    "across_seeds",
    "as_csv",
    "by_sample",
    "checked",
    "curve_summary",
    "per_class",
    "read",
    "summary",
    "wilson",
    "write",
]
