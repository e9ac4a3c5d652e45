from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read when the kernels are defined: without a GPU they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def no_earlier_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was tuned on this machine before must not choose for the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELFKERN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    """Layers as small as the tests' wait for a second thread; and no test depends on those before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch's convolutions of float32 are of TF32 by default, a thousand times less exact."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
