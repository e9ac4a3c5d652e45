"""Timing variants side by side."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from shelfkern import native, timing
from shelfkern.timing import Timing, median_ratio, time_interleaved
from shelfkern.version import __version__


class Clock:
    """A clock that only its variants move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, *seconds: float):
        """Takes the given seconds in turn, the last for ever."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_order_rotates() -> None:
    clock = Clock()
    time_interleaved({name: clock.variant(name, 1) for name in "abc"}, rounds=4, warmup=0, clock=clock)
    assert "".join(clock.calls) == "abcbcacababc"


def test_what_is_called_ahead_is_not_timed() -> None:
    now, ahead = [0.0], []

    def later() -> None:
        ahead.append(now[0])
        now[0] += 5.0

    timings = time_interleaved({"a": lambda: None, "b": lambda: None}, 3, clock=lambda: now[0], ahead=later)
    assert timings["a"].seconds == timings["b"].seconds == (0.0, 0.0, 0.0)
    assert len(ahead) == 2 * (3 + 2)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_warmup_rounds_run_and_are_not_counted(warmup: int) -> None:
    clock = Clock()
    variants = {
        "a": clock.variant("a", *[9] * warmup, 1, 2, 3),
        "b": clock.variant("b", *[9] * warmup, 4, 5, 6),
    }
    timings = time_interleaved(variants, rounds=3, warmup=warmup, clock=clock)
    assert timings == {"a": Timing((1, 2, 3)), "b": Timing((4, 5, 6))}
    assert clock.calls.count("a") == clock.calls.count("b") == warmup + 3
    # The first counted round starts with the first variant, however many came before.
    assert clock.calls[2 * warmup : 2 * warmup + 2] == ["a", "b"]


def test_time_between_the_variants_is_nobodys() -> None:
    clock = Clock()
    ticks = iter([0.0, 1.0, 50.0, 52.0])
    variants = {"a": clock.variant("a", 0), "b": clock.variant("b", 0)}
    timings = time_interleaved(variants, rounds=1, warmup=0, clock=lambda: next(ticks))
    assert timings == {"a": Timing((1.0,)), "b": Timing((2.0,))}


@pytest.mark.parametrize("rounds", [0, -3])
def test_rounds_are_at_least_one(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"^rounds is {rounds}, it must be at least 1$"):
        time_interleaved({"a": lambda: None}, rounds)


def test_no_variants() -> None:
    with pytest.raises(ValueError, match=r"^variants is empty, it must hold at least one$"):
        time_interleaved({}, 3)


def test_a_failing_variant_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        time_interleaved({"a": lambda: 1 / 0}, 1)


def test_the_clock_is_real_by_default() -> None:
    import time

    timings = time_interleaved({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, 3, 0)
    assert 0.02 <= timings["sleep"].median < 10 and timings["nothing"].median < timings["sleep"].median


def test_medians_and_quantiles() -> None:
    odd, even = Timing((5.0, 1.0, 3.0)), Timing((4.0, 1.0, 2.0, 3.0))
    assert odd.median == 3 and even.median == 2.5
    assert [even.quantile(q) for q in (0, 0.5, 1)] == [1, 2.5, 4]
    assert even.quantile(0.1) == pytest.approx(1.3) and odd.quantile(0.9) == pytest.approx(4.6)
    assert Timing((7.0,)).quantile(0.1) == Timing((7.0,)).median == 7


def test_ratios_are_taken_within_rounds() -> None:
    # One round was disturbed for both: the ratio of the medians would be 5, not 2.
    slow, fast = Timing((2.0, 20.0, 10.0)), Timing((1.0, 10.0, 2.0))
    assert median_ratio(slow, fast) == 2
    assert median_ratio(fast, slow) == 0.5


def test_ratios_need_equal_rounds() -> None:
    with pytest.raises(ValueError):
        median_ratio(Timing((1.0, 2.0)), Timing((1.0,)))


def test_the_environment() -> None:
    about = timing.environment()
    assert about["torch"] == torch.__version__ and about["shelfkern"] == __version__
    assert about["threads"] == torch.get_num_threads() and about["python"] == platform.python_version()
    assert about["isa"] == (native.module.isa() if native.module else None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", about["time"])
    assert about["cpu"] == timing.cpu_name() != ""


def test_the_environment_without_native_kernels(monkeypatch) -> None:
    monkeypatch.setattr(native, "module", None)
    assert timing.environment()["isa"] is None


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit(tmp_path, monkeypatch) -> None:
    file = tmp_path / "timing.py"
    file.write_text("1")
    monkeypatch.setattr(timing, "__file__", str(file))
    assert timing.git_commit() is None
    git(tmp_path, "init", "-q")
    (tmp_path / "other.py").write_text("1")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-qm", "first")
    # A repository around an installed copy is not the copy's.
    assert timing.git_commit() is None
    git(tmp_path, "add", "timing.py")
    git(tmp_path, "commit", "-qm", "second")
    commit = git(tmp_path, "rev-parse", "HEAD")
    found = timing.git_commit()
    assert len(found) >= 7 and commit.startswith(found)
    file.write_text("2")
    assert timing.git_commit() == f"{found}+"


def test_the_commit_without_git(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert timing.git_commit() is None


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.sys, "orig_argv", ["/somewhere/bin/python", "-m", "pytest", "a b"])
    assert timing.command() == "python -m pytest 'a b'"
