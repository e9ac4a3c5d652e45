"""Whole networks on this machine, compared with their peers: run by `make bench` and `make bench-cpu`.

Every variant is first checked against eager torch in float32, and not timed if it is wrong. Variants of one
case run interleaved in one process, with the case's number of threads. On a CPU each variant's memory is
measured in a process of its own (`resident.py`).

Rows go to benchmarks/results as JSON lines; `table.py` generates the tables of the README and docs/cpu.md
from them, and `plot.py` draws them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from torch import Tensor

# Clocks, ceilings and plans' shapes are shared with the op benchmarks.
sys.path.append(str(Path(__file__).parent / "ops"))

import breakdown
import resident
import rows
from cases import MODELS, SHIPPED, Case, Matrix, build, images_of
from clocks import Ceilings
from judge import Judge, Wrong
from measure import Deadline, Footprint, Meter, OutOfTime, free, threads_of, time_limit
from peers import Peer, Run, chosen, of_device
from peers.ours import Call
from results import about

from shelfkern.nn import ShelfNet

RESULTS = Path(__file__).parent / "results"
FILES = {"cpu": "models_cpu.jsonl", "cuda": "models_gpu.jsonl"}
# Exit status after a kernel broke the CUDA context, handled by gpu.sh; --resume then continues.
CONTEXT_LOST = 70
LOST = "broke the CUDA context"
CASE_SECONDS = {"cpu": 5.0, "cuda": 1.0}
# Time reserved for timing while variants are prepared; with less than twice this no case is started.
LEAST_SECONDS = 3.0
# Left out by --quick: they compile or search for minutes.
SLOW = ("max-autotune", "tensorrt")


class ContextLost(Exception):
    """A kernel broke the CUDA context: this process can measure no more."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A run: its variants, clocks and deadline.

    Attributes:
        ceilings: peak rates for each number of threads in the cases.
        tune: whether ours may time its algorithms first.
        memory: whether each variant's memory on a CPU is measured, in cases with all threads.
    """

    peers: list[Peer]
    meter: Meter
    ceilings: Mapping[int | None, Ceilings]
    deadline: Deadline
    tune: bool = True
    memory: bool = False

    def case(self, case: Case, broken: set[str]) -> list[rows.Row]:
        """Rows of all variants of a case.

        broken: names of variants to leave out, because they broke the CUDA context before.
        """
        model = build(case.model)
        images = images_of(case, model)
        with time_limit(self.deadline.left):
            judge = Judge(model, images, case)
        outcomes: dict[str, rows.Outcome] = {}
        runs: dict[str, Run] = {}
        for peer in self.peers:
            if peer.name in broken:
                continue
            outcomes[peer.name], run = self._prepared(peer, model, images, case, judge)
            if run is not None:
                runs[peer.name] = run
            if self.meter.context_lost():
                lost = dataclasses.replace(outcomes[peer.name], reason=LOST)
                raise ContextLost([rows.row(case, peer, lost, None, self.ceilings[case.threads])])
        try:
            self._time(runs, outcomes)
        except RuntimeError as error:
            if self.meter.context_lost():
                raise ContextLost([rows.skipped(case, LOST)]) from error
            raise
        found = [peer for peer in self.peers if peer.name in outcomes]
        # Free this process's copies before starting other processes.
        runs.clear()
        free()
        for peer in found:
            if self._memory_wanted(case) and outcomes[peer.name].times is not None:
                memory = self._resident(peer, model, images, case)
                outcomes[peer.name] = dataclasses.replace(outcomes[peer.name], memory=memory)
        ours = next((outcomes[peer.name].times for peer in found if peer.ours), None)
        every = [
            rows.row(case, peer, outcomes[peer.name], ours, self.ceilings[case.threads]) for peer in found
        ]
        return rows.with_fastest_peer(every)

    def _memory_wanted(self, case: Case) -> bool:
        most = max((threads or 0 for threads in self.ceilings), default=0)
        return self.memory and case.device == "cpu" and case.threads in (None, most)

    def _resident(self, peer: Peer, model: ShelfNet, images: Tensor, case: Case) -> dict[str, float]:
        """MiB of a variant in a process of its own; empty, with a message, if it cannot be measured."""
        if self.deadline.left < LEAST_SECONDS:
            return {}
        try:
            with time_limit(self.deadline.left):
                return resident.of(peer, model, images, case)
        except (OutOfTime, RuntimeError) as error:
            click.echo(f"{case}, {peer.name}: {error or 'the time was spent'}", err=True)
            return {}

    def _prepared(
        self, peer: Peer, model: ShelfNet, images: Tensor, case: Case, judge: Judge
    ) -> tuple[rows.Outcome, Run | None]:
        """A variant's error and memory, with its call; or the reason why it is not timed, without a call."""
        reason = peer.why_not()
        if reason is not None:
            return rows.Outcome(reason), None
        # Some time is reserved for measuring the variants that are ready by then.
        allowed = min(peer.seconds, self.deadline.left - LEAST_SECONDS)
        if allowed <= 0:
            return rows.Outcome("skipped: no time was left to prepare it"), None
        footprint = Footprint(case.device)
        begin = time.monotonic()
        error = None
        try:
            with time_limit(allowed):
                run = peer.prepare(model, images, case.torch_dtype, case.labels)
                first = run()
                prepared = time.monotonic() - begin
                error = judge.error_of(first)
                del first
                memory = footprint.of(run)
        except OutOfTime:
            reason = f"not prepared within {allowed:.0f} s"
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Wrong as wrong:
            reason = f"wrong, not timed: {wrong}"
        except Exception as failure:
            reason = _failure(failure)
        else:
            flop = run.flop() if isinstance(run, Call) else None
            return rows.Outcome(None, error, judge.limit, prepared, memory, flop=flop), run
        return rows.Outcome(reason, error, judge.limit), None

    def _time(self, runs: dict[str, Run], outcomes: dict[str, rows.Outcome]) -> None:
        """Adds times, and after all of them launch counts, because profiling may slow down later calls."""
        if not runs:
            return
        try:
            with time_limit(self.deadline.left):
                times = self.meter.measure(runs)
        except OutOfTime:
            for name in runs:
                outcomes[name] = dataclasses.replace(outcomes[name], reason="not timed: the time was spent")
            return
        for name, run in runs.items():
            launches = self.meter.launches(run)
            outcomes[name] = dataclasses.replace(outcomes[name], times=times[name], launches=launches)

    def safely(self, case: Case, broken: set[str]) -> list[rows.Row]:
        """`case`, or a single row with the reason why it failed. Frees all memory.

        Raises:
            ContextLost: with the row of the variant that broke the context; nothing can be freed any more.
        """
        try:
            with torch.no_grad(), threads_of(case):
                found = self.case(case, broken)
        except torch.OutOfMemoryError:
            found = [rows.skipped(case, "out of memory")]
        except OutOfTime:
            found = [rows.skipped(case, "skipped: the time was spent")]
        except RuntimeError as error:
            found = [rows.skipped(case, _failure(error))]
        torch.compiler.reset()
        free()
        return found

    def layers(self, case: Case) -> list[rows.Row]:
        """Rows of our layers in a case; none, with a message, if they cannot be measured."""
        model, ceilings = build(case.model), self.ceilings[case.threads]
        try:
            with torch.no_grad(), threads_of(case), time_limit(self.deadline.left):
                images = images_of(case, model)
                found = breakdown.break_down(case, model, images, self.tune, self.meter, ceilings)
        except OutOfTime:
            found = []
        except (RuntimeError, ValueError) as error:
            if self.meter.context_lost():
                raise ContextLost([]) from error
            click.echo(f"{case}: no breakdown: {str(error).splitlines()[0]}", err=True)
            found = []
        free()
        return found


