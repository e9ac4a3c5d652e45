from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from shelfkern.cli import commands
from shelfkern.cli import export as command
from shelfkern.nn import save_weights, shelfnet18_lw

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = shelfnet18_lw(3, backbone_width=8, widths=(8, 16, 32), head_width=8)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(model, path, dtype=torch.float32)
    return path


@torch.no_grad()
def test_the_graph_gives_the_models_scores_at_any_size(weights, tmp_path) -> None:
    from shelfkern.nn import from_weights

    path = tmp_path / "model.onnx"
    result = CliRunner().invoke(commands, ["export", str(path), "--weights", str(weights)])
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    model, session = from_weights(weights), onnxruntime.InferenceSession(path)
    for size in [(1, 64, 64), (3, 33, 100), (2, 32, 32)]:
        x = torch.randn(size[0], 3, *size[1:])
        scores = torch.from_numpy(session.run(["scores"], {"images": x.numpy()})[0])
        expected = model(x)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_the_licence_of_bundled_weights_is_told(weights, tmp_path, monkeypatch) -> None:
    module = sys.modules[command.callback.__module__]
    monkeypatch.setattr(module, "write_onnx", lambda model, path: path.write_bytes(b"graph"))
    path = tmp_path / "model.onnx"
    for name, lines in (("camvid", 2), (str(weights), 1)):
        result = CliRunner().invoke(commands, ["export", str(path), "--weights", name])
        assert result.exit_code == 0 and len(result.stdout.splitlines()) == lines
        assert ("research" in result.stdout) == (lines == 2)


def test_without_onnx_it_says_what_to_install(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "model.onnx"
    result = CliRunner().invoke(commands, ["export", str(path), "--weights", str(weights)])
    assert result.exit_code == 1 and "pip install 'shelfkern[export]'" in result.output
    assert not path.exists()


def test_a_place_that_cannot_be_written(weights, tmp_path) -> None:
    path = tmp_path / "nowhere" / "model.onnx"
    result = CliRunner().invoke(commands, ["export", str(path), "--weights", str(weights)])
    assert result.exit_code == 1 and "nowhere" in result.output and "Traceback" not in result.output
