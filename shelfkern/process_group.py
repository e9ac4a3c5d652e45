"""Joining a torch.distributed process group, and leaving it cleanly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed


@contextmanager
def process_group(backend: str, **place: Any) -> Iterator[None]:
    """The process is in torch.distributed's default group while this is open.

    Args:
        backend: "gloo" or "nccl".
        place: what else `torch.distributed.init_process_group` takes; by default the environment says it.

    Raises:
        RuntimeError: the other processes cannot be reached.
    """
    # The first call of an op imports torch._dynamo, whose modules keep the group they find as the default of
    # functions. Its threads would outlive it, and abort the process if one of them frees a tensor at exit.
    import torch._dynamo  # noqa: F401

    distributed.init_process_group(backend, **place)
    try:
        yield
    finally:
        distributed.destroy_process_group()
