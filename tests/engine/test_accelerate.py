import copy
import dataclasses
import mmap
import pickle
import re
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from models import CONFIGS, assert_as_exact_as_eager, build, images
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import shelfkern
from shelfkern import native
from shelfkern.engine.cpu import library
from shelfkern.engine.workspace import WorkspacePool
from shelfkern.nn import ShelfNetConfig
from shelfkern.normalisation import Normalisation

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
BACKENDS = [pytest.param("native", marks=needs_native), "library"]
SIZES = [(1, 64, 64), (3, 33, 70), (1, 95, 32), (2, 128, 65)]
TINY = ShelfNetConfig(
    backbone="resnet18", backbone_width=4, widths=(4, 8), merge="attention", head="conv", head_width=4
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_scores_equal_the_model(name, dtype, backend):
    if name == "five_levels" and backend == "native":
        backend = "auto"
    model = build(CONFIGS[name])
    fast = shelfkern.accelerate(model, dtype=dtype, backend=backend)
    # Two of each size: one picture of a few pixels at the deepest level may outweigh all others.
    inputs = [images(*size, seed) for size in SIZES for seed in (0, 1)]
    assert_as_exact_as_eager(fast, model, inputs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 64, 64), (2, 45, 83)])
@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_labels_are_the_argmax_of_the_scores(name, size, backend):
    fast = shelfkern.accelerate(build(CONFIGS[name]), backend=backend)
    x = images(*size)
    scores, labels = fast(x), fast.predict(x)
    assert labels.dtype is torch.uint8 and labels.shape == (size[0], *size[1:])
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    # Ties within rounding may go either way.
    assert (scores.amax(1) - chosen).max() <= 1e-5 * scores.std()
    assert (labels == scores.argmax(1)).float().mean() >= 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_coarse_scores_resized_are_the_scores(name, dtype, backend):
    model = build(CONFIGS[name])
    fast = shelfkern.accelerate(model, dtype, backend=backend)
    assert fast.source is model
    x = images(2, 45, 83)
    coarse = fast.coarse_scores(x)
    assert coarse.dtype is dtype and coarse.shape == model.coarse_scores(x).shape
    kept = coarse.clone()

    def resized(scores):
        return F.interpolate(scores.float(), (64, 96), mode="bilinear", align_corners=True)[:, :, :45, :83]

    # Resized in float32, then rounded to the dtype.
    torch.testing.assert_close(
        fast(x).float(),
        resized(coarse),
        rtol=2**-7 if dtype is torch.bfloat16 else 1e-5,
        atol=1e-5 * coarse.float().std().item(),
    )
    fast(images(2, 45, 83, seed=1))
    assert torch.equal(coarse, kept), "in memory of the module"
    assert torch.equal(resized(model.coarse_scores(x)), model(x))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_raw_images_are_normalised_as_the_model_says(backend):
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, backend=backend)
    raw = torch.randint(0, 256, (2, 50, 75, 3), dtype=torch.uint8)

    def check(mean, std):
        x = ((raw / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
        assert (fast.predict(raw) == model(x).argmax(1)).float().mean() >= 0.999

    check((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model.normalisation = Normalisation((0.5, 0.1, 0.9), (0.2, 1.0, 0.5))
    check((0.5, 0.1, 0.9), (0.2, 1.0, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_predict_takes_arrays_and_single_images(backend):
    fast = shelfkern.accelerate(build(TINY), backend=backend)
    raw = torch.randint(0, 256, (2, 40, 51, 3), dtype=torch.uint8)
    labels = fast.predict(raw)
    array = raw.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (array, read_only, array[:, ::-1].copy()[:, ::-1]):
            assert torch.equal(fast.predict(given), labels)
            assert torch.equal(fast.predict(given[1]), labels[1])
    assert torch.equal(fast.predict(raw[1]), labels[1])
    x = images(1, 40, 51)
    assert torch.equal(fast.predict(x.numpy()), fast.predict(x))


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any torch call made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_predict_makes_no_full_size_scores(backend, monkeypatch):
    config = CONFIGS["deconv"]
    fast = shelfkern.accelerate(build(config), backend=backend)
    asked = []
    empty = native.empty

    def noted(shape, dtype, pooled=True):
        asked.append(torch.Size(shape))
        return empty(shape, dtype, pooled)

    monkeypatch.setattr(native, "empty", noted)
    x = images(1, 256, 256)
    fast.predict(x)
    labels = [shape for shape in asked if shape[-2:] == (256, 256)]
    assert [shape.numel() for shape in labels] == [256 * 256]
    with _LargestTensor() as mode:
        fast.predict(x)
    assert mode.largest < config.num_classes * 256 * 256


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "double", "bfloat16"])
@torch.no_grad()
def test_any_strides_and_floating_dtypes(layout):
    model = build(CONFIGS["attention"])
    base = images(2, 80, 96)
    x = {
        "channels_last": lambda: base.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: base[:, :, 3:70, 5::2][:, :, :, :40],
        "expanded": lambda: base[:1].expand(3, -1, -1, -1),
        "double": lambda: base.double(),
        "bfloat16": lambda: base.bfloat16(),
    }[layout]()
    assert_as_exact_as_eager(shelfkern.accelerate(model), model, [x], torch.float32)


@torch.no_grad()
def test_empty_batch():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    assert fast(images(0, 64, 64)).shape == (0, 7, 64, 64)
    assert fast.predict(images(0, 64, 64)).shape == (0, 64, 64)


@torch.no_grad()
def test_sizes_may_change_from_call_to_call_in_bounded_memory():
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model)
    x = images(1, 64, 64)
    first = fast(x)
    for extent in range(32, 32 * 12, 32):
        fast(images(1, 32, extent))
    assert torch.equal(fast(x), first)
    pool = fast._program().pool
    assert len(pool._idle) <= 4


@torch.no_grad()
def test_results_outlive_later_calls():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    x = images(1, 64, 64)
    first, labels = fast(x), fast.predict(x)
    kept, kept_labels = first.clone(), labels.clone()
    fast(-x), fast.predict(-x)
    assert torch.equal(first, kept) and torch.equal(labels, kept_labels)


@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_every_number_of_threads_gives_the_same_bits(name):
    fast, x = shelfkern.accelerate(build(CONFIGS[name])), images(2, 75, 128)
    scores, labels = fast(x).clone(), fast.predict(x).clone()
    for count in (2, 3, 8):
        torch.set_num_threads(count)  # the fixture of all tests sets it back
        assert torch.equal(fast(x), scores) and torch.equal(fast.predict(x), labels)


@torch.no_grad()
def test_calls_from_many_threads():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    inputs = [images(1, 64, 32 * (1 + i % 3), seed=i) for i in range(12)]
    expected = [fast(x).clone() for x in inputs]
    wrong = []

    def work(offset):
        for i in range(len(inputs)):
            j = (i + offset) % len(inputs)
            if not torch.equal(fast(inputs[j]), expected[j]):
                wrong.append(j)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def _optimizer_step(model):
    loss = model.train()(images(2, 64, 64)).scores.square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval()


def _load_state_dict(model):
    state = model.state_dict()
    model.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()})


def _write_through_data(model):
    model.head.classify.weight.data.mul_(2)


def _write_through_numpy(model):
    model.shelf.columns[0].bottom.bn2.running_mean.numpy()[:] += 1


def _replace_parameter(model):
    model.head.classify.weight = torch.nn.Parameter(model.head.classify.weight * 3)


def _replace_module(model):
    model.head = build(CONFIGS["attention"], seed=5).head


def _change_dtype(model):
    model.double()


def _change_eps(model):
    model.shelf.columns[0].bottom.bn2.eps = 0.5


def _change_slope(model):
    model.head.features.act.negative_slope = 0.7


@pytest.mark.parametrize(
    "change",
    [
        _optimizer_step,
        _load_state_dict,
        _write_through_data,
        _write_through_numpy,
        _replace_parameter,
        _replace_module,
        _change_dtype,
        _change_eps,
        _change_slope,
    ],
)
def test_a_changed_model_is_never_stale(change):
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model)
    x = images(1, 64, 64)
    before = fast(x)
    change(model)
    after = fast(x)
    with torch.no_grad():
        eager = model(x.to(next(model.parameters()).dtype)).float()
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4 * eager.std().item())
    assert change is _change_dtype or not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize(
    "name, module, attribute, value, message",
    [
        ("attention", "backbone.layer1.0.conv1", "dilation", (2, 2), "it must be (1, 1)"),
        ("attention", "head.classify", "padding", (0, 0), "it must be (1, 1)"),
        ("attention", "head.classify", "padding_mode", "circular", "it must be 'zeros'"),
        ("attention", "backbone.conv1", "groups", 3, "it must be 1"),
        ("attention", "backbone.layer2.0.conv1", "stride", (1, 1), "do not fit each other"),
        ("attention", "shelf.columns.0.bottom.conv", "stride", (2, 2), "it must be (1, 1)"),
        ("attention", "shelf.columns.0.merges.0.refine.gate_conv", "groups", 2, "it must be 1"),
        ("attention", "backbone.maxpool", "ceil_mode", True, "it must be False"),
        ("deconv", "shelf.columns.0.merges.0.deconv", "output_padding", (0, 0), "it must be (1, 1)"),
    ],
)
@torch.no_grad()
def test_geometry_that_changes_is_seen(name, module, attribute, value, message):
    model, x = build(CONFIGS[name]), images(1, 64, 64)
    fast = shelfkern.accelerate(model)
    before, changed = fast(x), model.get_submodule(module)
    original = getattr(changed, attribute)
    setattr(changed, attribute, value)
    for call in (lambda: fast(x), lambda: fast.predict(x), lambda: shelfkern.accelerate(model)):
        with pytest.raises(TypeError, match=f"model has .*{re.escape(message)}"):
            call()
    setattr(changed, attribute, original)
    assert torch.equal(fast(x), before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_later_are_refused(register):
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model)
    before = fast(x)
    handle = getattr(model.head.classify, register)(lambda *arguments: None)
    with pytest.raises(TypeError, match=r"model has forward hooks at 'head\.classify'"):
        fast(x)
    handle.remove()
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_memory_that_went_is_not_read():
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    weight = model.head.classify.weight
    mapped = torch.frombuffer(mmap.mmap(-1, weight.nbytes), dtype=torch.float32)
    weight.data = mapped.view(weight.shape).copy_(weight)
    del mapped
    fast = shelfkern.accelerate(model)
    before = fast(x)
    # Moves all values, and what they were mapped in is unmapped.
    model.share_memory()
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_storages_may_be_freed_and_filled_again():
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model)
    before, values = fast(x), [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"model has a tensor of \(16, 3, 7, 7\) whose storage was freed"):
        fast(x)
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.untyped_storage().resize_(value.nbytes)
        parameter.copy_(value)
    assert torch.equal(fast(x), before)


