import sys
from pathlib import Path

ENGINE = Path(__file__).parents[1]
sys.path[:0] = [str(ENGINE), str(ENGINE.parent / "ops")]  # for `models`, `test_quantization` and `parity`
