"""Choosing by timing, and the files that remember it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shelfkern.engine import tuning
from shelfkern.engine.tuning import (
    Candidate,
    CpuClock,
    GpuClock,
    Measured,
    TuneCache,
    Tuner,
    default_path,
    environment_of,
    shipped_path,
)

ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6"}
A, B = Measured("triton a", {"triton a": 2.5, "cudnn": 3.0}), Measured("cudnn", {"cudnn": 1.0})


class FakeClock:
    """Gives the seconds that its calls give, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], bool]] = []

    def measure(self, calls: Mapping[str, Callable[[], object]], cold: bool) -> dict[str, float]:
        self.asked.append((list(calls), cold))
        return {name: call() for name, call in calls.items()}  # type: ignore[misc]


class Problem:
    """Candidates by name with predicted and real microseconds; an exception as the latter is raised."""

    def __init__(self, **times: tuple[float, float | Exception]) -> None:
        self.prepared: list[str] = []
        self.candidates = [
            Candidate(name.replace("_", " "), predicted, self._prepare(name.replace("_", " "), real))
            for name, (predicted, real) in times.items()
        ]

    def _prepare(self, name: str, real: float | Exception) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self.prepared.append(name)
            if isinstance(real, Exception):
                raise real
            return lambda: real / 1e6

        return prepare


def tuner(clock: tuning.Clock | None = None, cache: TuneCache | None = None, **options) -> Tuner:
    return Tuner(cache or TuneCache(None, ENVIRONMENT), clock, **options)


def written(folder: Path, entries: Mapping[str, Measured], environment=ENVIRONMENT, name="t.json") -> Path:
    """A file as a cache writes it."""
    cache = TuneCache(folder / name, environment)
    for key, measured in entries.items():
        cache.put(key, measured)
    cache.save()
    return folder / name


def read(path: Path) -> dict[str, Measured]:
    """Everything in a file, as a new cache sees it."""
    entries = json.loads(path.read_text())["entries"]
    cache = TuneCache(path, ENVIRONMENT)
    found = {key: cache.get(key, [entry["winner"]]) for key, entry in entries.items()}
    assert None not in found.values()
    return found  # type: ignore[return-value]


# Choosing.


def test_without_a_clock_the_lowest_prediction_wins_and_nothing_is_prepared() -> None:
    problem = Problem(triton_a=(5, 1), cudnn=(3, 1), triton_b=(4, 1))
    assert tuner().choose("k", problem.candidates) == "cudnn"
    assert problem.prepared == []


def test_the_fastest_wins_and_is_stored(tmp_path) -> None:
    cache = TuneCache(tmp_path / "t.json", ENVIRONMENT)
    problem = Problem(triton_a=(1, 9), triton_b=(2, 7.25), cudnn=(3, 8))
    assert tuner(FakeClock(), cache).choose("k", problem.candidates) == "triton b"
    expected = Measured("triton b", {"triton a": 9.0, "triton b": 7.25, "cudnn": 8.0})
    assert read(tmp_path / "t.json") == {"k": expected}


def test_the_best_predictions_are_timed_together() -> None:
    clock = FakeClock()
    problem = Problem(**{f"triton_{i}": (10 - i, i) for i in range(8)})
    assert tuner(clock, candidates=3).choose("k", problem.candidates) == "triton 5"
    assert problem.prepared == ["triton 7", "triton 6", "triton 5"]
    assert clock.asked == [(problem.prepared, False)]


def test_every_family_is_timed_by_its_best() -> None:
    problem = Problem(
        triton_a=(1, 9), triton_b=(2, 9), triton_c=(3, 0.1), cuda_slow=(40, 0.1), cuda=(30, 5), cudnn=(99, 4)
    )
    assert tuner(FakeClock(), candidates=2).choose("k", problem.candidates) == "cudnn"
    assert problem.prepared == ["triton a", "triton b", "cuda", "cudnn"]


def test_a_family_among_the_best_brings_no_more() -> None:
    problem = Problem(cudnn=(1, 2), triton_a=(2, 3), cudnn_fused=(3, 1))
    assert tuner(FakeClock(), candidates=2).choose("k", problem.candidates) == "cudnn"
    assert problem.prepared == ["cudnn", "triton a"]


@pytest.mark.parametrize(("fast", "winner"), [(100.0, "cudnn"), (99.2, "cudnn"), (98.8, "triton a")])
def test_within_a_hundredth_the_prediction_decides(fast: float, winner: str) -> None:
    problem = Problem(triton_a=(2, fast), cudnn=(1, 100.0))
    assert tuner(FakeClock()).choose("k", problem.candidates) == winner


