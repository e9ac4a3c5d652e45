"""Whole networks on the GPU's kernels: on a GPU, and emulated."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from engines import BEHAVIOUR, ENGINES, device_of, needs_emulation, needs_gpu, options
from models import CONFIGS, assert_as_exact_as_eager, build, images
from torch.nn import functional as F

import shelfkern
from shelfkern.engine import tuning
from shelfkern.engine.gpu import program as gpu_program
from shelfkern.normalisation import Normalisation

engines = pytest.mark.parametrize("engine", ENGINES)
behaviour = pytest.mark.parametrize("engine", BEHAVIOUR)
HALF = torch.float16


def on_cpu(fast, engine):
    """The module as one that takes and gives CPU tensors."""
    return lambda x: fast(x.to(device_of(engine))).cpu()


# Of "deconv" activations go beyond 65504, where float16 ends: in the next test it runs in other dtypes.
@engines
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "deconv"])
@torch.no_grad()
def test_scores_equal_the_model(name, engine):
    model = build(CONFIGS[name])
    fast = shelfkern.accelerate(model, HALF, **options(engine))
    batch = 2 if name == "attention" else 1  # networks take half a minute an image where they are emulated
    assert_as_exact_as_eager(on_cpu(fast, engine), model, [images(batch, 33, 40)], HALF)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_scores_in_other_dtypes(name, dtype, engine):
    model = build(CONFIGS[name])
    fast = shelfkern.accelerate(model, dtype, **options(engine))
    assert_as_exact_as_eager(on_cpu(fast, engine), model, [images(1, 64, 64)], dtype)


@behaviour
@torch.no_grad()
def test_coarse_scores_resized_are_the_scores(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    x = images(1, 33, 40).to(device_of(engine))
    coarse = fast.coarse_scores(x)
    kept = coarse.clone()
    resized = F.interpolate(coarse.float(), (64, 64), mode="bilinear", align_corners=True)[:, :, :33, :40]
    # Resized in float32, then rounded to float16.
    torch.testing.assert_close(fast(x).float(), resized, rtol=2**-10, atol=1e-4)
    fast(images(1, 33, 40, seed=1).to(device_of(engine)))
    assert torch.equal(coarse, kept), "in memory of the module"


@engines
@torch.no_grad()
def test_sizes_from_the_smallest_and_layouts(engine):
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, HALF, **options(engine))
    x = images(1, 32, 32)
    expected = on_cpu(fast, engine)(x)
    assert_as_exact_as_eager(lambda x: expected, model, [x], HALF)
    for layout in (x.contiguous(memory_format=torch.channels_last), x.double(), x.flip(3).flip(3)):
        assert torch.equal(on_cpu(fast, engine)(layout), expected)


@engines
@pytest.mark.parametrize("name", ["attention"])
@torch.no_grad()
def test_labels_are_the_argmax_of_the_scores(name, engine):
    fast = shelfkern.accelerate(build(CONFIGS[name]), HALF, **options(engine))
    x = images(2, 45, 50).to(device_of(engine))
    scores, labels = fast(x).float(), fast.predict(x)
    assert labels.dtype is torch.uint8 and labels.shape == (2, 45, 50)
    # Full-size scores are rounded to float16, labels are found before that.
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() <= 2e-3 * scores.abs().max()
    assert (labels == scores.argmax(1)).float().mean() >= 0.99


@engines
@torch.no_grad()
def test_raw_images_are_normalised_as_the_model_says(engine):
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, torch.float32, **options(engine))
    raw = torch.randint(0, 256, (1, 40, 50, 3), dtype=torch.uint8)

    def check(mean, std):
        x = ((raw / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
        labels = fast.predict(raw.to(device_of(engine))).cpu()
        assert (labels == model(x).argmax(1)).float().mean() >= 0.999

    check((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model.normalisation = Normalisation((0.5, 0.1, 0.9), (0.2, 1.0, 0.5))
    check((0.5, 0.1, 0.9), (0.2, 1.0, 0.5))


@behaviour
@torch.no_grad()
def test_calls_repeat_to_the_bit_with_and_without_graphs(engine):
    model = build(CONFIGS["attention"])
    x = images(1, 64, 64).to(device_of(engine))
    recorded = shelfkern.accelerate(model, HALF, **options(engine))
    direct = shelfkern.accelerate(model, HALF, graphs=False, **options(engine))
    first = recorded(x)
    kept = first.clone()
    assert torch.equal(direct(x), first) and torch.equal(recorded(x), first)
    # A result is the caller's: the next call does not write to it.
    recorded(x + 1)
    assert torch.equal(first, kept)


@behaviour
@torch.no_grad()
def test_autocast_of_the_caller_does_not_matter(engine):
    model, device = build(CONFIGS["attention"]), device_of(engine)
    x = images(1, 64, 64).to(device)
    fast = shelfkern.accelerate(model, HALF, **options(engine))
    scores, labels = fast(x), fast.predict(x)
    with torch.autocast(device.type, torch.bfloat16):
        # What is made and recorded there, too.
        for module in (fast, shelfkern.accelerate(model, HALF, **options(engine))):
            assert torch.equal(module(x), scores) and torch.equal(module.predict(x), labels)


@behaviour
@torch.no_grad()
def test_changed_weights_are_taken_up(engine):
    model = build(CONFIGS["attention"])
    if engine == "cuda":
        model.cuda()
    fast = shelfkern.accelerate(model, HALF, **options(engine))
    x = images(1, 32, 32).to(device_of(engine))
    bound = fast.bind(x.to(HALF))
    before, bound_before = fast(x), bound().clone()
    out = bound.out
    with torch.no_grad():
        model.head.classify.weight.mul_(2)
    assert_close(fast(x), 2 * before)
    assert_close(bound(), 2 * bound_before)
    assert bound.out is out


def assert_close(result, expected):
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@behaviour
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_compute_the_same(copier, engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, graphs=False, **options(engine))
    again = copier(fast)
    assert (again.dtype, again.device, again.graphs) == (HALF, fast.device, False)
    x = images(1, 32, 32).to(device_of(engine))
    assert torch.equal(again(x), fast(x))


@behaviour
@torch.no_grad()
def test_threads_with_sizes_of_their_own(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    inputs = [images(1, 32 + 16 * (index % 3), 32, seed=index).to(device_of(engine)) for index in range(6)]
    expected = [fast(x) for x in inputs]
    results = [None] * len(inputs)

    def run(index):
        stream = torch.cuda.Stream() if engine == "cuda" else None
        with torch.no_grad(), torch.cuda.stream(stream):
            results[index] = fast(inputs[index])
        if stream is not None:
            stream.synchronize()

    for _ in range(2):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(torch.equal, results, expected))


@behaviour
@torch.no_grad()
def test_bound_calls_read_in_place_and_write_to_one_tensor(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    x = images(1, 40, 64).to(device_of(engine), HALF)
    scores, labels = fast.bind(x), fast.bind(x, "labels")
    assert torch.equal(scores(), fast(x)) and torch.equal(labels(), fast.predict(x))
    x.copy_(images(1, 40, 64, seed=1))
    out = scores()
    assert torch.equal(out, fast(x)) and out.data_ptr() == scores.out.data_ptr()
    raw = torch.randint(0, 256, (1, 40, 64, 3), dtype=torch.uint8, device=device_of(engine))
    assert torch.equal(fast.bind(raw, "labels")(), fast.predict(raw))


@needs_emulation
def test_what_cannot_be_bound_is_refused():
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, HALF, **options("emulated"))
    with pytest.raises(ValueError, match="output is 'logits', it may be one of scores, labels"):
        fast.bind(images(1, 32, 32), "logits")
    with pytest.raises(TypeError, match=r"images is torch.float32, to be bound it must be torch.uint8 or"):
        fast.bind(images(1, 32, 32))
    with pytest.raises(TypeError, match=r"images is torch\.uint8, for scores it must be floating"):
        fast.bind(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x is 31 x 32 pixels"):
        fast.bind(images(1, 31, 32).half())
    with pytest.raises(RuntimeError, match="bind needs a GPU, for CUDA graphs"):
        shelfkern.accelerate(model).bind(images(1, 32, 32))


@behaviour
@torch.no_grad()
def test_warmup_leaves_nothing_to_the_first_call(engine, monkeypatch):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    fast.warmup([(64, 40)], batch=2)
    runtime = type(fast._program().runtime)
    monkeypatch.setattr(runtime, "capture", _refuse)
    monkeypatch.setattr(tuning.Tuner, "choose", _refuse)
    monkeypatch.setattr(gpu_program, "algorithms", _refuse)
    fast(images(2, 64, 40).to(device_of(engine)))
    fast.predict(torch.zeros(2, 64, 40, 3, dtype=torch.uint8, device=device_of(engine)))
    with pytest.raises(AssertionError, match="asked for late"):
        fast(images(1, 64, 40).to(device_of(engine)))


def _refuse(*args, **kwargs):
    raise AssertionError("asked for late")


@behaviour
@torch.no_grad()
def test_few_passes_are_kept(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, graphs=False, **options(engine))
    kept = gpu_program.KEPT_PASSES
    for index in range(kept + 2):
        fast(images(1, 32, 32 + index).to(device_of(engine)))
    passes = fast._program()._passes
    assert len(passes._idle) == kept
    assert passes.bytes() == sum(forward.arena.numel() for _, forward in passes._idle)


@behaviour
@torch.no_grad()
def test_bound_steps_run_one_by_one(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    x = images(1, 64, 64).to(device_of(engine), HALF)
    steps = fast.bound_steps(x)
    assert [bound.step.name for bound in steps] == [step.name for step in fast.plan.steps]
    assert [bound.algorithm.name for bound in steps] == fast.plan.algorithms(1, 64, 64)
    for bound in steps:
        bound.run()
    assert all(bound.shape == bound.step.output.shape(1, 64, 64) for bound in steps)


@needs_emulation
def test_the_plan_says_what_runs_each_step():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options("emulated"))
    lines = str(fast.plan).splitlines()
    assert "algorithm" in lines[0]
    assert "  cuda  " in lines[1] and "triton" in lines[2]
    assert len(lines) == len(fast.plan.steps) + 2


@needs_emulation
@torch.no_grad()
def test_the_library_alone():
    """Every step as torch's own calls, which is what runs where a kernel of ours cannot."""
    model = build(CONFIGS["five_levels"])
    ours = shelfkern.accelerate(model, HALF, **options("emulated"))._program()
    theirs = gpu_program.Options(ours.options.device, HALF, ours=False)
    plan, tuner = ours.plan, ours.tuner
    program = gpu_program.GpuProgram(plan, theirs, model.normalisation, model.align_corners, tuner)
    assert set(program.plan.algorithms(1, 64, 64)) == {"torch"}
    assert_as_exact_as_eager(program.scores, model, [images(1, 64, 64), images(2, 33, 70)], HALF)


