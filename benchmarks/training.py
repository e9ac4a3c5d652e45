"""Training steps on this machine, compared with torch's: forward, backward and optimiser step.

Run by `make bench-training`. A network trains with its recipe's loss on random labels: the real-time models
with three cross-entropies of the hardest pixels, the others with one of all pixels, an auxiliary one and the
presence of classes. Every variant is checked before it is timed: the loss and all gradients of a small batch
against float64, with at most twice the error of eager torch in the same dtype. Compiled variants draw other
random numbers for dropout: their loss must be within a twentieth of eager's. Variants of a case run
interleaved in one process; memory on a CPU is measured in a separate process for each variant.

The loss alone, of three heads, is also compared with torch's, in time and memory.

Rows go to benchmarks/results as JSON lines; `training_page.py` generates the tables of docs/training_speed.md
and of the README.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Clocks and metadata of the machine are shared with the op benchmarks.
sys.path.append(str(Path(__file__).parent / "ops"))

import resident
import rows
from cases import build
from harness import LABEL_BLOCK, random_labels
from measure import MIB, Deadline, Meter, OutOfTime, free, time_limit
from results import about

import shelfkern
from shelfkern import native
from shelfkern.nn import ShelfNet, ShelfNetOutput
from shelfkern.ops import Ohem, upsample_cross_entropy, upsample_cross_entropy_reference
from shelfkern.timing import median_ratio

RESULTS = Path(__file__).parent / "results"
FILES = {"cpu": "training_cpu.jsonl", "cuda": "training_gpu.jsonl"}
CASE_SECONDS = {"cpu": 5.0, "cuda": 1.0}
# Size of the small batch that is checked.
CHECKED_BATCH, CHECKED_EXTENT = 4, 96
# Number of such batches, of which the best counts: a rounding that flips one activation's sign changes all
# gradients by a thousandth, also in eager torch. A mistake affects every batch.
CHECKED_BATCHES = 6
# Limit of gradients where eager is as good as exact; and of a compiled variant's loss.
FLOOR, COMPILED_LIMIT = 1e-6, 0.05
# Weights of the auxiliary and the presence loss, as published.
AUXILIARY, PRESENCE = 0.5, 0.2
# The loss alone: strides of its heads, and classes.
HEADS, CLASSES = (8, 16, 32), 19
# With less time left no case is started.
LEAST_SECONDS = 3.0

Run = Callable[[], object]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to train, or with `model` "loss" the loss alone.

    Attributes:
        model: name of the model.
        batch, size: number and size of the images.
        dtype: "float32", or autocast's dtype.
        device: "cpu" or "cuda".
    """

    model: str
    batch: int
    size: tuple[int, int]
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """autocast's dtype."""
        return getattr(torch, self.dtype)

    def row(self) -> Row:
        """The fields that identify the case."""
        return dataclasses.asdict(self) | {"size": list(self.size)}

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.model} {self.batch} x {height} x {width} {self.dtype}"