def test_what_is_known_is_not_timed_again() -> None:
    made = tuner(FakeClock())
    first, second = (Problem(triton_a=(1, a), cudnn=(2, 5)) for a in (9, 1))
    assert made.choose("k", first.candidates) == made.choose("k", second.candidates) == "cudnn"
    assert second.prepared == []
    assert made.choose("another", second.candidates) == "triton a"


def test_what_is_known_serves_without_a_clock(tmp_path) -> None:
    path = written(tmp_path, {"k": B})
    problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
    assert tuner(None, TuneCache(path, ENVIRONMENT)).choose("k", problem.candidates) == "cudnn"


def test_what_is_expected_is_what_runs() -> None:
    """Where something is known, its winner; what is to be timed; otherwise the lowest prediction."""
    problem = Problem(triton_a=(1, 9), triton_b=(2, 9), triton_c=(3, 0.1), cudnn=(99, 4))

    def names(asked: Tuner, cold: bool = False) -> list[str]:
        return [candidate.name for candidate in asked.expected("k", problem.candidates, cold)]

    timing = tuner(FakeClock(), candidates=2)
    expected = names(timing)
    assert names(tuner()) == ["triton a"] == names(tuner(FakeClock(), seconds=0.0))
    assert timing.choose("k", problem.candidates) == "cudnn"
    assert problem.prepared == expected
    assert names(timing) == ["cudnn"] and names(timing, cold=True) == expected


def test_a_winner_that_is_gone_is_timed_again(tmp_path) -> None:
    path = written(tmp_path, {"k": Measured("triton gone", {"triton gone": 0.5})})
    problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
    assert tuner(FakeClock(), TuneCache(path, ENVIRONMENT)).choose("k", problem.candidates) == "cudnn"
    assert read(path)["k"].winner == "cudnn"


def test_cold_is_asked_for_and_kept_apart() -> None:
    clock = FakeClock()
    made = tuner(clock)
    assert made.choose("k", Problem(triton_a=(1, 9), cudnn=(2, 5)).candidates, cold=True) == "cudnn"
    assert made.choose("k", Problem(triton_a=(1, 4), cudnn=(2, 5)).candidates) == "triton a"
    assert made.choose("k", Problem(triton_a=(1, 1), cudnn=(2, 5)).candidates, cold=True) == "cudnn"
    assert [cold for _, cold in clock.asked] == [True, False]


@pytest.mark.parametrize("error", [RuntimeError("no\n  memory"), ValueError("no memory"), AssertionError()])
def test_a_candidate_that_cannot_be_prepared_is_left_out(error: Exception, caplog) -> None:
    made = tuner(FakeClock())
    for key in ("k", "l"):
        problem = Problem(triton_bad=(1, error), triton_a=(2, 9), cudnn=(3, 5))
        assert made.choose(key, problem.candidates) == "cudnn"
        known = made.cache.get(key, ["cudnn"])
        assert known is not None and set(known.microseconds) == {"triton a", "cudnn"}
    (record,) = caplog.records
    message = record.getMessage()
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert message == f"tuning: triton bad is left out where it fails, as in k: {reason}"


def raises(after: int) -> Callable[[], Callable[[], object]]:
    """Prepares a call that raises once it ran so many times."""

    def prepare() -> Callable[[], object]:
        count = 0

        def call() -> float:
            nonlocal count
            count += 1
            if count > after:
                raise RuntimeError(f"failed at {count}")
            return 1e-6

        return call

    return prepare


@pytest.mark.parametrize("after", [0, 1])
def test_a_candidate_that_fails_when_it_runs_is_left_out(after: int, caplog) -> None:
    good = Problem(triton_a=(2, 9), cudnn=(3, 5)).candidates
    made = tuner(FakeClock())
    assert made.choose("k", [Candidate("triton bad", 1, raises(after)), *good]) == "cudnn"
    known = made.cache.get("k", ["cudnn"])
    assert known == Measured("cudnn", {"triton a": 9.0, "cudnn": 5.0})
    assert ["triton bad" in record.getMessage() for record in caplog.records] == [True]


def test_others_are_tried_when_those_picked_fail() -> None:
    problem = Problem(
        triton_a=(1, RuntimeError("a")), triton_b=(2, RuntimeError("b")), triton_c=(3, 7), triton_d=(4, 1)
    )
    assert tuner(FakeClock(), candidates=1).choose("k", problem.candidates) == "triton c"
    assert problem.prepared == ["triton a", "triton b", "triton c"]


