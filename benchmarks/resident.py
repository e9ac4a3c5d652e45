"""Peak memory of one variant on a CPU, in a process of its own that holds nothing else.

The parent writes the variant's starting point: a runtime's own file, or ours, and for torch the model. So the
peak covers loading that and calling it: no export, and for torch.compile no C++ compiler, which runs in other
processes and whose output the parent left in the cache.
Peaks are the kernel's high-water mark of the process's memory map: getrusage's would include the parent's,
from which it was forked.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Calls before the peak is read: torch.compile runs its graph unchanged from the third on.
CALLS = 4
SECONDS = 300
STATUS = Path("/proc/self/status")
FOLDER = Path(__file__).parent

Task = dict[str, Any]


def of(peer: Any, model: Any, images: Any, case: Any) -> dict[str, float]:
    """A variant's memory as from `measure`; for ours also `memory_with_model_mib`, beyond what was there
    before.

    That is for a process which accelerates a model, and keeps it, instead of loading a file.

    Raises:
        RuntimeError: as for `measure`.
    """
    task = task_of(peer, model, images, case)
    found = measure(task)
    if task.pop("network", None):
        found["memory_with_model_mib"] = measure(task)["memory_net_mib"]
    return found


def measure(task: Task) -> dict[str, float]:
    """A variant's memory, MiB: peak `memory_mib`, and `memory_net_mib` beyond what was there before.

    Before it there are the interpreter, the imported libraries and the images.

    Args:
        task: result of `task_of`.

    Raises:
        RuntimeError: the process failed; the message has its last line.
    """
    command = [sys.executable, __file__, json.dumps(task)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"its memory was not measured within {SECONDS} s") from None
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or ["no word"]
    if run.returncode != 0:
        raise RuntimeError(f"its memory was not measured: {lines[-1][:300]}")
    before, peak = json.loads(lines[-1])
    return {"memory_mib": round(peak, 1), "memory_net_mib": round(peak - before, 1)}


def task_of(peer: Any, model: Any, images: Any, case: Any) -> Task:
    """The process's input, after writing the files that it names."""
    import numpy as np
    import torch
    from peers.cpu_runtimes import Runtime, read
    from peers.exported import folder
    from peers.ours import Shelfkern

    task = {
        "peer": peer.key,
        "dtype": case.dtype,
        "labels": case.labels,
        "tune": getattr(peer, "tune", False),
    }
    task["threads"] = torch.get_num_threads()
    if isinstance(peer, Runtime):
        images = read(images)
        file = peer.file(model, images, case.torch_dtype, case.labels)
        np.save(folder() / "images.npy", images.numpy())
        return task | {"runtime": peer.key, "file": str(file), "images": str(folder() / "images.npy")}
    if case.dtype == "int8":
        task["range_images"] = str(folder() / "range_images.pt")
        torch.save(peer.range_images(case.size), task["range_images"])
    if isinstance(peer, Shelfkern):
        task["network"] = str(folder() / "network.safetensors")
        peer.accelerated(model, images, case.torch_dtype).save(task["network"])
    torch.save(model, folder() / "model.pt")
    torch.save(images, folder() / "images.pt")
    return task | {"file": str(folder() / "model.pt"), "images": str(folder() / "images.pt")}


def main() -> None:
    """Runs a task; prints the peaks before and after, in MiB, as the last line."""
    task = json.loads(sys.argv[1])
    make = _runtime(task) if "runtime" in task else _torch(task)
    before = peak()
    run = make()
    for _ in range(CALLS):
        run()
    print(json.dumps([before, peak()]))


def _runtime(task: Task) -> Callable[[], Callable[[], object]]:
    import importlib

    import numpy as np
    from sessions import RUNTIMES

    importlib.import_module(task["runtime"])
    images = np.load(task["images"])
    return lambda: RUNTIMES[task["runtime"]](Path(task["file"]), images, task["threads"], task["dtype"])


def _torch(task: Task) -> Callable[[], Callable[[], object]]:
    sys.path.append(str(FOLDER / "ops"))
    import torch
    from peers import of_device

    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    (peer,) = (peer for peer in of_device("cpu", bool(task["tune"])) if peer.key == task["peer"])
    images = torch.load(task["images"])
    if "range_images" in task and "network" not in task:
        found = torch.load(task["range_images"])
        peer = dataclasses.replace(peer, range_images=lambda size: found)

    def make() -> Callable[[], object]:
        if "network" in task:
            return peer.loaded(task["network"], images, task["labels"])
        model = torch.load(task["file"], weights_only=False)
        return peer.prepare(model, images, getattr(torch, task["dtype"]), task["labels"])

    return make


def peak() -> float:
    """Peak memory of this process so far, MiB."""
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(kib) / 1024


if __name__ == "__main__":
    main()
