"""The README's tables and the plots, made of a few invented rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import table

ROOT = Path(__file__).parents[2]
ABOUT = {
    "cpu": "A CPU", "threads": 2, "isa": "avx512", "torch": "2.0", "shelfkern": "0.1", "commit": "abc",
    "time": "2026-01-02T03:04:05Z", "command": "python benchmarks/models.py",
}  # fmt: skip
GPU = {"gpu": "A GPU", "cuda": "13.0", "cudnn": 91000, "triton": "3.6"}


def row(variant, milliseconds, **others):
    found = {
        "model": "shelfnet50", "size": [512, 512], "batch": 1, "dtype": "float16", "output": "scores",
        "variant": variant, "reason": None, "median_ms": milliseconds, "p10_ms": milliseconds,
        "p90_ms": milliseconds, "ours_times_faster": round(milliseconds / 0.5, 3), "fraction": 0.25,
        "reserved_mib": 100.0, "wall_images_per_s": 1000 / milliseconds,
    }  # fmt: skip
    return found | ABOUT | others


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def gpu(tmp_path):
    rows = [
        row("shelfkern", 0.5),
        row("shelfkern bound", 0.45),
        row("eager", 2.0),
        row("cuDNN graph", 0.75, reserved_mib=140.0),
        row("TensorRT", 0.1, reason="not installed: tensorrt"),
        row("shelfkern", 12.5, output="labels", size=[1024, 2048]),
        row(None, 0.1, reason="skipped: the time was spent", output="labels"),
    ]
    return write(tmp_path / "models_gpu.jsonl", [found | GPU for found in rows])


def test_the_gpus_table(gpu):
    lines = table.markdown(gpu.parent).splitlines()
    header, rule, first, second = map(cells, lines[:4])
    assert len(header) == len(rule) == len(first) == len(second)
    assert first == [
        *("shelfnet50", "512x512", "1", "float16", "scores", "500 us", "450 us", "cuDNN graph 750 us"),
        *("**1.50x**", "25%", "100, 140"),
    ]
    assert second[4:] == ["labels", "12.5 ms", "", "", "", "25%", ""]
    assert "`python benchmarks/models.py`; A GPU; CUDA 13.0" in lines[5] and "at abc; 2026-01-02." in lines[5]


def test_the_papers_row(gpu):
    lines = table.markdown(gpu.parent).splitlines()
    assert cells(lines[-1]) == ["shelfnet50", "float16", "2000", "59 (float32, GTX 1080 Ti)"]
    assert cells(lines[-3])[0].startswith("as the paper measures")


def test_the_cpus_table_takes_rows_of_earlier_runs(tmp_path):
    old = [row("eager", 200.0), row("shelfkern predict", 100.0)]
    for found in old:
        for key in ("batch", "reason", "fraction", "reserved_mib", "wall_images_per_s"):
            del found[key]
    write(tmp_path / "models_cpu.jsonl", [found | {"dtype": "float32"} for found in old])
    header, _, line, _, about = table.markdown(tmp_path).splitlines()
    assert cells(header) == ["model", "size", "dtype", "output", "eager", "shelfkern", "to the fastest other"]
    expected = ["shelfnet50", "512x512", "float32", "scores", "200 ms", "100 ms", "**400.00x**"]
    assert cells(line) == expected
    assert "A CPU, 2 threads, avx512" in about


def test_every_command_and_commit_is_named_once(tmp_path):
    rows = [row("eager", 200.0), row("shelfkern", 100.0), row("shelfkern", 90.0)]
    rows[2] |= {"dtype": "bfloat16", "command": "python benchmarks/models.py --resume", "commit": "def"}
    write(tmp_path / "models_cpu.jsonl", rows)
    about = table.markdown(tmp_path).splitlines()[-1]
    assert "`python benchmarks/models.py`, `python benchmarks/models.py --resume`;" in about
    assert "at abc, def;" in about


def test_both_files_give_two_tables(gpu):
    write(gpu.parent / "models_cpu.jsonl", [row("eager", 200.0), row("shelfkern", 100.0)])
    text = table.markdown(gpu.parent)
    assert text.index("A GPU") < text.index("A CPU")


def test_the_part_between_the_markers_is_replaced(gpu, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RESULTS", gpu.parent)
    table.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| model") and text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text


def layer(index, microseconds):
    return {
        "model": "shelfnet50", "size": [512, 512], "batch": 1, "dtype": "float16", "layer": index,
        "op": "conv_bn_act", "shape": [1, 64, 8, 8], "algorithm": "triton 64x64", "median_us": microseconds,
        "floor_us": 1.0,
    }  # fmt: skip


def test_plots(gpu):
    pytest.importorskip("matplotlib")
    whole = layer(None, 9.0) | {"layers_us": 7.0}
    layers = write(gpu.parent / "models_gpu_layers.jsonl", [layer(0, 3.0), layer(1, 4.0), whole])
    script = ROOT / "benchmarks" / "plot.py"
    for _ in range(2):
        before = [path.with_suffix(".svg") for path in (gpu, layers)]
        before = [path.read_text() if path.exists() else None for path in before]
        subprocess.run([sys.executable, script, gpu, layers], check=True, timeout=120)
    cases, steps = (path.with_suffix(".svg").read_text() for path in (gpu, layers))
    assert [cases, steps] == before
    assert "cuDNN graph" in cases and "TensorRT" not in cases
    assert "layers 7 us, whole 9 us" in steps and "triton 64x64" in steps


def test_a_file_without_times_gives_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "models_gpu.jsonl", [row("eager", 0.1, reason="failed")])
    command = [sys.executable, ROOT / "benchmarks" / "plot.py", path]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "holds no times" in run.stderr and not path.with_suffix(".svg").exists()


def test_gpu_sh_refuses_a_stage_that_it_has_not(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "GPU_STAGES": "build all",
    }
    script = ROOT / "benchmarks" / "gpu.sh"
    run = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and not (tmp_path / "out").exists()
    assert "GPU_STAGES has 'all', it may have build doctor tests" in run.stderr


INTERPRETER = """#!/usr/bin/env bash
# In place of Python on a machine with a GPU. The first run of models.py breaks the CUDA context.
echo "$*" >>"{log}"
case $* in
    *models.py*) echo "models ran"; [ -e "{log}.broken" ] || {{ touch "{log}.broken"; exit 70; }} ;;
    *doctor*) echo "doctor ran"; exit 3 ;;