@pytest.mark.parametrize("after", [None, 0, 1])
def test_when_all_fail_the_first_reason_is_raised(after: int | None) -> None:
    problem = Problem(triton_a=(1, RuntimeError("spilt")), cudnn=(2, RuntimeError("unsupported")))
    candidates = problem.candidates
    if after is not None:
        candidates = [Candidate(c.name, c.microseconds, raises(after)) for c in candidates]
    made = tuner(FakeClock())
    with pytest.raises(RuntimeError) as info:
        made.choose("conv 3x3", candidates)
    reason = "spilt" if after is None else "failed at"
    expected = f"none of 2 candidates of conv 3x3 can run; triton a: RuntimeError: {reason}"
    assert str(info.value).startswith(expected)
    assert made.cache.get("conv 3x3", ["triton a", "cudnn"]) is None


def test_an_interrupt_goes_through() -> None:
    def prepare() -> Callable[[], object]:
        raise KeyboardInterrupt

    made = tuner(FakeClock())
    with pytest.raises(KeyboardInterrupt):
        made.choose("k", [Candidate("triton", 1, prepare)])
    # And leaves the tuner usable.
    assert made.choose("k", Problem(cudnn=(1, 1)).candidates) == "cudnn"


def test_seconds_bound_all_timing(caplog, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now)

    class Slow(FakeClock):
        def measure(self, calls, cold):
            nonlocal now
            now += 4.0
            return super().measure(calls, cold)

    made = tuner(Slow(), seconds=10)
    problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
    chosen = []
    for key in "abcde":
        now += 100.0  # what is done in between does not count
        chosen.append(made.choose(key, problem.candidates))
    # The third begins within the 10 seconds and is finished.
    assert chosen == ["cudnn"] * 3 + ["triton a"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "tuning: its 10 s are spent, predictions choose from here"
    ]
    assert made.choose("a", problem.candidates) == "cudnn"
    assert made.cache.get("d", ["triton a", "cudnn"]) is None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="candidates is 0, it must be at least 1"):
        tuner(candidates=0)
    with pytest.raises(ValueError, match=r"candidates of k are \[\], it must be at least one"):
        tuner().choose("k", [])
    twice = [*Problem(cudnn=(1, 1)).candidates, *Problem(cudnn=(2, 1)).candidates]
    with pytest.raises(ValueError, match="each of another name"):
        tuner().choose("k", twice)


def test_threads_time_a_problem_once_and_one_at_a_time() -> None:
    inside, most, prepared = 0, 0, []

    class Watching(FakeClock):
        def measure(self, calls, cold):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1
            return super().measure(calls, cold)

    # Two tuners, for two of a process disturb each other as well.
    cache, clock = TuneCache(None, ENVIRONMENT), Watching()
    tuners = [tuner(clock, cache) for _ in range(2)]
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        for key in "abc":
            problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
            assert tuners[index % 2].choose(key, problem.candidates) == "cudnn"
            prepared.extend(problem.prepared)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(clock.asked) == 3 and len(prepared) == 6


# The file.


def test_a_file_gives_back_what_was_put(tmp_path) -> None:
    path = written(tmp_path / "new" / "folders", {"k": A, "l": B})
    cache = TuneCache(path, ENVIRONMENT)
    assert cache.get("k", ["triton a", "other"]) == A and cache.get("l", ["cudnn"]) == B
    assert cache.get("k", ["cudnn", "other"]) is None and cache.get("m", ["cudnn"]) is None
    document = json.loads(path.read_text())
    assert document["format"] == tuning.FORMAT and document["environment"] == ENVIRONMENT


def test_nothing_is_written_before_save_or_without_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for cache in (TuneCache(tmp_path / "t.json", ENVIRONMENT), TuneCache(None, ENVIRONMENT)):
        cache.put("k", A)
        assert cache.get("k", ["triton a"]) == A
    cache.save()
    TuneCache(tmp_path / "t.json", ENVIRONMENT).save()
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, **changes: object) -> bytes:
    return json.dumps({**json.loads(path.read_text()), **changes}).encode()


def signed(path: Path, entries: object) -> bytes:
    """With a checksum that is right."""
    return rewritten(path, entries=entries, checksum=tuning._digest(entries))


def entry(winner: object = "cudnn", **times: object) -> dict[str, object]:
    return {"k": {"winner": winner, "microseconds": times}}


