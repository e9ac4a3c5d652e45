"""The benchmark of training steps: what is refused, its rows and the page that is made of them."""

from __future__ import annotations

import json

import pytest
import torch
import training
import training_page
from click.testing import CliRunner
from parity import needs_native
from training import VARIANTS, Batch, Case, Judge, LossAlone, LossJudge, Step, Variant, Wrong

SMALL = Case("shelfnet18_lw", 2, (64, 64), "float32", "cpu")
LOSS = Case("loss", 2, (64, 96), "float32", "cpu")


def test_batches_are_the_same_at_every_run_and_labels_are_classes_or_ignored():
    first, second = (Batch.of(SMALL, 19) for _ in range(2))
    assert torch.equal(first.images, second.images) and torch.equal(first.target, second.target)
    assert first.target.shape == (2, 64, 64) and first.target.dtype is torch.uint8
    assert ((first.target < 19) | (first.target == 255)).all()
    assert first.present.shape == (2, 19) and 0 < first.present.sum() < 38


@needs_native
def test_losses_are_judged_by_their_gradients():
    judge = LossJudge(LOSS)
    ours, eager = VARIANTS["shelfkern"], VARIANTS["eager"]
    assert 0 < judge.error_of(ours, LossAlone(ours, LOSS)) <= judge.limit
    assert 0 < judge.error_of(eager, LossAlone(eager, LOSS)) <= judge.limit
    judge.limit = 0
    with pytest.raises(Wrong, match="at most 0 is allowed"):
        judge.error_of(ours, LossAlone(ours, LOSS))


@needs_native
@pytest.mark.parametrize("model", ["shelfnet18_lw"])
def test_a_step_of_ours_is_right_and_changes_the_weights(model, monkeypatch):
    monkeypatch.setattr(training, "CHECKED_EXTENT", 64)
    case = Case(model, 2, (64, 64), "float32", "cpu")
    judge, step = Judge(case), Step(Variant(ours=True), case)
    assert 0 < judge.error_of(Variant(ours=True), step) <= judge.limit
    before = [p.detach().clone() for p in step.objective.parameters()]
    assert step().isfinite()
    changed = [not torch.equal(a, b) for a, b in zip(before, step.objective.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@needs_native
def test_rows_and_page(tmp_path):
    out = tmp_path / "training_cpu.jsonl"
    options = ["--model", "loss", "--size", "64", "64", "--batch", "1", "--case-seconds", "0.01"]
    options += ["--dtype", "float32", "--variant", "eager", "--variant", "shelfkern", "--out", str(out)]
    ran = CliRunner().invoke(training.main, options)
    assert ran.exit_code == 0, ran.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["eager", "shelfkern"]
    assert rows[1]["ours_times_faster"] == 1 and rows[0]["median_ms"] > 0
    again = CliRunner().invoke(training.main, [*options, "--resume"])
    assert again.exit_code == 0 and len(out.read_text().splitlines()) == 2
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text(
        "a\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nb\n<!-- gpu: begin -->\n<!-- gpu: end -->\n"
    )
    readme.write_text("a\n<!-- training: begin -->\nold\n<!-- training: end -->\nb\n")
    training_page.main(page, readme, tmp_path)
    for path in (page, readme):
        text = path.read_text()
        assert "old" not in text and f"**{rows[0]['ours_times_faster']:.2f}x**" in text and "\nb\n" in text


def row(variant, milliseconds, **others):
    found = {
        "model": "loss", "batch": 4, "size": [512, 512], "dtype": "float32", "variant": variant,
        "ours": variant.startswith("shelfkern"), "median_ms": milliseconds,
        "ours_times_faster": milliseconds / 50,
        "cpu": "A CPU", "isa": "avx2", "threads": 2, "torch": "2.0", "shelfkern": "0.1", "commit": "abc",
        "time": "2026-01-02T03:04:05Z", "command": f"python benchmarks/training.py --variant {variant}",
    }  # fmt: skip
    return found | others


def test_the_readmes_table_has_a_line_a_case():
    rows = [
        row("eager", 90.0, memory_mib=400.4),
        row("torch.compile", 100.0, memory_mib=300.4),
        row("shelfkern", 50.0, memory_mib=9.4),
        row("shelfkern, torch.compile", 40.0, memory_mib=8.0),
        row("eager", 45.0, dtype="bfloat16"),
        row("shelfkern", 50.0, dtype="bfloat16"),
        row("shelfkern", 50.0, model="alone"),
    ]
    lines = training_page.beside(rows)
    assert lines[2:5] == [
        "| loss | 4 | 512x512 | float32 | eager 90.0 ms | 50.0 ms | **1.80x** | 9 | 300 |",
        "| loss | 4 | 512x512 | bfloat16 | eager 45.0 ms | 50.0 ms | **0.90x** |  |  |",
        "",
    ]
    assert "A CPU, avx2, 2 threads; torch 2.0, shelfkern 0.1 at abc; 2026-01-02." in lines[5]


def test_the_readme_and_the_page_show_the_results():
    for path, made_of in (
        (training_page.README, training_page.readme_of),
        (training_page.PAGE, training_page.page_of),
    ):
        text = path.read_text()
        assert made_of(text, training_page.RESULTS) == text, path


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ran = CliRunner().invoke(training.main, ["--device", "cuda"])
    assert ran.exit_code == 1 and "no GPU" in ran.output
