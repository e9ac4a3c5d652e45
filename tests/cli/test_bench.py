"""`shelfkern bench`: what its table says, and that it times no wrong result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from shelfkern import native
from shelfkern.cli import bench as command
from shelfkern.cli import commands, options
from shelfkern.nn import ShelfNet, ShelfNetConfig, save_weights
from shelfkern.timing import Timing

COLUMNS = ["", "median ms", "p10-p90 ms", "images/s", "times eager", "error"]
ROWS = ["eager", "accelerated", "accelerated, labels"]
CONFIG = ShelfNetConfig(
    num_classes=5, backbone="resnet18", backbone_width=4, widths=(4, 8, 12), merge="attention", head="conv"
)

# The module itself: the package's name for it is the command.
bench_module = sys.modules[command.callback.__module__]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(ShelfNet(CONFIG), path)
    return path


@pytest.fixture
def run(weights):
    """Runs `bench` on the tiny weights, quickly; anything but an exit is a failure."""

    def run(*args: object) -> Result:
        words = ["bench", "--weights", weights, "--rounds", 2, "--size", "32x64", *args]
        result = CliRunner().invoke(commands, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def cells(text: str) -> list[list[str]]:
    """The rows of rich's tables, headers too."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_the_table(run) -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].strip() == "32x64"
    header, *rows = cells(result.stdout)
    assert header == COLUMNS and [row[0] for row in rows] == ROWS
    eager, scores, labels = rows
    # Of another memory format than what all are held against.
    assert eager[4] == "1.00" and float(eager[5]) < 1e-4
    assert 0 < float(scores[5]) < 1e-3 and float(labels[5]) < 1e-3
    assert all(float(row[1]) > 0 and float(row[3]) > 0 and float(row[4]) > 0 for row in rows)


def test_a_table_for_every_size(run) -> None:
    result = run("--size", "48")
    titles = [line.strip() for line in result.stdout.splitlines() if line.strip() in ("32x64", "48x48")]
    assert titles == ["32x64", "48x48"] and len(cells(result.stdout)) == 2 * (1 + len(ROWS))


@pytest.mark.parametrize("backend", ["auto", "native", "library"])
def test_backends(backend: str, run, monkeypatch) -> None:
    if backend == "native" and native.why_not is not None:
        pytest.skip(f"no native kernels: {native.why_not}")
    asked = []
    make = bench_module.make_fast

    def spy(*args: object):
        asked.append(make(*args))
        return asked[-1]

    monkeypatch.setattr(bench_module, "make_fast", spy)
    assert run("--backend", backend).exit_code == 0
    assert [fast.backend for fast in asked] == [backend]