DAMAGES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda path: b"", "it is not JSON"),
    "truncated": (lambda path: path.read_bytes()[:-40], "it is not JSON"),
    "binary": (lambda path: b"\xff\x00\xfe\x80" * 50, ""),
    "deep": (lambda path: b"[" * 200_000, ""),
    "list": (lambda path: b"[1, 2]", f"it is not of format {tuning.FORMAT}"),
    "null": (lambda path: b"null", f"it is not of format {tuning.FORMAT}"),
    "no format": (lambda path: b"{}", f"it is not of format {tuning.FORMAT}"),
    "later format": (lambda path: rewritten(path, format=tuning.FORMAT + 1), "it is not of format"),
    "no environment": (lambda path: rewritten(path, environment=None), "it has no environment"),
    "other torch": (
        lambda path: rewritten(path, environment={**ENVIRONMENT, "torch": "2.12"}),
        "its torch is '2.12', here it is '2.11'",
    ),
    "more environment": (
        lambda path: rewritten(path, environment={**ENVIRONMENT, "cudnn": "9"}),
        "its cudnn is '9', here it is None",
    ),
    "less environment": (
        lambda path: rewritten(path, environment={"device": "NVIDIA H200"}),
        "its torch is None, here it is '2.11'",
    ),
    "tampered": (lambda path: path.read_bytes().replace(b"2.5", b"0.5"), "its checksum is wrong"),
    "no checksum": (lambda path: rewritten(path, checksum=None), "its checksum is wrong"),
    "no entries": (lambda path: rewritten(path, entries=[]), "its checksum is wrong"),
    "entry a list": (lambda path: signed(path, {"k": []}), "its entry 'k' makes no sense"),
    "no times": (lambda path: signed(path, {"k": {"winner": "cudnn"}}), "its entry 'k' makes no sense"),
    "winner untimed": (lambda path: signed(path, entry(triton=1.0)), "its entry 'k' makes no sense"),
    "winner a list": (lambda path: signed(path, entry(["cudnn"], cudnn=1.0)), "makes no sense"),
    "time a text": (lambda path: signed(path, entry(cudnn="1.0")), "no sense"),
    "time infinite": (lambda path: signed(path, entry(cudnn=float("inf"))), "no sense"),
    "time negative": (lambda path: signed(path, entry(cudnn=-1.0)), "no sense"),
    "time a boolean": (lambda path: signed(path, entry(cudnn=True)), "no sense"),
    "time huge": (lambda path: signed(path, entry(cudnn=10**400)), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_not_to_be_trusted_is_ignored_and_rebuilt(damage: str, tmp_path, caplog) -> None:
    damaged, because = DAMAGES[damage]
    path = written(tmp_path, {"k": A})
    before = path.read_bytes()
    path.write_bytes(damaged(path))
    assert path.read_bytes() != before
    cache = TuneCache(path, ENVIRONMENT)
    assert cache.get("k", ["triton a", "cudnn", "triton"]) is None
    cache.put("l", B)
    cache.save()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path} is ignored: " in record.getMessage() and because in record.getMessage()
    assert read(path) == {"l": B}


def test_a_file_that_was_not_there_is_no_news(tmp_path, caplog) -> None:
    cache = TuneCache(tmp_path / "t.json", ENVIRONMENT, shipped=tmp_path / "none.json")
    assert cache.get("k", ["cudnn"]) is None and not caplog.records


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(error: BaseException, tmp_path, monkeypatch, caplog) -> None:
    path = written(tmp_path, {"k": A})
    before = path.read_bytes()
    cache = TuneCache(path, ENVIRONMENT)
    cache.put("l", B)

    def replace(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        # Of Python 3.10, which binds os.replace early.
        patch.setattr(Path, "replace", replace)
        with contextlib.nullcontext() if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
            cache.save()
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"t.json", "t.json.lock"}
    assert len(caplog.records) == isinstance(error, OSError)
    # What was not saved is with the next save.
    cache.save()
    assert read(path) == {"k": A, "l": B}


def test_what_was_saved_in_between_is_kept(tmp_path) -> None:
    path = tmp_path / "t.json"
    mine, theirs = TuneCache(path, ENVIRONMENT), TuneCache(path, ENVIRONMENT)
    mine.put("k", A)
    mine.put("both", A)
    theirs.put("l", B)
    theirs.put("both", B)
    theirs.save()
    mine.save()
    assert read(path) == {"k": A, "l": B, "both": A}
    assert mine.get("l", ["cudnn"]) == B
    # Only what is new goes over what is there.
    theirs.put("k", B)
    theirs.save()
    mine.put("m", A)
    mine.save()
    assert read(path) == {"k": B, "l": B, "both": A, "m": A}


def test_a_file_damaged_in_between_is_rebuilt_whole(tmp_path, caplog) -> None:
    path = written(tmp_path, {"k": A})
    cache = TuneCache(path, ENVIRONMENT)
    path.write_bytes(b"{")
    cache.put("l", B)
    cache.save()
    assert read(path) == {"k": A, "l": B} and len(caplog.records) == 1


SAVES = 25


def save_many(path: Path, name: str, start) -> None:
    cache = TuneCache(path, ENVIRONMENT)
    start.wait(120)
    for index in range(SAVES):
        cache.put(f"{name} {index}", A)
        cache.save()


def test_two_processes_save_at_once(tmp_path) -> None:
    path = tmp_path / "t.json"
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=save_many, args=(path, name, start)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert read(path) == {f"{name} {index}": A for name in "ab" for index in range(SAVES)}