@needs_emulation
def test_arguments_that_do_not_fit():
    model = build(CONFIGS["attention"])
    with pytest.raises(ValueError, match=r"dtype is torch.float16, on a CPU it may be torch.float32, "):
        shelfkern.accelerate(model, HALF)
    with pytest.raises(ValueError, match=r"dtype is torch.float64, with GPU kernels it may be"):
        shelfkern.accelerate(model, torch.float64, backend="emulated")
    with pytest.raises(ValueError, match="tune is -1, it may be True, False or seconds"):
        shelfkern.accelerate(model, tune=-1)
    with pytest.raises(ValueError, match="tune is 'yes', it may be True, False or seconds"):
        shelfkern.accelerate(model, tune="yes")
    fast = shelfkern.accelerate(model, HALF, backend="emulated")
    with pytest.raises(TypeError, match="images is list, it must be a tensor"):
        fast([images(1, 32, 32)])
    with pytest.raises(ValueError, match=r"sizes has 512, it must be a sequence of \(height, width\) pairs"):
        fast.warmup((512, 512))
    with pytest.raises(ValueError, match="batch is 0, it must be at least 1"):
        fast.warmup([(64, 64)], batch=0)
    with pytest.raises(ValueError, match="output is 'classes', it may be one of scores, labels"):
        fast.warmup([(64, 64)], outputs=["classes"])
    with pytest.raises(ValueError, match="images is on meta, it must be on cpu"):
        fast(images(1, 32, 32).to("meta"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device is 'cuda', and there is no GPU that torch can use"):
            shelfkern.accelerate(model, HALF, device="cuda")


@behaviour
@torch.no_grad()
def test_frames_come_back_in_order(engine):
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), HALF, **options(engine))
    generator = np.random.default_rng(0)
    sizes = [(32, 40)] * 5 + [(40, 32)] * 2 + [(32, 40)]
    frames = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    frames[1] = frames[1][::-1]
    expected = [
        fast.predict(torch.from_numpy(frame.copy())[None].to(device_of(engine)))[0].cpu() for frame in frames
    ]
    for batch in (1, 2, 3):
        found = list(fast.predict_frames(frames, batch))
        assert len(found) == len(frames) and all(map(torch.equal, found, expected))


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_backends_of_a_gpu():
    model = build(CONFIGS["attention"])
    for backend in ("native", "library", "auto"):
        fast = shelfkern.accelerate(model, HALF, device="cuda", backend=backend)
        assert_as_exact_as_eager(on_cpu(fast, "cuda"), model, [images(2, 64, 70)], HALF)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_tuned_results_are_right_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SHELFKERN_CACHE", str(tmp_path))
    model = build(CONFIGS["five_levels"])
    fast = shelfkern.accelerate(model, HALF, device="cuda", tune=20)
    assert_as_exact_as_eager(on_cpu(fast, "cuda"), model, [images(1, 64, 64)], HALF)
    assert len(list(tmp_path.glob("tuning-*.json"))) == 1
    again = shelfkern.accelerate(model, HALF, device="cuda")
    assert again.plan.algorithms(1, 64, 64) == fast.plan.algorithms(1, 64, 64)