def ceilings_of(meter: Meter, cases: list[Case]) -> dict[int | None, Ceilings]:
    """The machine's peak rates in all dtypes of the cases, by number of threads."""
    dtypes = tuple(dict.fromkeys(case.torch_dtype for case in cases))
    if cases and cases[0].device == "cpu":
        dtypes += (torch.int16,)  # used by some algorithms, whatever the case's dtype
    found = {}
    for case in {case.threads: case for case in cases}.values():
        with threads_of(case):
            found[case.threads] = meter.ceilings(dtypes)
    return found


def _failure(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def measure(
    bench: Bench, cases: list[Case], results: rows.ResultsFile, layers: rows.ResultsFile | None
) -> None:
    """Runs cases in order until the time is spent; the rest are listed as skipped.

    layers: file for the breakdown of cases with scores, or None.
    """
    # Including cases whose context was lost during timing, where the variant is unknown.
    lost = {rows.case_of(row) for row in results.rows if row["variant"] is None and row["reason"] == LOST}
    done = lost | {rows.case_of(row) for row in results.rows if row["reason"] is None}
    console = Console(width=200)
    for case in cases:
        if case in done:
            continue
        if bench.deadline.left < 2 * LEAST_SECONDS:
            results.add([rows.skipped(case, "skipped: the time was spent")])
            continue
        before = [row for row in results.rows if row["reason"] == LOST and rows.case_of(row) == case]
        try:
            found = bench.safely(case, {row["variant"] for row in before})
        except ContextLost as ended:
            (found,) = ended.args
            results.add(found)
            raise
        results.add(found)
        console.print(rows.table(found))
        if layers is not None and not case.labels and bench.deadline.left > 2 * LEAST_SECONDS:
            of_layers = bench.layers(case)
            if of_layers:
                layers.add(of_layers)
                click.echo("\n".join(breakdown.table(of_layers)))


DTYPES = ("float16", "bfloat16", "float32", "int8")
KEYS = list(dict.fromkeys(peer.key for device in FILES for peer in of_device(device)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--device", type=click.Choice(tuple(FILES)), default="cpu")
@click.option(
    "--model", "models", multiple=True, type=click.Choice((*MODELS, SHIPPED)), help="Default: by device."
)
@click.option("--size", "sizes", nargs=2, type=click.IntRange(32), multiple=True, help="Height and width.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True)
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True)
@click.option("--threads", type=click.IntRange(1), multiple=True, help="On a CPU; default: all, then one.")
@click.option("--peers", "keys", type=click.Choice(KEYS), multiple=True, help="Ours and these only.")
@click.option("--seconds", default=float("inf"), help="After which the rest is skipped.")
@click.option("--case-seconds", type=float, help="Of timing a case, for each clock.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/models_*.jsonl.")
@click.option("--resume", is_flag=True, help="Keeps OUT's rows and measures what they lack.")
@click.option("--breakdown", "layered", is_flag=True, help="Also each layer of ours, to *_layers.jsonl.")
@click.option("--memory", is_flag=True, help="On a CPU also each variant's memory, in its own process.")
@click.option("--quick", is_flag=True, help="The most important cases, without what is slow to compile.")
@click.option("--tune/--no-tune", default=True, help="Whether ours times its algorithms first.")
def main(
    device: str,
    models: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    keys: tuple[str, ...],
    seconds: float,
    case_seconds: float | None,
    out: Path | None,
    resume: bool,
    layered: bool,
    memory: bool,
    quick: bool,
    tune: bool,
) -> None:
    """Times networks beside their peers, the most important cases first; replaces OUT."""
    deadline = Deadline(seconds)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("device is cuda, but there is no GPU that torch can use")
    cases = Matrix(device, models, sizes, batches, dtypes, quick, threads).cases()
    facts = about(device)
    out = out or RESULTS / FILES[device]
    results = rows.ResultsFile(out, facts, resume)
    results.rows = [row for row in results.rows if row["variant"] is not None or row["reason"] == LOST]
    layers = None
    if layered:
        layers = rows.ResultsFile(out.with_name(f"{out.stem}_layers.jsonl"), facts, resume)
    meter = Meter(device, case_seconds or CASE_SECONDS[device])
    peers = [peer for peer in chosen(of_device(device, tune), keys) if not (quick and peer.key in SLOW)]
    ceilings = ceilings_of(meter, cases)
    try:
        measure(Bench(peers, meter, ceilings, deadline, tune, memory), cases, results, layers)
    except ContextLost:
        click.echo("a variant broke the CUDA context: --resume goes on without it", err=True)
        sys.stdout.flush()
        # Exit at once: freeing the remaining memory would fail, and perhaps abort.
        os._exit(CONTEXT_LOST)


if __name__ == "__main__":
    main()