def test_an_unchanged_model_is_not_folded_again():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    program = fast._program()
    fast(images(1, 64, 64))
    assert fast._program() is program
    fast.refresh()
    assert fast._program() is not program


def test_the_source_is_left_untouched():
    model = build(CONFIGS["attention"]).train()
    before = copy.deepcopy(model.state_dict())
    fast = shelfkern.accelerate(model)
    fast(images(1, 64, 64))
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not fast.state_dict() and not list(fast.parameters())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies(copier):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]))
    x = images(1, 64, 64)
    assert torch.equal(copier(fast)(x), fast(x))


@pytest.mark.parametrize(
    "convert, what",
    [
        (lambda m: m.half(), "cpu and torch.float16"),
        (lambda m: m.double(), "cpu and torch.float64"),
        (lambda m: m.to(torch.bfloat16), "cpu and torch.bfloat16"),
        (lambda m: m.type(torch.float64), "cpu and torch.float64"),
        (lambda m: m.to("meta"), "meta and torch.float32"),
        (lambda m: m.to_empty(device="meta"), "meta and torch.float32"),
        (lambda m: torch.nn.Sequential(m).half(), "cpu and torch.float16"),
    ],
)
def test_it_is_not_converted_to_another_device_or_dtype(convert, what):
    fast = shelfkern.accelerate(build(TINY))
    said = f"^an accelerated network stays on cpu in torch.float32, it cannot be converted to {what}: call"
    with pytest.raises(RuntimeError, match=said):
        convert(fast)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's own refusal, without a GPU")
