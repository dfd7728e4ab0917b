"""What is required of a table: its columns, and a row unless it may be empty."""

from __future__ import annotations

import pandas as pd
import pytest

from unmoved.core.errors import UnmovedError, require_columns


def test_a_table_needs_its_columns_and_a_row() -> None:
    table = pd.DataFrame({"a": [1], "b": [2]})
    require_columns(table, ("a", "b"), "x")
    with pytest.raises(UnmovedError, match=r"^x: expected a table with a, c, d, came none of c, d$"):
        require_columns(table, ("a", "c", "d"), "x")
    with pytest.raises(UnmovedError, match=r"^x: expected a table with a, came no row$"):
        require_columns(table[:0], (name for name in "a"), "x")
    require_columns(table[:0], ["a"], "x", may_be_empty=True)
    with pytest.raises(UnmovedError, match="came none of c"):
        require_columns(table[:0], ["c"], "x", may_be_empty=True)