# In order of importance, because the budget may end before the rest.
CASES = {
    "cpu": (
        ("shelfnet18_lw", 4, (256, 256)),
        ("shelfnet50", 2, (256, 256)),
        ("loss", 4, (512, 512)),
        ("shelfnet18_lw", 2, (512, 512)),
    ),
    "cuda": (
        ("shelfnet18_lw", 8, (1024, 1024)),
        ("loss", 8, (1024, 1024)),
        ("shelfnet50", 12, (512, 512)),
    ),
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a step.

    Attributes:
        channels_last: memory format of weights and images.
        compiled: whether it uses torch.compile.
        ours: whether it uses the fused ops and the loss of low-resolution scores.
    """

    channels_last: bool = True
    compiled: bool = False
    ours: bool = False


VARIANTS = {
    "eager": Variant(channels_last=False),
    "eager channels_last": Variant(),
    "torch.compile": Variant(compiled=True),
    "shelfkern": Variant(ours=True),
    "shelfkern, torch.compile": Variant(compiled=True, ours=True),
}


class Wrong(Exception):
    """A variant's result differs too much from the exact one."""


class Objective(nn.Module):
    """A network and its recipe's loss."""

    def __init__(self, model: ShelfNet, case: Case, ours: bool) -> None:
        super().__init__()
        self.model, self.device = model, case.device
        self.autocast = None if case.dtype in ("float32", "float64") else case.torch_dtype
        self.loss = upsample_cross_entropy if ours else upsample_cross_entropy_reference

    def forward(self, images: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """The loss for uint8 labels, and for the classes present in each image."""
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            found = self.model.forward_scores(images)
        size = self.model.padded_size(images.shape)
        if self.model.config.head != "linear":
            ohem = Ohem()
            heads = (found.scores, *found.aux)
            losses = [self.loss(scores, target, size, align_corners=True, ohem=ohem) for scores in heads]
            return torch.stack(losses).sum()
        return self._of_all_pixels(found, target, size, present)

    def _of_all_pixels(
        self, found: ShelfNetOutput, target: Tensor, size: tuple[int, int], present: Tensor
    ) -> Tensor:
        total = self.loss(found.scores, target, size, align_corners=True)
        for scores in found.aux:
            total = total + AUXILIARY * self.loss(scores, target, size, align_corners=True)
        if found.presence is None:
            return total
        presence = found.presence.to(present.dtype)
        return total + PRESENCE * F.binary_cross_entropy_with_logits(presence, present)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Random images, labels in blocks, a twentieth of them ignored, and classes present."""

    images: Tensor
    target: Tensor
    present: Tensor

    @classmethod
    def of(cls, case: Case, classes: int, seed: int = 0) -> Batch:
        """A batch that is the same in every run."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(case.batch, 3, *case.size, generator=generator)
        target = random_labels((case.batch, *case.size), classes, generator)
        blocks = target[:, ::LABEL_BLOCK, ::LABEL_BLOCK].long()
        present = F.one_hot(blocks.flatten(1) % 255 % classes, classes).amax(1).float()
        return cls(images.to(case.device), target.to(case.device), present.to(case.device))


class Step:
    """A variant's training step, ready to be called."""

    def __init__(self, variant: Variant, case: Case, checked: bool = False, seed: int = 0) -> None:
        self._variant, wide = variant, torch.float64 if case.dtype == "float64" else torch.float32
        # Calibrated as for the other benchmarks, because rounding errors of an untrained network grow from
        # block to block.
        model = copy.deepcopy(build(case.model)).to(case.device, wide).train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.1  # calibration leaves None, which breaks torch.compile's graph
        if checked:
            _without_chance(model)
        batch = Batch.of(case, model.config.num_classes, seed)
        images = batch.images.to(wide)
        if variant.channels_last:
            model, images = model.to(memory_format=torch.channels_last), _channels_last(images)
        if variant.ours:
            model = shelfkern.fuse_for_training(model)
        self._inputs = images, batch.target, batch.present.to(wide)
        self.objective = Objective(model, case, variant.ours)
        self._call = torch.compile(self.objective, dynamic=False) if variant.compiled else self.objective
        self._optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def backward(self) -> Tensor:
        """The loss, after storing its gradients in the parameters."""
        self._optimiser.zero_grad()
        loss = self._call(*self._inputs)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.backward()
        self._optimiser.step()
        return loss

    def gradients(self) -> Tensor:
        """All gradients, float64 on the CPU."""
        self.backward()
        found = (p.grad for p in self.objective.parameters() if p.grad is not None)
        return torch.cat([gradient.double().cpu().flatten() for gradient in found])


def _without_chance(model: nn.Module) -> None:
    """Disables dropout, and batch statistics in gates' norms, whose few means make them too sensitive."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        elif path.endswith("gate_bn"):
            module.eval()


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class Judge:
    """Compares variants of one case with float64.

    Attributes:
        limit: limit of the gradients' error relative to their norm.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        extents = [min(extent, CHECKED_EXTENT) for extent in case.size]
        self._small = dataclasses.replace(case, batch=CHECKED_BATCH, size=(extents[0], extents[1]))
        self._truths: dict[int, Tensor] = {}
        eager = [Variant(channels_last) for channels_last in (False, True)]
        self.limit = 2 * min(max(self._error(one, seed) for one in eager) for seed in range(2)) + FLOOR

    def _error(self, variant: Variant, seed: int) -> float:
        if seed not in self._truths:
            exact = dataclasses.replace(self._small, dtype="float64")
            self._truths[seed] = Step(Variant(), exact, checked=True, seed=seed).gradients()
        truth, found = self._truths[seed], Step(variant, self._small, checked=True, seed=seed).gradients()
        return ((found - truth).norm() / truth.norm()).item()

    def _best(self, variant: Variant) -> float:
        errors = []
        for seed in range(CHECKED_BATCHES):
            errors.append(self._error(variant, seed))
            if errors[-1] <= self.limit:
                break
        return min(errors)

    @functools.cached_property
    def _loss(self) -> float:
        return Step(Variant(), self._case).backward().item()

    def error_of(self, variant: Variant, step: Step) -> float:
        """Error of a variant's gradients relative to their norm; for a compiled one, of its first loss.

        Raises:
            Wrong: it is more than allowed.
        """
        if variant.compiled:
            error, limit = abs(step.backward().item() / self._loss - 1), COMPILED_LIMIT
        else:
            error, limit = self._best(variant), self.limit
        # This form of comparison treats NaN as wrong.
        if not error <= limit:
            raise Wrong(f"the error is {error:.3g}, at most {limit:.3g} is allowed")
        return error


class LossAlone:
    """The sum of three heads' losses, and its gradient."""

    def __init__(self, variant: Variant, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.scores = []
        for stride in HEADS:
            shape = (case.batch, CLASSES, *(extent // stride for extent in case.size))
            scores = torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)
            scores = _channels_last(scores) if variant.channels_last else scores
            self.scores.append(scores.requires_grad_())
        self._target, self._size = Batch.of(case, CLASSES).target, case.size
        self._loss = upsample_cross_entropy if variant.ours else upsample_cross_entropy_reference
        self._call = torch.compile(self._sum, dynamic=False) if variant.compiled else self._sum

    def _sum(self, *scores: Tensor) -> Tensor:
        losses = [self._loss(one, self._target, self._size, align_corners=True) for one in scores]
        return torch.stack(losses).sum()

    def __call__(self) -> Tensor:
        for scores in self.scores:
            scores.grad = None
        loss = self._call(*self.scores)
        loss.backward()
        return loss.detach()

    def gradients(self) -> Tensor:
        """All gradients, float64 on the CPU."""
        self()
        return torch.cat([one.grad.double().cpu().flatten() for one in self.scores if one.grad is not None])


class LossJudge:
    """`Judge` for the loss alone, whose scores have the case's dtype in every variant."""

    def __init__(self, case: Case) -> None:
        extents = [min(extent, CHECKED_EXTENT) for extent in case.size]
        self._small = dataclasses.replace(case, batch=2, size=(extents[0], extents[1]))
        exact = LossAlone(Variant(), self._small)
        exact.scores = [one.detach().double().requires_grad_() for one in exact.scores]
        self._truth = exact.gradients()
        self.limit = 2 * self._error(Variant()) + FLOOR

    def _error(self, variant: Variant) -> float:
        found = LossAlone(variant, self._small).gradients()
        return ((found - self._truth).norm() / self._truth.norm()).item()

    def error_of(self, variant: Variant, step: LossAlone) -> float:
        """Error of a variant's gradients relative to their norm.

        Raises:
            Wrong: it is more than allowed.
        """
        error = self._error(variant)
        if not error <= self.limit:
            raise Wrong(f"the error is {error:.3g}, at most {self.limit:.3g} is allowed")
        return error


def prepare(variant: Variant, case: Case) -> Step | LossAlone:
    """A variant of a case, ready to be called."""
    return LossAlone(variant, case) if case.model == "loss" else Step(variant, case)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A run: its variants, clock and deadline, and whether memory is measured."""

    variants: dict[str, Variant]
    meter: Meter
    deadline: Deadline
    memory: bool = False

    def case(self, case: Case) -> Iterator[Row]:
        """A row for each variant."""
        judge = LossJudge(case) if case.model == "loss" else Judge(case)
        found: dict[str, Row] = {}
        runs: dict[str, Run] = {}
        for name, variant in self.variants.items():
            found[name] = case.row() | {"variant": name, "ours": variant.ours, "reason": None}
            try:
                step = prepare(variant, case)
                found[name] |= {"error": judge.error_of(variant, step), "limit": judge.limit}
                runs[name] = step
                found[name] |= self._gpu_memory(step)
            except Wrong as wrong:
                found[name]["reason"] = f"wrong, not timed: {wrong}"
            except Exception as failure:
                found[name]["reason"] = _words(failure)
        times = self.meter.measure(runs) if runs else {}
        ours = times.get("shelfkern")
        for name, time in times.items():
            found[name] |= {
                "median_ms": _short(time.call.median * 1e3),
                "p10_ms": _short(time.call.quantile(0.1) * 1e3),
                "p90_ms": _short(time.call.quantile(0.9) * 1e3),
                "rounds": len(time.call.seconds),
                "images_per_s": _short(case.batch / time.call.median),
                "ours_times_faster": _short(median_ratio(time.call, ours.call)) if ours else None,
            }
        runs.clear()
        free()
        for name, row in found.items():
            yield row | (self._cpu_memory(name, case) if row["reason"] is None else {})

    def _gpu_memory(self, step: Run) -> Row:
        if self.meter.device == "cpu":
            return {}
        free()
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return {"memory_mib": round((torch.cuda.max_memory_allocated() - before) / MIB, 1)}

    def _cpu_memory(self, name: str, case: Case) -> Row:
        if self.meter.device != "cpu" or not self.memory:
            return {}
        task = json.dumps(case.row() | {"variant": name, "threads": torch.get_num_threads()})
        command = [sys.executable, __file__, "--alone", task]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {}
        return {"memory_mib": round(float(done.stdout.split()[-1]), 1)}


def alone(task: str) -> float:
    """Peak MiB of a variant's second call, beyond weights, momenta and inputs."""
    fields = json.loads(task)
    name, threads = fields.pop("variant"), fields.pop("threads")
    torch.set_num_threads(threads)
    step = prepare(VARIANTS[name], Case(**fields | {"size": tuple(fields["size"])}))
    # The first call compiles, loads libraries and creates momenta. Memory it left in allocators is returned,
    # and the high-water mark reset.
    step()
    free()
    native.give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident.peak()
    step()
    return resident.peak() - before


def _words(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"failed: {type(failure).__name__}: {lines[0][:300]}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def cases_of(
    device: str,
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    size: tuple[int, int] | None,
    batch: int | None,
) -> list[Case]:
    """The requested cases, by default all of a device."""
    return [
        Case(model, batch or images, size or extents, dtype, device)
        for dtype in dtypes or DTYPES[device]
        for model, images, extents in CASES[device]
        if model in (models or (model,))
    ]


def identity(row: Row) -> tuple[Any, ...]:
    """Key of a row's case."""
    return row["model"], tuple(row["size"]), row["batch"], row["dtype"]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--device", type=click.Choice(tuple(FILES)), default="cpu")
@click.option("--model", "models", multiple=True, help="A network, or loss; default: all of the device's.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(("float32", "bfloat16", "float16")))
@click.option("--variant", "names", multiple=True, type=click.Choice(tuple(VARIANTS)))
@click.option("--size", nargs=2, type=click.IntRange(32), help="In place of the cases' own.")
@click.option("--batch", type=click.IntRange(1), help="In place of the cases' own.")
@click.option("--seconds", default=float("inf"), help="After which the rest is skipped.")
@click.option("--case-seconds", type=float, help="Of timing a case.")
@click.option("--memory", is_flag=True, help="On a CPU also each variant's memory, in its own process.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/training_*.jsonl.")
@click.option("--resume", is_flag=True, help="Keeps OUT's rows and measures the cases that it lacks.")
@click.option("--alone", "task", hidden=True)
def main(
    device: str,
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    names: tuple[str, ...],
    size: tuple[int, int] | None,
    batch: int | None,
    seconds: float,
    case_seconds: float | None,
    memory: bool,
    out: Path | None,
    resume: bool,
    task: str | None,
) -> None:
    """Times training steps beside torch's, the most important cases first; replaces OUT."""
    if task is not None:
        click.echo(alone(task))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("device is cuda, but there is no GPU that torch can use")
    results = rows.ResultsFile(out or RESULTS / FILES[device], about(device), resume)
    done = {identity(row) for row in results.rows}
    variants = {name: variant for name, variant in VARIANTS.items() if name in (names or VARIANTS)}
    bench = Bench(variants, Meter(device, case_seconds or CASE_SECONDS[device]), Deadline(seconds), memory)
    for case in cases_of(device, models, dtypes, size, batch):
        if identity(case.row()) in done or bench.deadline.left < LEAST_SECONDS:
            continue
        try:
            with time_limit(bench.deadline.left):
                found = list(bench.case(case))
        except OutOfTime:
            click.echo(f"{case}: the time was spent")
            break
        results.add(found)
        done.add(identity(case.row()))
        click.echo("\n".join([f"{case}:", *map(described, found)]))
        torch.compiler.reset()
        free()


def described(row: Row) -> str:
    """A row as readable text."""
    if row["reason"] is not None:
        return f"  {row['variant']:26} {row['reason']}"
    memory = f", {row['memory_mib']:g} MiB" if "memory_mib" in row else ""
    ratio = row["ours_times_faster"]
    beside = "" if ratio is None else f", ours {ratio:.2f}x"
    spread = f"({row['p10_ms']:g}-{row['p90_ms']:g})"
    return f"  {row['variant']:26} {row['median_ms']:g} ms {spread}{beside}{memory}, error {row['error']:.1e}"


if __name__ == "__main__":
    main()