def test_cuda_without_a_gpu_is_not_silent():
    with pytest.raises((RuntimeError, AssertionError)):
        shelfkern.accelerate(build(TINY)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_conversions_to_what_it_is_are_taken(dtype):
    fast = shelfkern.accelerate(build(TINY), dtype)
    x = images(1, 32, 32)
    before = fast(x)
    for same in (
        fast.to(fast.device),
        fast.to(dtype),
        fast.to(x.to(dtype)),
        fast.cpu(),
        fast.to(memory_format=torch.channels_last),
        fast.float() if dtype is torch.float32 else fast.bfloat16(),
        fast.share_memory(),
        fast.eval(),
        fast.requires_grad_(False),
        torch.nn.Sequential(fast).to("cpu")[0],
    ):
        assert same is fast and torch.equal(same(x), before)


@torch.no_grad()
def test_without_onednn_calls(monkeypatch):
    monkeypatch.setattr(library, "onednn_reason", lambda: "switched off")
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, backend="library")
    assert_as_exact_as_eager(fast, model, [images(*size) for size in SIZES], torch.float32)


def test_native_by_name_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda op: "switched off by this test")
    model = build(CONFIGS["attention"])
    with pytest.raises(
        RuntimeError, match="backend is 'native', which cannot run stem: switched off by this test"
    ):
        shelfkern.accelerate(model, backend="native")
    assert shelfkern.accelerate(model).predict(images(1, 64, 64)).shape == (1, 64, 64)


