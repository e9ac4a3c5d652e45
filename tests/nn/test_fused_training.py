"""A model that trains by fused ops: state and eval mode are the plain one's, training is but for rounding."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import two_processes
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import shelfkern
from shelfkern import native
from shelfkern.nn import ShelfNet, ShelfNetConfig, blocks, fused
from shelfkern.nn.backbone import Bottleneck

TINY = {
    "attention": dict(merge="attention", head="conv", negative_slope=0.01, presence=False, dropout=0.1),
    "deconv": dict(merge="deconv", head="linear", backbone="resnet50"),
}


# With fewer channels oneDNN writes beyond its memory, as tests/train/stages.py says.
WIDTH = 8


def tiny(kind: str, **options) -> ShelfNet:
    torch.manual_seed(1)
    fields = dict(num_classes=4, backbone="resnet18", backbone_width=WIDTH, widths=(4, 8), head_width=4)
    return ShelfNet(ShelfNetConfig(**{**fields, **TINY[kind]}), **options)


def loss_of(out, target: torch.Tensor | None = None) -> torch.Tensor:
    presence = 0.0 if out.presence is None else out.presence.float().sigmoid().mean()
    return sum(s.float().square().mean() for s in (out.scores, *out.aux)) + presence


def gradients(model: nn.Module, image: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """The loss, its gradient by every parameter, and the buffers after it."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of((model if run is None else run)(image))
    loss.backward()
    found = {"loss": loss.detach().double()}
    found |= {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.double() for name, b in model.named_buffers()}