esac
"""


@pytest.mark.parametrize("seconds", [60, 300])
def test_gpu_sh_runs_chosen_stages_and_writes_one_log(seconds, tmp_path):
    log, out, cache = (tmp_path / name for name in ("calls", "out", "cache"))
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(log=log))
    python.chmod(0o755)
    cache.mkdir()
    (cache / "tuning-1.json").write_text("{}")
    environment = os.environ | {"PYTHON": str(python), "OUT": str(out), "SHELFKERN_CACHE": str(cache)}
    environment |= {"GPU_STAGES": "models doctor", "MODELS_SECONDS": str(seconds)}
    script = ROOT / "benchmarks" / "gpu.sh"
    run = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    # One stage failed.
    assert run.returncode == 1, run.stdout + run.stderr
    first, *calls = log.read_text().splitlines()
    assert "torch.cuda.is_available" in first and calls[0] == "-m shelfkern doctor" and len(calls) == 3
    options = "--breakdown" if seconds == 300 else "--quick --no-tune --case-seconds 0.3"
    wanted = (
        f"benchmarks/models.py --device cuda {options} --seconds {seconds - 15} --out {out}/models_gpu.jsonl"
    )
    assert calls[1] == wanted
    # After the broken context the rest, without what has been measured; never more time than is left.
    again, left = calls[2].replace(" --resume", "", 1), int(calls[2].split("--seconds ")[1].split()[0])
    assert again.replace(f"--seconds {left}", f"--seconds {seconds - 15}") == wanted
    assert "--resume" in calls[2] and seconds - 20 < left <= seconds - 15
    assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "tuning-1.json"]
    lines = (out / "gpu.log").read_text().splitlines()
    assert lines[:2] == ["== doctor", "doctor ran"] and lines[2:5] == [
        "== models",
        "models ran",
        "models ran",
    ]
    assert "failed with status 3" in lines[-2] and "passed" in lines[-1]
