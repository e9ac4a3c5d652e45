"""The benchmarks are scripts, not a package; their folder goes last, so that it hides nothing."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks" / "ops"), str(ROOT / "tests" / "ops")]