@pytest.mark.skipif(tuning.fcntl is None, reason="no locks between processes")
def test_a_save_waits_for_the_one_before_it(tmp_path, monkeypatch) -> None:
    path = written(tmp_path, {"k": A})
    cache = TuneCache(path, ENVIRONMENT)
    cache.put("l", B)
    saving = threading.Thread(target=cache.save)
    with (tmp_path / "t.json.lock").open("a") as file:
        tuning.fcntl.flock(file, tuning.fcntl.LOCK_EX)
        saving.start()
        saving.join(0.3)
        assert saving.is_alive() and read(path) == {"k": A}
    saving.join(60)
    assert read(path) == {"k": A, "l": B}


@pytest.mark.skipif(tuning.fcntl is None, reason="no locks between processes")
def test_a_save_does_not_wait_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "LOCK_SECONDS", 0.05)
    with (tmp_path / "t.json.lock").open("a") as file:
        tuning.fcntl.flock(file, tuning.fcntl.LOCK_EX)
        assert read(written(tmp_path, {"k": A})) == {"k": A}


def test_a_file_system_without_locks(tmp_path, monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError("no locks available")

    if tuning.fcntl is not None:
        monkeypatch.setattr(tuning.fcntl, "flock", flock)
    assert read(written(tmp_path, {"k": A})) == {"k": A}
    monkeypatch.setattr(tuning, "fcntl", None)
    assert read(written(tmp_path, {"l": B})) == {"k": A, "l": B}


def test_threads_save_at_once(tmp_path) -> None:
    cache = TuneCache(tmp_path / "t.json", ENVIRONMENT)

    def work(name: str) -> None:
        for index in range(SAVES):
            cache.put(f"{name} {index}", A)
            cache.save()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(tmp_path / "t.json")) == 4 * SAVES


def test_what_is_put_during_a_save_goes_with_the_next(tmp_path, monkeypatch) -> None:
    cache = TuneCache(tmp_path / "t.json", ENVIRONMENT)
    putting = threading.Thread(target=cache.put, args=("l", B))
    replacing = tuning.replacing

    def slow(path: Path) -> contextlib.AbstractContextManager[Path]:
        putting.start()
        putting.join(0.2)
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "replacing", slow)
        cache.put("k", A)
        cache.save()
    putting.join()
    cache.save()
    assert read(tmp_path / "t.json") == {"k": A, "l": B}


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere: it becomes somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that everybody may read; those of `tmp_path` are their owner's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such users")
def test_in_a_folder_that_cannot_be_written_tuning_goes_on(readable, caplog) -> None:
    path = written(readable, {"k": A})
    before = path.read_bytes()
    readable.chmod(0o555)
    (readable / "t.json.lock").chmod(0o444)
    with unprivileged():
        made = tuner(FakeClock(), TuneCache(path, ENVIRONMENT))
        problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
        assert [made.choose(key, problem.candidates) for key in "klml"] == ["triton a", *["cudnn"] * 3]
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "cannot be written" in record.getMessage()
    assert path.read_bytes() == before


def test_a_file_where_the_folder_should_be(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    made = tuner(FakeClock(), TuneCache(tmp_path / "file" / "t.json", ENVIRONMENT))
    problem = Problem(triton_a=(1, 9), cudnn=(2, 5))
    assert [made.choose(key, problem.candidates) for key in "kl"] == ["cudnn"] * 2
    assert "cannot be written" in caplog.records[-1].getMessage()
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records) <= 2


# The table that ships.


OLDER = {"device": "NVIDIA H200", "torch": "2.9", "cudnn": "8"}


def test_own_measurements_go_before_the_table_that_ships(tmp_path) -> None:
    shipped = written(tmp_path, {"k": B, "l": B}, OLDER, "shipped.json")
    own = written(tmp_path, {"k": A, "m": A})
    cache = TuneCache(own, ENVIRONMENT, shipped)
    assert cache.get("k", ["triton a", "cudnn"]) == A
    assert cache.get("l", ["triton a", "cudnn"]) == B
    assert cache.get("k", ["cudnn"]) == B and cache.get("l", ["triton a"]) is None


def test_the_table_that_ships_serves_and_is_not_copied(tmp_path) -> None:
    shipped = written(tmp_path, {"k": B}, OLDER, "shipped.json")
    before = shipped.read_bytes()
    made = tuner(FakeClock(), TuneCache(tmp_path / "t.json", ENVIRONMENT, shipped))
    problem = Problem(triton_a=(1, 1), cudnn=(2, 5))
    assert made.choose("k", problem.candidates) == "cudnn" and problem.prepared == []
    assert made.choose("l", problem.candidates) == "triton a"
    assert list(read(tmp_path / "t.json")) == ["l"] and shipped.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "tampered", "later format", "device"])
