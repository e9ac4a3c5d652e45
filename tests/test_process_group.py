"""Processes of one group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from shelfkern.process_group import process_group

SCRIPT = """
from pathlib import Path
import torch
from shelfkern.ops import upsample_argmax
from shelfkern.process_group import process_group

def threads():
    return sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm"))

with process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1):
    upsample_argmax(torch.randn(1, 2, 2, 2), (4, 4))
    print(threads())
print(threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads")
def test_no_thread_outlives_the_group() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    within, after = map(int, done.stdout.split())
    assert within > 0 and after == 0


def test_an_error_leaves_the_group() -> None:
    store = distributed.HashStore()
    with pytest.raises(KeyError), process_group("gloo", store=store, rank=0, world_size=1):
        raise KeyError
    assert not distributed.is_initialized()