def _eval_model():
    return build(CONFIGS["attention"])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: shelfkern.accelerate(torch.nn.ReLU()), TypeError, "model is a ReLU, it must be a"),
        (lambda: shelfkern.accelerate(_eval_model(), torch.float16), ValueError, "dtype is torch.float16"),
        (
            lambda: shelfkern.accelerate(_eval_model(), "float16"),
            TypeError,
            r"dtype is 'float16', it must be a torch\.dtype such as torch\.float16",
        ),
        (lambda: shelfkern.accelerate(_eval_model(), device="xpu"), ValueError, "device is 'xpu', it may"),
        (
            lambda: shelfkern.accelerate(_eval_model(), device="no such"),
            ValueError,
            "device is 'no such', it may",
        ),
        (lambda: shelfkern.accelerate(_eval_model(), backend="fast"), ValueError, "backend is 'fast'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (torch.zeros(1, 3, 31, 64), ValueError, "x is 31 x 64 pixels, height and width must be at least 32"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"x is \(1, 4, 64, 64\), it must be \(N, 3, H, W\)"),
        (torch.zeros(3, 64, 64), ValueError, r"x is \(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), TypeError, "images is torch.int32"),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), TypeError, r"x is torch\.uint8, it must be"),
        (
            torch.zeros(1, 3, 64, 64).to_sparse(),
            TypeError,
            r"images has the layout torch\.sparse_coo, it must be dense",
        ),
    ],
)
def test_bad_inputs(bad, error, message):
    fast = shelfkern.accelerate(_eval_model())
    with pytest.raises(error, match=message):
        fast(bad)


