"""The benchmarks are scripts, not a package; their folders go last, so that they hide nothing."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "ops"), str(ROOT / "tests" / "ops")]