def test_a_table_not_to_be_trusted_is_ignored(damage: str, tmp_path, caplog) -> None:
    shipped = written(tmp_path, {"k": A}, name="shipped.json")
    if damage == "device":
        shipped.write_bytes(rewritten(shipped, environment={**ENVIRONMENT, "device": "NVIDIA A100"}))
    else:
        shipped.write_bytes(DAMAGES[damage][0](shipped))
    assert TuneCache(None, ENVIRONMENT, shipped).get("k", ["triton a"]) is None
    assert [str(shipped) in record.getMessage() for record in caplog.records] == [True]


def test_a_table_is_named_after_its_device() -> None:
    path = shipped_path({"device": "NVIDIA A100-SXM4-80GB (rev. 2)"})
    assert path == Path(tuning.__file__).parent / "tables" / "nvidia-a100-sxm4-80gb-rev-2.json"


# Where, and for what.


def test_the_default_path(tmp_path, monkeypatch) -> None:
    for name in ("SHELFKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    home = default_path(ENVIRONMENT)
    assert home is not None and home.parent == tmp_path / ".cache" / "shelfkern"
    assert home == default_path(dict(reversed(ENVIRONMENT.items())))
    digits = home.name.removeprefix("tuning-").removesuffix(".json")
    assert len(digits) == 8 and int(digits, 16) >= 0
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_path(ENVIRONMENT) == home
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_path(ENVIRONMENT) == Path("/caches/shelfkern") / home.name
    monkeypatch.setenv("SHELFKERN_CACHE", "~/own")
    assert default_path(ENVIRONMENT) == tmp_path / "own" / home.name
    monkeypatch.setenv("SHELFKERN_CACHE", "here")
    assert default_path(ENVIRONMENT) == tmp_path / "here" / home.name
    other = default_path({**ENVIRONMENT, "torch": "2.12"})
    assert other is not None and other.name != home.name


def test_without_a_home_there_is_no_path(monkeypatch) -> None:
    for name in ("SHELFKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert default_path(ENVIRONMENT) is None


def test_the_environment_of_the_cpu() -> None:
    torch.set_num_threads(1)
    one = environment_of(torch.device("cpu"))
    torch.set_num_threads(2)
    two = environment_of(torch.device("cpu"))
    assert one["threads"] == "1" and two == {**one, "threads": "2"}
    assert one["device"] == tuning.cpu_name() and one["torch"] == torch.__version__
    assert set(one) == {"device", "isa", "threads", "torch", "shelfkern"}
    assert all(isinstance(value, str) and value for value in one.values())
    with pytest.raises(ValueError, match="device is meta, it may be cuda or cpu"):
        environment_of(torch.device("meta"))


def test_the_environment_of_a_gpu_that_is_told(monkeypatch) -> None:
    found = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, multi_processor_count=58,
        shared_memory_per_block_optin=101376, L2_cache_size=48 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    environment = environment_of(torch.device("cuda", 1))
    assert environment["device"] == "NVIDIA L4" and environment["capability"] == "8.9"
    assert environment["multiprocessors"] == "58" and environment["cuda"] == str(torch.version.cuda)
    assert {"driver", "cudnn", "torch", "triton", "shelfkern"} < set(environment)
    assert all(isinstance(value, str) and value for value in environment.values())
    monkeypatch.setitem(sys.modules, "triton", None)
    assert environment_of(torch.device("cuda", 1)) == {**environment, "triton": "none"}


def test_importing_it_does_not_start_cuda() -> None:
    program = "import torch, shelfkern.engine.tuning; assert not torch.cuda.is_initialized()"
    program += "; import sys; assert 'triton' not in sys.modules or not torch.cuda.is_available()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# Clocks.


def test_the_cpu_clock_gives_medians_of_calls_in_turn(monkeypatch) -> None:
    now, order = 0.0, []
    took = {"a": 1e-3, "b": 3e-3}

    def call(name: str) -> Callable[[], object]:
        def run() -> None:
            nonlocal now
            order.append(name)
            # One call in five is disturbed.
            now += took[name] * (50 if len(order) % 5 == 0 else 1)

        return run

    fake = tuning.time_interleaved
    monkeypatch.setattr(
        tuning, "time_interleaved", lambda *a, **k: fake(*a, **k, clock=lambda: now)
    )  # fmt: skip
    seconds = CpuClock().measure({name: call(name) for name in took}, cold=False)
    assert seconds == pytest.approx(took)
    timed = order[4:]
    assert len(timed) == 2 * tuning.MAX_ROUNDS
    assert timed[:4] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])
    assert CpuClock().measure({}, cold=False) == {}