def test_tuning_and_graphs_are_the_engines(run, monkeypatch) -> None:
    asked = []
    make = options.accelerate

    def spy(*args: object, **given: object):
        asked.append(given)
        return make(*args, **given)

    monkeypatch.setattr(options, "accelerate", spy)
    assert run().exit_code == 0 and run("--tune", "--no-graphs").exit_code == 0
    assert asked == [{"tune": False, "graphs": True}, {"tune": True, "graphs": False}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_on_a_gpu(dtype: str, run, tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    result = run("--device", "cuda", "--dtype", dtype, "--json", path)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ROWS
    for line in lines:
        assert line["gpu"] and 0 < line["median_s"] < 0.1 and line["error"] < 0.1


def test_bfloat16_has_a_larger_error(run) -> None:
    assert 1e-4 < float(cells(run("--dtype", "bfloat16").stdout)[2][5]) < 0.3


def test_torch_compile_is_a_row_of_its_own(run, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, options: compiled.append(options) or model)
    rows = cells(run("--compile").stdout)[1:]
    assert [row[0] for row in rows] == ["eager", "torch.compile", *ROWS[1:]]
    assert compiled == [{"freezing": True}]


def test_a_published_model(monkeypatch) -> None:
    built = []

    def create(name: str) -> ShelfNet:
        built.append(ShelfNet(CONFIG))
        return built[-1]

    monkeypatch.setattr(bench_module, "create_model", create)
    words = ["bench", "--model", "shelfnet18_lw", "--rounds", "2", "--size", "32x64"]
    assert CliRunner().invoke(commands, words).exit_code == 0
    assert len(built) == 1 and not built[0].training


def test_json_lines_are_appended(run, weights, tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"earlier": true}\n')
    assert run("--json", path, "--size", "48").exit_code == 0
    earlier, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert earlier == {"earlier": True}
    assert [(line["size"], line["variant"]) for line in lines] == [
        (size, name) for size in ([32, 64], [48, 48]) for name in ROWS
    ]
    for line in lines:
        assert line["model"] == str(weights) and line["dtype"] == "float32"
        assert len(line["seconds"]) == 2 and min(line["seconds"]) > 0
        assert line["median_s"] == pytest.approx(sum(line["seconds"]) / 2)
        assert line["error"] < 1e-3
        assert {"cpu", "threads", "torch", "shelfkern", "commit", "time"} <= line.keys()


def test_a_wrong_result_is_not_timed(run, monkeypatch, tmp_path) -> None:
    make = bench_module.make_fast

    def broken(*args: object):
        fast = make(*args)
        right = fast.forward
        monkeypatch.setattr(fast, "forward", lambda x: right(x) + 0.1 * right(x).std())
        return fast

    def never(*args: object) -> dict:
        raise AssertionError("it was timed")

    monkeypatch.setattr(bench_module, "make_fast", broken)
    monkeypatch.setattr(bench_module, "time_interleaved", never)
    result = run("--json", tmp_path / "results.jsonl")
    assert result.exit_code == 1 and "wrong results, not timed: {'accelerated': 0.1" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_no_numbers_are_wrong() -> None:
    truth = torch.tensor([1.0, 2.0])
    assert not bench_module.error_of(torch.tensor([1.0, float("nan")]), truth) <= 1e9
    assert bench_module.error_of(torch.tensor([1.0, 3.0]), truth) == pytest.approx(1 / truth.std().item())


def test_the_error_of_labels_is_what_their_scores_lack() -> None:
    truth = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 0.0]]).view(1, 3, 1, 2)
    right, wrong = torch.tensor([[[1, 0]]], dtype=torch.uint8), torch.tensor([[[2, 0]]], dtype=torch.uint8)
    assert bench_module.error_of(right, truth) == 0
    assert bench_module.error_of(wrong, truth) == pytest.approx(1 / truth.std().item())


def test_the_numbers_of_a_row() -> None:
    timings = {"eager": Timing((0.2, 0.4, 0.3)), "accelerated": Timing((0.1, 0.1, 0.2))}
    table = bench_module.report(timings, {"eager": 0.0, "accelerated": 2e-6}, (32, 64))
    fast = bench_module.report({"eager": Timing((2e-4, 3e-4, 4e-4))}, {"eager": 0.0}, (32, 64))
    assert [next(iter(column.cells)) for column in fast.columns][1:3] == ["0.300", "0.220-0.380"]
    columns = [list(column.cells) for column in table.columns]
    assert [column[1] for column in columns] == [
        "accelerated",
        "100.0",
        "100.0-180.0",
        "10.0",
        "2.00",
        "2.0e-06",
    ]


@pytest.mark.parametrize(
    "options, status, sentence",
    [
        (["--size", "16"], 2, "'16' must be at least 32 pixels a side"),
        (["--size", "64x"], 2, "'64x' must be HEIGHTxWIDTH"),
        (["--rounds", "0"], 2, "0 is not in the range"),
        (["--backend", "eager"], 2, "'eager' is not one of 'auto', 'native', 'library'"),
        (["--dtype", "float64"], 2, "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--dtype", "float16"], 1, "dtype is torch.float16, on a CPU it may be"),
        (["--model", "shelfnet50"], 1, "exclude each other: give one of them"),
        (["--model", "unet"], 2, "'unet' is not one of 'shelfnet18_lw'"),
        (["--device", "cuda"], 1, "device is 'cuda'"),
        (["--weights", "nosuch"], 1, "weights 'nosuch' is neither a file nor a shipped name"),
        (["--json", "nosuch/a.json"], 1, "--json nosuch/a.json cannot be written: nosuch is not a folder"),
    ],
)
def test_what_cannot_run_is_said(options: list, status: int, sentence: str, run) -> None:
    result = run(*options)
    assert result.exit_code == status and sentence in result.stderr.splitlines()[-1]
    assert result.stdout == ""
