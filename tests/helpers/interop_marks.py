"""What the tests of other libraries share."""

from __future__ import annotations

import pytest

from unmoved import ThreatModel

# foolbox imports a name that scipy deprecates; ART divides by zero where it looks at its own inputs.
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
THREAT = ThreatModel("linf", 0.1)