def distances(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensors' relative distances."""
    assert a.keys() == b.keys()
    # A bias that a norm cancels has no gradient but rounding.
    names = [name for name in a if not name.endswith("conv.bias")]
    return torch.stack([(a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-6) for n in names])


def float64_gradients(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a copy in float64, with the channels dropped that float32 would drop."""
    drop = nn.functional.dropout2d

    def dropped_alike(x, p=0.5, training=True, inplace=False):
        return x * drop(torch.ones_like(x, dtype=torch.float32), p, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout2d", dropped_alike)
        return gradients(copy.deepcopy(model).double(), image.double())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_state_and_eval_mode_are_the_plain_models(narrow, model_name: str) -> None:
    plain = narrow(model_name)
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    assert {type(m) for m in model.modules()} & set(fused.PLAIN) and isinstance(model, ShelfNet)
    assert not {type(m) for m in model.modules()} & set(fused.FUSED)
    expected, state = plain.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(map(torch.equal, state.values(), expected.values()))
    image = torch.randn(1, 3, 40, 64)
    assert torch.equal(model(image), plain(image))
    assert all(map(torch.equal, model.forward_heads(image).aux, plain.forward_heads(image).aux))
    plain.load_state_dict(state)
    assert shelfkern.nn.count_paths(model.train()) == shelfkern.nn.count_paths(plain)
    assert shelfkern.fuse_for_training(model) is model


def test_a_model_may_be_made_so(model_name: str) -> None:
    options = dict(backbone_width=4, widths=(4, 8, 16), aux=False)
    options |= dict(widths=(4, 8, 12, 16)) if model_name in ("shelfnet50", "shelfnet101") else {}
    options |= dict(widths=(8, 16, 32)) if model_name == "shelfnet34_lw" else {}
    torch.manual_seed(0)
    model = getattr(shelfkern.nn, model_name)(3, fused=True, **options)
    torch.manual_seed(0)
    plain = getattr(shelfkern.nn, model_name)(3, **options)
    assert type(model.backbone) is fused.FusedResNet and type(plain.backbone) is not fused.FusedResNet
    assert model.config == plain.config
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(TINY))
def test_gradients_are_those_of_the_plain_model(kind: str, dtype: torch.dtype) -> None:
    """As near to float64's as eager's, the same channels dropped: others would put them a length apart."""
    plain, image = tiny(kind).train(), torch.randn(4, 3, 64, 96)
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    truth = float64_gradients(plain, image)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        eager, found = (distances(gradients(m, image), truth) for m in (plain, model))
    # In bfloat16 some of so few gradients are nothing but rounding.
    measure, limit = (torch.max, 0.2) if dtype is torch.float32 else (torch.median, 1.0)
    assert 0 < measure(eager) < limit and measure(found) <= 2 * measure(eager)
    kernels = {type(m) for m in model.modules() if type(m) in fused.PLAIN}
    assert len(kernels) >= (4 if kind == "attention" else 5)


def test_nothing_falls_back(monkeypatch) -> None:
    def no(*args, **options):
        raise AssertionError("torch's own calls")

    if native.why_not is None:
        for name in ("bn_act_dropout", "shared_block_train"):
            monkeypatch.setattr(importlib.import_module(f"shelfkern.ops.{name}"), f"{name}_reference", no)
    for kind in TINY:
        loss_of(tiny(kind, fused=True).train()(torch.randn(2, 3, 32, 64))).backward()


def curve(model: nn.Module, steps: int, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    """Losses of training on four images of noise with labels in patches; with a scaler, in bfloat16."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 4, (4, 4, 4), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.005, 0.9)
    torch.manual_seed(3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
            out = model(images)
        loss = sum(nn.functional.cross_entropy(s.float(), labels) for s in (out.scores, *out.aux))
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", list(TINY))
def test_without_kernels_of_onednn_no_features_are_convolved_in_bfloat16(kind: str, monkeypatch) -> None:
    """But for what is pooled to one pixel."""
    monkeypatch.setattr(importlib.import_module("shelfkern.ops.conv_train"), "ONEDNN_HAS_BFLOAT16", False)
    cast, model = [], tiny(kind, fused=True).train()
    for name in ("conv2d", "conv_transpose2d"):
        function = getattr(nn.functional, name)

        def seen(x, *rest, f=function):
            if torch.is_autocast_enabled("cpu") and x[0, 0].numel() > 1:
                cast.append(tuple(x.shape))
            return f(x, *rest)

        monkeypatch.setattr(nn.functional, name, seen)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
    assert out.scores.dtype is torch.bfloat16 and not cast
    loss_of(out).backward()


def test_loss_curves_agree_over_200_steps() -> None:
    """Roundings grow from step to step, in eager too: between its two memory formats, which differ in the
    order of sums alone, curves part by a few hundredths. Ours and eager's may part by twice as much.
    """
    plain = tiny("attention").train()
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    formatted = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    eager, ours, other = (curve(m, 200) for m in (plain, model, formatted))
    assert eager[-20:].mean() < 0.7 * eager[0]
    assert_close(ours[:2], eager[:2], rtol=1e-4, atol=0)
    parted, allowed = (
        (c - eager).view(10, 20).mean(1).abs() / eager.view(10, 20).mean(1) for c in (ours, other)
    )
    assert parted.max() <= 2 * allowed.max() and parted.max() < 0.05, (parted, allowed)


def test_a_scaled_loss_changes_nothing_but_the_scale() -> None:
    def scaled(scale: float) -> torch.Tensor:
        return curve(tiny("attention", fused=True).train(), 4, torch.amp.GradScaler("cpu", init_scale=scale))

    assert_close(scaled(2.0**16), scaled(1.0))


def test_gradients_of_two_processes_are_averaged(tmp_path) -> None:
    model, images = tiny("attention", fused=True).train(), torch.randn(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    torch.save(([model], images), tmp_path / "case.pt")
    torch.multiprocessing.spawn(two_processes.train_half, (str(tmp_path),), nprocs=2)
    (found,) = torch.load(tmp_path / "gradients.pt")
    (sum(two_processes.loss(model, half) for half in images.chunk(2)) / 2).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        largest = parameter.grad.abs().max().item()
        assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4 * largest + 1e-7)


@pytest.mark.parametrize("first", ["fuse", "convert"])
def test_norms_over_processes_are_left_in_place(narrow, monkeypatch, first: str) -> None:
    model, image = narrow("shelfnet18_lw"), torch.randn(2, 3, 32, 64)
    plain = copy.deepcopy(model).train()
    steps = [shelfkern.fuse_for_training, nn.SyncBatchNorm.convert_sync_batchnorm]
    for step in steps if first == "fuse" else steps[::-1]:
        model = step(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(m) is nn.SyncBatchNorm for m in norms)
    # As in a group of one process, which on a CPU has no SyncBatchNorm.
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)
    monkeypatch.setattr(nn.SyncBatchNorm, "_check_input_dim", lambda self, x: None)
    torch.manual_seed(0)
    found = model.train()(image)
    torch.manual_seed(0)
    assert_close(found.scores, plain(image).scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, dtype", [("deconv", torch.float32), ("attention", torch.bfloat16)])
def test_compile_sees_one_graph(kind: str, dtype: torch.dtype) -> None:
    """Also of the backward pass, whose operators' fake kernels this backend traces."""
    model, image = tiny(kind, fused=True).train(), torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = distances(gradients(twin, image, compiled), gradients(model, image))
    assert found.max() < (1e-3 if dtype is torch.float32 else 0.05)


def test_activation_checkpoints_draw_the_same_dropout() -> None:
    model, image = tiny("attention", fused=True).train(), torch.randn(2, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    expected = gradients(model, image)
    model.load_state_dict(state)
    found = gradients(model, image, lambda x: checkpoint(model, x, use_reentrant=False))
    for name, _ in model.named_parameters():
        assert torch.equal(found[name], expected[name]), name
    # As with torch's own norms, each pass is a batch.
    assert found["backbone.bn1.num_batches_tracked"] == 2


def test_fine_tuning_with_frozen_norms_and_parameters() -> None:
    plain, image = tiny("deconv").train(), torch.randn(2, 3, 64, 64)
    plain.backbone.requires_grad_(False)
    for module in (*plain.backbone.modules(), *plain.aux_heads.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    before = model.backbone.bn1.running_mean.clone()
    found, expected = gradients(model, image), gradients(plain, image)
    assert not any(name.startswith("backbone") and name.endswith("weight") for name in found)
    assert distances(found, expected).max() < 1e-3
    assert torch.equal(model.backbone.bn1.running_mean, before)


def test_what_is_not_known_stays_plain() -> None:
    class Mine(blocks.ConvBNAct):
        pass

    model = tiny("attention")
    model.head.features.act = nn.GELU()
    model.shelf.laterals[0].__class__ = model.aux_heads[0].features.__class__ = Mine
    shelfkern.fuse_for_training(model)
    assert type(model.head.features) is blocks.ConvBNAct and type(model.shelf.laterals[0]) is Mine
    assert type(model.aux_heads[0]) is blocks.ConvHead and type(model.aux_heads[0].features) is Mine
    assert type(model.shelf.laterals[1]) is fused.FusedConvBNAct
    loss_of(model.train()(torch.randn(2, 3, 32, 64))).backward()
    with pytest.raises(TypeError, match="model is dict, it must be a torch"):
        shelfkern.fuse_for_training({})


def replaced(model: nn.Module, name: str, part) -> None:
    for module in list(model.modules()):
        if isinstance(getattr(module, name, None), nn.Module):
            setattr(module, name, part())


PARTS = {
    "relu": (nn.GELU, fused.FusedBasicBlock, fused.FusedSharedBlock),
    "dropout": (nn.Identity, fused.FusedSharedBlock, fused.FusedBasicBlock),
}


@pytest.mark.parametrize("name", list(PARTS))
def test_blocks_with_replaced_parts_stay_plain(name: str) -> None:
    part, gone, left = PARTS[name]
    plain, image = tiny("attention").train(), torch.randn(4, 3, 96, 96)
    replaced(plain, name, part)
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    kinds = {type(module) for module in model.modules()}
    assert gone not in kinds and {left, fused.FusedResNet} <= kinds
    assert distances(gradients(model, image), gradients(plain, image)).max() < 1e-3


def test_blocks_with_hooks_stay_plain() -> None:
    """Of pruning, which makes the weight anew before every pass."""
    model, image = tiny("deconv").train(), torch.randn(2, 3, 64, 64)
    block, later = model.backbone.layer1[0], model.backbone.layer2
    prune.l1_unstructured(block.conv2, "weight", 0.5)
    seen: list[nn.Module] = []
    for module in (later, later[0], later[0].conv1, model.backbone.maxpool):
        module.register_forward_hook(lambda module, *rest: seen.append(module))
    shelfkern.fuse_for_training(model)
    assert type(block) is type(later[0]) is Bottleneck and type(later[1]) is fused.FusedBottleneck
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(image)).backward()
        optimizer.step()
    assert (block.conv2.weight == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    assert len(seen) == 8


def pickled(model: ShelfNet) -> ShelfNet:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled])
def test_twins_train_alike(twin) -> None:
    model, image = tiny("attention", fused=True).train(), torch.randn(2, 3, 32, 64)
    other = twin(model)
    assert all(map(torch.equal, gradients(model, image).values(), gradients(other, image).values()))


@torch.no_grad()
def test_accelerated_it_is_the_accelerated_plain_model(narrow, model_name: str) -> None:
    plain, image = narrow(model_name), torch.randn(1, 3, 64, 96)
    model = shelfkern.fuse_for_training(copy.deepcopy(plain))
    fast, expected = shelfkern.accelerate(model), shelfkern.accelerate(plain)
    assert str(fast.plan) == str(expected.plan)
    assert torch.equal(fast(image), expected(image))


def kept_bytes(model: nn.Module, image: torch.Tensor) -> int:
    """Of what a forward pass keeps for the gradient, without parameters and the image."""
    known = {t.untyped_storage().data_ptr() for t in (image, *model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.forward_scores(image)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.skipif(native.why_not is not None, reason="needs the native kernels")
@pytest.mark.parametrize("dtype, part", [(torch.float32, 0.83), (torch.bfloat16, 0.9)], ids=str)
@pytest.mark.parametrize("kind", ["shelfnet18_lw", "shelfnet50"])
def test_less_is_kept_for_the_gradient(kind: str, dtype: torch.dtype, part: float) -> None:
    widths = (16, 32, 64) if kind == "shelfnet18_lw" else (16, 32, 64, 128)
    plain = getattr(shelfkern.nn, kind)(4, backbone_width=16, widths=widths).train()
    model, image = shelfkern.fuse_for_training(copy.deepcopy(plain)), torch.randn(2, 3, 128, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert kept_bytes(model, image) <= part * kept_bytes(plain, image)
