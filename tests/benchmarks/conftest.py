"""The scripts of benchmarks/ import each other as they do when one of them runs."""

from __future__ import annotations

import sys

from helpers.cli import ROOT

sys.path.append(str(ROOT / "benchmarks"))
