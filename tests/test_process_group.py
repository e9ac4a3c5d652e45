"""Processes of one group."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import distributed

from shelfkern.process_group import process_group

# A process of its own: an op's first call must come after the group's beginning.
SCRIPT = """
import gc, weakref
import torch
from shelfkern.ops import upsample_argmax
from shelfkern.process_group import process_group

with process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1):
    group = weakref.ref(torch.distributed.group.WORLD)
    upsample_argmax(torch.randn(1, 2, 2, 2), (4, 4))
    assert group() is not None
gc.collect()
assert group() is None
"""


def test_no_group_outlives_its_use() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_error_leaves_the_group() -> None:
    store = distributed.HashStore()
    with pytest.raises(KeyError), process_group("gloo", store=store, rank=0, world_size=1):
        raise KeyError
    assert not distributed.is_initialized()
