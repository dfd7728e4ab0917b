"""The outcomes table: one row per sample and attack, on disk as CSV, and what may be said from it."""

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
