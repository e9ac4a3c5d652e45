import sys
from pathlib import Path

import pytest

from shelfkern.engine.gpu.algorithm import Context

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # for `engines`, `recording` and `models`


@pytest.fixture(autouse=True)
def torch_alone(request, monkeypatch):
    """Tests with the engine "torch" run every step through torch's own calls."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine") == "torch":
        monkeypatch.setattr(Context, "unavailable", lambda self, op, backend: "kernels are off in this test")
