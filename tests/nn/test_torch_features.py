"""What users of torch.nn expect to work, works."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import two_processes
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

from shelfkern.nn import ShelfNet, ShelfNetConfig, ShelfNetOutput

KINDS = ["shelfnet18_lw", "shelfnet50"]

# Compilers take seconds for each deep model and see the same block types in this one.
SHALLOW = {
    "attention": dict(merge="attention", head="conv", negative_slope=0.01, presence=False),
    "deconv": dict(merge="deconv", head="linear"),
}


def shallow(merge: str) -> ShelfNet:
    return ShelfNet(ShelfNetConfig(5, "resnet18", 4, (4, 8), head_width=4, **SHALLOW[merge])).eval()


def without_dropout(model: ShelfNet) -> ShelfNet:
    """The model in train mode and float64, so that its gradients can be compared closely."""
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model.double().train()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert_close(a, b, rtol=0, atol=tolerance * b.std().item())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", KINDS)
def test_compile_sees_one_graph(narrow, name: str) -> None:
    model, image = narrow(name), torch.randn(2, 3, 50, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(image), model(image))


@pytest.mark.parametrize("merge, backend", [("attention", "aot_eager"), ("deconv", "eager")])
def test_compile_trains(merge: str, backend: str) -> None:
    model = without_dropout(shallow(merge))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for module in (model, compiled):
        out = module(image)
        assert isinstance(out, ShelfNetOutput)
        (out.scores.square().mean() + sum(a.square().mean() for a in out.aux)).backward()
    gradient = compiled.get_submodule("backbone.conv1").weight.grad
    close(gradient, model.backbone.conv1.weight.grad, 1e-9)


@pytest.mark.parametrize("merge", list(SHALLOW))
@torch.no_grad()
def test_export_with_dynamic_batch_and_size(merge: str) -> None:
    model = shallow(merge)
    # Not 32: a level of one pixel has every memory format at once, to which export would tie the program.
    sizes = {0: Dim("batch"), 2: Dim("height", min=33), 3: Dim("width", min=33)}
    program = torch.export.export(model, (torch.randn(2, 3, 70, 101),), dynamic_shapes=(sizes,))
    exported = program.module()
    for shape in [(1, 3, 33, 200), (3, 3, 64, 96), (2, 3, 128, 64), (1, 3, 101, 99)]:
        image = torch.randn(shape)
        close(exported(image), model(image))


@torch.no_grad()
def test_export_of_a_model_that_enlarges_images() -> None:
    config = ShelfNetConfig(5, "resnet18", 4, (4, 8), head_width=4, input_scale=1.6, **SHALLOW["attention"])
    model = ShelfNet(config).eval()
    sizes = {0: Dim("batch"), 2: Dim("height", min=33), 3: Dim("width", min=33)}
    program = torch.export.export(model, (torch.randn(2, 3, 70, 101),), dynamic_shapes=(sizes,))
    exported = program.module()
    for shape in [(1, 3, 33, 200), (3, 3, 64, 96), (1, 3, 101, 99)]:
        image = torch.randn(shape)
        close(exported(image), model(image))


@pytest.mark.parametrize("name", KINDS)
def test_export_of_a_published_model(narrow, name: str) -> None:
    model = narrow(name)
    program = torch.export.export(model, (torch.randn(1, 3, 64, 64),))
    image = torch.randn(1, 3, 64, 64)
    close(program.module()(image), model(image))


@torch.no_grad()
def test_channels_last_gives_the_same(narrow, model_name: str) -> None:
    model, image = narrow(model_name), torch.randn(2, 3, 64, 96)
    expected = model(image)
    model.to(memory_format=torch.channels_last)
    out = model(image.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    close(out, expected, 1e-4)
    close(model(image), expected, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_autocast_trains_in_bfloat16(narrow, name: str) -> None:
    model = narrow(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
        assert model.backbone.conv1(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
        loss = out.scores.float().square().mean()
    loss.backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_floating_dtype(narrow, model_name: str, dtype: torch.dtype) -> None:
    out = narrow(model_name).to(dtype)(torch.randn(1, 3, 40, 64, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()


def pickled(model: ShelfNet) -> ShelfNet:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
@torch.no_grad()
def test_twins(narrow, model_name: str, twin) -> None:
    model, image = narrow(model_name), torch.randn(1, 3, 32, 64)
    other = twin(model)
    expected = model(image)
    assert torch.equal(other(image), expected) and other.config == model.config
    other.backbone.conv1.weight.zero_()
    assert torch.equal(model(image), expected)


def test_convert_sync_batchnorm(narrow, model_name: str) -> None:
    model = narrow(model_name)
    state, image = model.state_dict(), torch.randn(1, 3, 32, 64)
    expected = model(image)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert torch.equal(converted(image), expected)
    converted.load_state_dict(state)


def test_gradients_of_two_processes_are_averaged(narrow, tmp_path) -> None:
    models = [without_dropout(narrow(name)) for name in KINDS]
    images = torch.randn(4, 3, 32, 64, dtype=torch.float64)
    torch.save((models, images), tmp_path / "case.pt")
    torch.multiprocessing.spawn(two_processes.train_half, (str(tmp_path),), nprocs=2)
    for model, gradients in zip(models, torch.load(tmp_path / "gradients.pt"), strict=True):
        (sum(two_processes.loss(model, half) for half in images.chunk(2)) / 2).backward()
        assert len(gradients) == len(list(model.parameters()))
        # Of all: biases before a batch norm have a gradient of nothing but rounding.
        largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12 * largest)