def test_predict_refuses_other_raw_layouts():
    fast = shelfkern.accelerate(_eval_model())
    with pytest.raises(
        ValueError, match=r"images is uint8 \(1, 3, 64, 64\), raw images must be \(N, H, W, 3\)"
    ):
        fast.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"^images is list, it must be a tensor or a numpy array$"):
        fast.predict([images(1, 64, 64)])
    with pytest.raises(ValueError, match="x is 31 x 64 pixels"):
        fast.predict(torch.zeros(31, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize("backend", [*BACKENDS, "emulated"])
def test_labels_of_more_classes_than_uint8_holds_are_refused(backend):
    fast = shelfkern.accelerate(build(dataclasses.replace(TINY, num_classes=257)), backend=backend)
    x, raw = images(1, 32, 32), torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    asks = [
        lambda: fast.predict(x),
        lambda: fast.predict(raw),
        lambda: fast.predict_frames([]),
        lambda: fast.warmup([], outputs=["labels"]),
    ]
    if backend == "emulated":
        asks.append(lambda: fast.bind(raw, "labels"))
    for ask in asks:
        with pytest.raises(ValueError, match=r"^num_classes is 257, labels are uint8 and take at most 256: "):
            ask()


@torch.no_grad()
def test_more_classes_than_labels_hold_have_scores():
    model = build(dataclasses.replace(TINY, num_classes=300))
    fast = shelfkern.accelerate(model)
    assert_as_exact_as_eager(fast, model, [images(2, 40, 64)], torch.float32)
    assert fast.coarse_scores(images(1, 32, 32)).shape[1] == 300
    fast.warmup([(32, 32)])


@pytest.mark.parametrize("outputs", ["labels", ("labels", "scores")])
def test_warmup_takes_one_output_or_several(outputs):
    fast = shelfkern.accelerate(build(TINY))
    fast.warmup([(32, 64), (40, 32)], batch=2, outputs=outputs)
    with pytest.raises(ValueError, match=r"^output is 'label', it may be one of scores, labels$"):
        fast.warmup([(32, 32)], outputs="label")


@torch.no_grad()
def test_256_classes_have_labels():
    model = build(dataclasses.replace(TINY, num_classes=256))
    x = images(2, 40, 64)
    assert (shelfkern.accelerate(model).predict(x) == model(x).argmax(1)).float().mean() >= 0.999


def test_labels_are_refused_once_the_model_has_too_many_classes():
    model = build(dataclasses.replace(TINY, num_classes=5))
    fast = shelfkern.accelerate(model)
    assert fast.predict(images(1, 32, 32)).max() < 5
    larger = build(dataclasses.replace(TINY, num_classes=300))
    model.head, model.config = larger.head, larger.config
    with pytest.raises(ValueError, match="num_classes is 300"):
        fast.predict(images(1, 32, 32))


def test_train_mode_raises():
    fast = shelfkern.accelerate(_eval_model())
    assert not fast.training
    with pytest.raises(RuntimeError, match="the accelerated module is in train mode"):
        fast.train()(images(1, 64, 64))


def test_workspace_pool_forgets_the_least_recently_used():
    built = []

    def make(size):
        built.append(size)
        return SimpleNamespace(arena=torch.empty(8, dtype=torch.uint8))

    pool = WorkspacePool(make, keep=2)
    for size in [(1, 1, 1), (2, 2, 2), (1, 1, 1), (3, 3, 3), (1, 1, 1), (2, 2, 2)]:
        with pool.borrow(size):
            pass
    assert built == [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 2, 2)]
    with pool.borrow((2, 2, 2)) as first, pool.borrow((2, 2, 2)) as second:
        assert first is not second
    assert pool.bytes() <= 2 * 8


@needs_native
def test_the_plan_says_where_convolutions_take_fewer_products():
    model = build(CONFIGS["no_lateral"])
    plan = shelfkern.accelerate(model, backend="native").plan
    names = dict(zip((step.name for step in plan.steps), plan.algorithms(1, 256, 256), strict=True))
    # 16 channels.
    assert names["backbone.conv1"] == "native direct"
    # 32 channels on 32 x 32 pixels; stride 2; 16 channels.
    assert names["backbone.layer2.0.conv2"] == "native winograd 4x4"
    assert names["backbone.layer2.0.conv1"] == names["backbone.layer1.0.conv1"] == "native direct"
    small = dict(zip((step.name for step in plan.steps), plan.algorithms(1, 32, 32), strict=True))
    assert small["backbone.layer4.0.conv2"] == "native direct"
    others = shelfkern.accelerate(model, backend="library").plan.algorithms(1, 64, 64)
    assert set(others) <= {"onednn", "torch"}
