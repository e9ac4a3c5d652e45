"""The README's tables and the plots, made of a few invented rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import page as op_page
import pytest
import table
from peers import of_device

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
    names = ["model", "size", "dtype", "output", "threads", "fastest peer", "shelfkern"]
    assert cells(header) == [*names, "speed-up over the fastest peer"]
    expected = [
        "shelfnet50",
        "512x512",
        "float32",
        "scores",
        "2",
        "eager 200.0 ms",
        "100.0 ms",
        "**400.00x**",
    ]
    assert cells(line) == expected
    assert "A CPU, avx512" in about


def cpu_rows():
    """One case on two threads and on one; OpenVINO is the fastest peer."""
    actual = {"peak_gflop_per_s": 200.0, "gflop_per_s": 300.0, "actual_gflop_per_s": 120.0, "of_peak": 0.6}
    memory = {"memory_mib": 150.4, "memory_net_mib": 50.6}
    found = []
    for threads, factor in ((2, 1.0), (1, 2.0)):
        times = {"shelfkern": 50.0, "eager": 200.0, "OpenVINO": 90.0}
        for variant, milliseconds in times.items():
            ratio = milliseconds / times["shelfkern"]
            others = {"dtype": "float32", "threads": threads, "ours_times_faster": ratio}
            others |= actual | (memory if threads == 2 else {})
            found.append(row(variant, factor * milliseconds, **others))
    return found


def cpu_layers():
    about = {"model": "shelfnet50", "size": [512, 512], "batch": 1, "dtype": "float32", "output": "scores"}
    about |= {"threads": 2}
    layer = about | {"op": "conv_bn_act", "algorithm": "native direct", "floor_us": 10e3, "median_us": 20e3}
    return [
        layer | {"layer": 0},
        layer | {"layer": 1},
        layer | {"layer": 2, "op": "stem", "algorithm": "native", "median_us": 10e3},
        about | {"layer": None, "op": "whole", "floor_us": 30e3},
    ]


def test_only_the_most_threads_are_in_the_readme(tmp_path):
    write(tmp_path / "models_cpu.jsonl", cpu_rows())
    lines = table.markdown(tmp_path).splitlines()
    assert len([line for line in lines if "shelfnet50" in line]) == 1
    assert cells(lines[2])[4:] == ["2", "OpenVINO 90.0 ms", "50.0 ms", "**1.80x**"]


def test_every_thread_count_is_in_the_pages_table():
    header, _, two, one, _, _ = table.times_of_all(cpu_rows(), [])
    assert cells(header)[5:] == ["eager", "OpenVINO", "shelfkern", "speed-up over the fastest peer"]
    assert cells(two)[4:] == ["2", "200.0 ms", "90.0 ms", "50.0 ms", "**1.80x**"]
    assert cells(one)[4:] == ["1", "400.0 ms", "180.0 ms", "100.0 ms", "**1.80x**"]


def test_targets_are_held_against_floors():
    lines = table.targets(cpu_rows(), cpu_layers())
    # On two threads 90 ms over the floor of 30; of one thread no floor is known.
    assert cells(lines[2])[4:] == ["2", "**1.80x**", "1.5x", "met", "30.0 ms", "3.00x"]
    assert cells(lines[3])[4:] == ["1", "**1.80x**", "1.5x", "met", "", ""]
    labels = [found | {"output": "labels"} for found in cpu_rows()]
    assert cells(table.targets(labels, cpu_layers())[2])[5:8] == ["**1.80x**", "2.0x", "missed"]
    far = [found | {"floor_us": 50e3} for found in cpu_layers()]
    assert cells(table.targets(labels, far)[2])[7] == "out of reach of these algorithms"
    codes = [found | {"dtype": "int8", "output": "labels"} for found in cpu_rows()]
    assert cells(table.targets(codes, [])[2])[5:8] == ["**1.80x**", "1.0x", "met"]


def refused_rows():
    """As `cpu_rows` on two threads; ours and OpenVINO failed the accuracy check, and one peer cannot run."""
    timed = [found | {"ours_times_faster": None} for found in cpu_rows()[:3]]
    refused = {"reason": "wrong, not timed: the largest error is 2.7, at most 1.6 is allowed"}
    for found in (timed[0], timed[2]):
        for key in [key for key in found if key.endswith(("_ms", "_mib", "_s")) or key == "of_peak"]:
            del found[key]
        found |= refused
    return [*timed, {**timed[0], "variant": "ONNX Runtime", "reason": "failed: ValueError: no int8"}]


def test_a_result_that_failed_the_accuracy_check_says_so(tmp_path):
    path = write(tmp_path / "models_cpu.jsonl", refused_rows())
    assert [found["variant"] for found in table.read(path)] == ["eager"]
    rows = table.read(path, refused=True)
    assert [found["variant"] for found in rows] == ["shelfkern", "eager", "OpenVINO"]
    failed = "failed the accuracy check"
    assert cells(table.markdown(tmp_path).splitlines()[2])[5:] == ["eager 200.0 ms", failed, "not timed"]
    assert cells(table.times_of_all(rows, [])[2])[5:] == ["200.0 ms", failed, failed, "not timed"]
    assert cells(table.targets(rows, cpu_layers())[2])[5:] == [failed, "1.5x", "missed", "30.0 ms", "6.67x"]
    assert cells(table.arithmetic(rows, [])[2])[5:] == ["", failed, "", "", "eager: 300, 60%"]
    assert cells(table.memory(rows, [])[2])[5:] == ["51 (150)", ""]
    on_gpu = [found | GPU for found in rows]
    assert cells(table.on_gpu(on_gpu)[2])[5:] == [failed, "", "eager 200.0 ms", "not timed", "", ""]


def test_arithmetic_is_counted_both_ways():
    line = table.arithmetic(cpu_rows(), [])[2]
    assert cells(line)[5:] == ["200", "300", "120", "60%", "OpenVINO: 300, 60%"]


def test_memory_is_of_the_cases_that_have_it():
    rows = cpu_rows()
    header, _, line = table.memory(rows, [])
    assert cells(header)[5:] == ["eager", "OpenVINO", "shelfkern", "shelfkern, model kept"]
    assert cells(line)[4:] == ["2", "51 (150)", "51 (150)", "51 (150)", ""]
    rows[0]["memory_with_model_mib"] = 70.4
    assert cells(table.memory(rows, [])[2])[-1] == "70"


def test_layers_are_summed_by_op_and_algorithm():
    alone = [found | {"threads": 1} for found in cpu_layers()]
    _, _, convolutions, stem = table.slowest_layers([], cpu_layers() + alone)
    assert cells(convolutions)[5:] == [
        "conv_bn_act",
        "native direct",
        "2",
        "40.00 ms",
        "80%",
        "20.00 ms",
        "50%",
    ]
    assert cells(stem)[5:] == ["stem", "native", "1", "10.00 ms", "20%", "10.00 ms", "100%"]


def test_the_page_has_a_place_for_each_table():
    page = (ROOT / "docs" / "cpu.md").read_text()
    made = table.cpu_page(page, cpu_rows(), cpu_layers())
    assert table.cpu_page(made, cpu_rows(), cpu_layers()) == made
    for name in table.PARTS:
        assert f"<!-- {name}: begin -->\n| model" in made


def test_the_pages_show_the_results():
    readme, page = (ROOT / name for name in ("README.md", "docs/cpu.md"))
    results, layers = (table.RESULTS / name for name in (table.FILES[1], table.CPU_LAYERS))
    text = readme.read_text()
    assert table.replaced(text, table.markdown(table.RESULTS)) == text
    ops = op_page.table(table.read(table.RESULTS / op_page.FILE))
    assert table.replaced(text, "\n".join(ops), op_page.MARK) == text
    text = page.read_text()
    assert table.cpu_page(text, table.read(results, refused=True), table.read(layers)) == text
    assert table.avx2_page(text, table.read(table.RESULTS / table.CPU_AVX2, refused=True)) == text


def test_every_command_and_commit_is_named_once(tmp_path):
    rows = [row("eager", 200.0), row("shelfkern", 100.0), row("shelfkern", 90.0)]
    rows[2] |= {"dtype": "bfloat16", "command": "python benchmarks/models.py --resume", "commit": "def"}
    write(tmp_path / "models_cpu.jsonl", rows)
    commands = "`python benchmarks/models.py`, `python benchmarks/models.py --resume`;"
    about = table.times_of_all(rows, [])[-1]
    assert commands in about and "at abc, def; 2026-01-02." in about
    # The README leaves the commands to the page and to the rows themselves.
    about = table.markdown(tmp_path).splitlines()[-1]
    assert "`make bench-cpu`; A CPU, avx512; torch 2.0, shelfkern 0.1 at abc, def; 2026-01-02;" in about
    assert "python benchmarks" not in about and "`benchmarks/results/models_cpu.jsonl`" in about


def test_both_files_give_two_tables(gpu):
    write(gpu.parent / "models_cpu.jsonl", [row("eager", 200.0), row("shelfkern", 100.0)])
    text = table.markdown(gpu.parent)
    assert text.index("A GPU") < text.index("A CPU")


def test_the_part_between_the_markers_is_replaced(gpu, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RESULTS", gpu.parent)
    (tmp_path / "docs").mkdir()
    marks = [f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in (*table.PARTS, "avx2")]
    (tmp_path / "docs" / "cpu.md").write_text("page\n" + "".join(marks))
    write(gpu.parent / "models_cpu.jsonl", cpu_rows())
    write(gpu.parent / "models_cpu_avx2.jsonl", [found | {"isa": "avx2"} for found in cpu_rows()])
    table.main()
    page = (tmp_path / "docs" / "cpu.md").read_text()
    assert "**1.80x**" in page and "A CPU, avx512;" in page
    assert "A CPU, avx2;" in page.partition("<!-- avx2: begin -->")[2]
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
    on_gpu = [found | GPU for found in (layer(0, 3.0), layer(1, 4.0), whole)]
    layers = write(gpu.parent / "models_gpu_layers.jsonl", on_gpu)
    script = ROOT / "benchmarks" / "plot.py"
    for _ in range(2):
        before = [path.with_suffix(".svg") for path in (gpu, layers)]
        before = [path.read_text() if path.exists() else None for path in before]
        subprocess.run([sys.executable, script, gpu, layers], check=True, timeout=120)
    cases, steps = (path.with_suffix(".svg").read_text() for path in (gpu, layers))
    assert [cases, steps] == before
    assert "cuDNN graph" in cases and "TensorRT" not in cases
    on_cpu = [
        found | {"threads": threads, "output": "scores"}
        for threads in (2, 1)
        for found in (layer(0, 3.0), whole)
    ]
    several = write(gpu.parent / "models_cpu_layers.jsonl", on_cpu)
    subprocess.run([sys.executable, script, several], check=True, timeout=120)
    drawn = several.with_suffix(".svg").read_text()
    assert "threads 2" in drawn and "threads 1" in drawn
    assert "layers 7 us, whole 9 us" in steps and "triton 64x64" in steps


def op_row(shape, variant, microseconds, ratio=None, dtype="float32"):
    found = {
        "op": "stem", "shape": shape, "dtype": dtype, "variant": variant, "ours": variant == "native",
        "cache": "warm", "median_us": microseconds, "to_fastest_peer": ratio,
    }  # fmt: skip
    return found | ABOUT


def test_the_table_of_ops(monkeypatch, tmp_path):
    rows = [
        op_row("8x8", "native", 1.0, 2.0), op_row("8x8", "eager", 2.0),
        op_row("9x9", "native", 1.0, 0.5), op_row("9x9", "eager", 0.5), op_row("9x9", "oneDNN", 0.7),
        op_row("8x8", "native", 1.0, 3.0, "bfloat16"), op_row("8x8", "eager", 3.0, dtype="bfloat16"),
        op_row("7x7", "native", 1.0),  # without a peer
    ]  # fmt: skip
    write(tmp_path / "ops_cpu.jsonl", rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- ops: begin -->\nold\n<!-- ops: end -->\nafter\n")
    monkeypatch.setattr(op_page, "RESULTS", tmp_path)
    monkeypatch.setattr(op_page, "README", readme)
    op_page.main()
    before, titles, _, line, _, footer, *after = readme.read_text().splitlines()[1:]
    assert before == "<!-- ops: begin -->" and after == ["<!-- ops: end -->", "after"]
    assert cells(titles) == ["op", "float32", "bfloat16"]
    assert cells(line) == ["`stem`", "**1.00x** (0.50 to 2.00)", "**3.00x**"]
    assert footer.startswith("`python benchmarks/models.py`; A CPU, avx512, 2 threads; torch 2.0")


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
    environment |= {"GPU_STAGES": "models doctor", "MODELS_SECONDS": str(seconds), "MODELS_PEERS": "tensorrt"}
    script = ROOT / "benchmarks" / "gpu.sh"
    run = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    # One stage failed.
    assert run.returncode == 1, run.stdout + run.stderr
    first, *calls = log.read_text().splitlines()
    assert "torch.cuda.is_available" in first and calls[0] == "-m shelfkern doctor" and len(calls) == 3
    options = "--breakdown" if seconds == 300 else "--quick --no-tune --case-seconds 0.3"
    peers = [
        "cudnn",
        "eager",
        "autocast",
        *(["compile", "reduce-overhead"] if seconds == 300 else []),
        "tensorrt",
    ]
    chosen = " ".join(f"--peers {peer}" for peer in peers)
    wanted = (
        f"benchmarks/models.py --device cuda {options} {chosen} --seconds {seconds - 12} "
        f"--out {out}/models_gpu.jsonl"
    )
    assert set(peers) <= {peer.key for peer in of_device("cuda")}
    assert calls[1] == wanted
    # After the broken context the rest, without what has been measured; never more time than is left.
    again, left = calls[2].replace(" --resume", "", 1), int(calls[2].split("--seconds ")[1].split()[0])
    assert again.replace(f"--seconds {left}", f"--seconds {seconds - 12}") == wanted
    assert "--resume" in calls[2] and seconds - 17 < left <= seconds - 12
    assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "tuning-1.json"]
    lines = (out / "gpu.log").read_text().splitlines()
    assert lines[:2] == ["== doctor", "doctor ran"] and lines[2:5] == [
        "== models",
        "models ran",
        "models ran",
    ]
    assert "failed with status 3" in lines[-2] and "passed" in lines[-1]