@behaviour
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@torch.no_grad()
def test_eight_bits(kind, engine):
    """Scores near float16's, and new ranges when the weights change."""
    if engine == "cuda" and kind is torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    model = build(CONFIGS["attention"])
    calibration = [images(2, 64, 64, seed=index) for index in range(2)]
    fast = shelfkern.accelerate(model, kind, calibration=calibration, **options(engine))
    x = images(1, 64, 64, seed=5)
    result = on_cpu(fast, engine)(x)
    assert result.dtype is torch.float16 and fast.scores_dtype is torch.float16
    assert far(result, model(x)) < 0.3
    assert not torch.equal(result, on_cpu(shelfkern.accelerate(model, HALF, **options(engine)), engine)(x))
    assert "of int8" in str(fast.plan) or "of fp8" in str(fast.plan)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(on_cpu(again, engine)(x), result)
    model.shelf.laterals[0].conv.weight.mul_(3)
    model.shelf.columns[2].merges[1].fuse.conv.weight.mul_(8)
    # With the ranges of before it would be off by 0.94.
    assert far(on_cpu(fast, engine)(x), model(x)) < 0.4


def far(result, truth):
    """Root mean square of the error over the scores' deviation."""
    return (result - truth).square().mean().sqrt() / truth.std()


@torch.no_grad()
def test_eight_bits_can_be_judged_on_a_cpu():
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, torch.int8, backend="library", calibration=images(2, 64, 64))
    x = images(1, 64, 64, seed=5)
    assert far(fast(x), model(x)) < 0.1
    fast = shelfkern.accelerate(model, torch.float8_e4m3fn, backend="library", calibration=images(2, 64, 64))
    assert far(fast(x), model(x)) < 0.2
    with pytest.raises(ValueError, match=r"dtype is torch\.float8_e4m3fn, on a CPU it may be"):
        shelfkern.accelerate(model, torch.float8_e4m3fn, calibration=images(1, 64, 64))
    with pytest.raises(ValueError, match=r"calibration is None, dtype torch.int8 needs images"):
        shelfkern.accelerate(model, torch.int8, backend="library")
    with pytest.raises(ValueError, match=r"calibration is given and dtype torch.float32"):
        shelfkern.accelerate(model, calibration=images(1, 64, 64))