def test_the_cpu_clock_passes_through_the_caches_ahead_of_every_cold_call(monkeypatch) -> None:
    made, events = [], []

    class Memory:
        def add_(self, one: int) -> None:
            events.append("evicts")

    monkeypatch.setattr(torch, "zeros", lambda count: made.append(count) or Memory())
    clock = CpuClock()
    clock.measure({name: lambda name=name: events.append(name) for name in "ab"}, cold=True)
    assert made == [tuning._cache_bytes() // 4] and 4 * made[0] <= tuning.MOST_CACHE
    assert events[::2] == ["evicts"] * (len(events) // 2) and set(events[1::2]) == {"a", "b"}


def test_the_caches_are_those_of_a_core(monkeypatch, tmp_path) -> None:
    files = {"index0": ("32K", "Data"), "index1": ("64K", "Instruction"), "index2": ("2048K", "Unified")}
    for name, (size, kind) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size + "\n")
        (tmp_path / name / "type").write_text(kind + "\n")
    (tmp_path / "index3").mkdir()
    monkeypatch.setattr(tuning, "CACHES", tmp_path)
    assert tuning._cache_bytes.__wrapped__() == 2080 << 10
    (tmp_path / "index2" / "size").write_text("999999K")
    assert tuning._cache_bytes.__wrapped__() == tuning.MOST_CACHE
    monkeypatch.setattr(tuning, "CACHES", tmp_path / "none")
    assert tuning._cache_bytes.__wrapped__() == tuning.LIKELY_CACHE


def test_what_was_measured_can_be_asked_for() -> None:
    cache = TuneCache(None, ENVIRONMENT)
    cache.put("p cold", A)
    assert tuner(None, cache).measured("p", cold=True) == A.microseconds
    assert tuner(None, cache).measured("p") == {}


def test_a_tie_may_be_wider(tmp_path) -> None:
    for tie, winner in ((1.01, "b"), (1.06, "a")):
        problem = Problem(a=(1.0, 104.9), b=(2.0, 100.0))
        assert tuner(FakeClock(), tie=tie).choose("p", problem.candidates) == winner


def test_the_cpu_clock_is_bounded() -> None:
    calls = 0

    def slow() -> None:
        nonlocal calls
        calls += 1
        time.sleep(tuning.CPU_SECONDS / 2)

    (seconds,) = CpuClock().measure({"slow": slow}, cold=False).values()
    assert calls == 2 + tuning.MIN_ROUNDS and seconds >= tuning.CPU_SECONDS / 2


class Device:
    """Stands in for a GPU: a clock that its calls move, and a cache that one call fills for the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cached: str | None = None
        self.log: list[str] = []
        self.capturing = False
        self.uncapturable: set[str] = set()
        self.flushed_bytes = 0
        self.disturbed_every = 10**9

    def call(self, name: str, seconds: float) -> Callable[[], object]:
        def run() -> None:
            if self.capturing and name in self.uncapturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            if not self.capturing:
                self.log.append(name)
                self.now += seconds if self.cached == name else 10 * seconds
                self.now += 1e-3 * (len(self.log) % self.disturbed_every == 0)
                self.cached = name

        return run

    def capture(self, run: Callable[[], None]) -> SimpleNamespace:
        run()
        self.capturing = True
        try:
            run()
        finally:
            self.capturing = False

        def replay() -> None:
            self.log.append("graph")
            run()

        return SimpleNamespace(replay=replay)

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 100e-6
        self.cached = None

    def memory(self, nbytes: int, device: torch.device) -> SimpleNamespace:
        self.flushed_bytes = nbytes
        return SimpleNamespace(zero_=self.flush)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        made = SimpleNamespace()
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: 1e3 * (end.at - made.at)
        return made


@pytest.fixture
def device(monkeypatch) -> Device:
    simulated = Device()
    monkeypatch.setattr(tuning, "runtime_of", lambda device: simulated)
    monkeypatch.setattr(tuning, "empty_bytes", simulated.memory)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: simulated.now)
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda value: contextlib.nullcontext())
    return simulated


def timed(device: Device, begin: str) -> list[str]:
    """What ran from the first time `begin` did."""
    return device.log[device.log.index(begin) :]


def test_the_gpu_clock_times_graphs_of_calls_in_cache(device) -> None:
    took = {"a": 5e-6, "b": 7e-6}
    calls = {name: device.call(name, seconds) for name, seconds in took.items()}
    assert GpuClock(torch.device("cpu")).measure(calls, cold=False) == pytest.approx(took)
    replay = {name: ["graph", *[name] * tuning.GRAPH_CALLS] for name in took}
    # Each once untimed, once timed; who comes first changes.
    once = {name: 2 * run for name, run in replay.items()}
    a, b = once["a"], once["b"]
    log = timed(device, "graph")
    assert log[: 3 * len(a + b)] == [*a, *b, *a, *b, *b, *a]
    assert len(log) == (tuning.MAX_ROUNDS + 1) * len(a + b)


def test_the_gpu_clock_flushes_ahead_of_every_cold_call(device) -> None:
    took = {"a": 5e-6, "b": 7e-6}
    calls = {name: device.call(name, seconds) for name, seconds in took.items()}
    seconds = GpuClock(torch.device("cpu")).measure(calls, cold=True)
    assert seconds == pytest.approx({name: 10 * value for name, value in took.items()})
    log = timed(device, "flush")
    assert log[:6] == ["flush", "graph", "a", "flush", "graph", "b"]
    assert log[0::3] == ["flush"] * (len(log) // 3)
    assert device.flushed_bytes >= 2 * tuning.gpu_of(torch.device("cpu")).l2_bytes


@pytest.mark.parametrize("cold", [False, True])
def test_the_gpu_clock_gives_medians(device, cold: bool) -> None:
    device.disturbed_every = 37
    seconds = GpuClock(torch.device("cpu")).measure({"a": device.call("a", 5e-6)}, cold)
    assert seconds == pytest.approx({"a": 50e-6 if cold else 5e-6})


@pytest.mark.parametrize("cold", [False, True])
def test_the_gpu_clock_times_what_cannot_be_captured(device, cold: bool) -> None:
    took = {"a": 5e-6, "b": 7e-6}
    device.uncapturable = {"b"}
    calls = {name: device.call(name, seconds) for name, seconds in took.items()}
    seconds = GpuClock(torch.device("cpu")).measure(calls, cold)
    assert seconds == pytest.approx({name: (10 if cold else 1) * value for name, value in took.items()})


def test_the_gpu_clock_is_bounded(device) -> None:
    calls = {"slow": device.call("slow", 4e-3), "fast": device.call("fast", 20e-6)}
    GpuClock(torch.device("cpu")).measure(calls, cold=False)
    # A long call is alone in its graph.
    log = timed(device, "graph")
    assert "slow" not in [b for a, b in itertools.pairwise(log) if a == "slow"]
    # To see how long it is, to capture it, and in rounds of which the first says how many there may be.
    assert device.log.count("slow") == 2 + 1 + 2 * (1 + tuning.MIN_ROUNDS)
    assert GpuClock(torch.device("cpu")).measure({}, cold=False) == {}


def on_a_gpu() -> dict[str, Callable[[], object]]:
    """Products of which one is eight times the other's work, and one that cannot be captured."""
    gpu = torch.device("cuda")
    small, large = (torch.randn(n, n, device=gpu, dtype=torch.float16) for n in (2048, 4096))
    out = {n: torch.empty(n, n, device=gpu, dtype=torch.float16) for n in (2048, 4096)}

    def synchronises() -> None:
        torch.mm(small, small, out=out[2048]).sum().item()

    return {
        "large": lambda: torch.mm(large, large, out=out[4096]),
        "small": lambda: torch.mm(small, small, out=out[2048]),
        "synchronises": synchronises,
    }


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cold", [False, True])
def test_on_a_gpu_more_work_takes_longer(cold: bool) -> None:
    calls = on_a_gpu()
    stream = torch.cuda.current_stream()
    begin = time.perf_counter()
    seconds = GpuClock(torch.device("cuda")).measure(calls, cold)
    assert time.perf_counter() - begin < 5.0
    assert 3 < seconds["large"] / seconds["small"] < 16
    assert seconds["synchronises"] > seconds["small"]
    # A capture that failed leaves nothing behind.
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_cold_call_reads_from_memory() -> None:
    # Half of L2: warm it is read from there.
    nbytes = tuning.gpu_of(torch.device("cuda")).l2_bytes // 2
    x = torch.randn(nbytes // 4, device="cuda")
    out = torch.empty((), device="cuda")
    clock, calls = GpuClock(torch.device("cuda")), {"sum": lambda: torch.sum(x, dim=0, out=out)}
    warm, cold = (clock.measure(calls, cold)["sum"] for cold in (False, True))
    assert cold > 1.1 * warm


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_problem_is_tuned_and_known_afterwards(tmp_path) -> None:
    gpu = torch.device("cuda")
    environment = environment_of(gpu)
    cache = TuneCache(tmp_path / "t.json", environment, shipped_path(environment))
    calls = on_a_gpu()
    candidates = [
        Candidate("large", 1.0, lambda: calls["large"]),
        Candidate("small", 2.0, lambda: calls["small"]),
    ]
    assert Tuner(cache, GpuClock(gpu)).choose("product", candidates) == "small"
    assert Tuner(TuneCache(tmp_path / "t.json", environment), None).choose("product", candidates) == "small"
