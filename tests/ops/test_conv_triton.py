"""What the Triton convolutions share: configurations and their order, packing, tiles, rounding, reasons."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from parity import INTERPRETED, moved, needs_triton, needs_triton_on_a_gpu, poisoned, random

from shelfkern import ops
from shelfkern.ops import _conv_triton as conv
from shelfkern.ops import _triton
from shelfkern.ops._triton import jit, rounded, tl

H200 = 132
# Shared memory of a program on sm_80, less what Triton keeps for itself.
SM_80_BYTES = 163 * 1024
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = list(conv.CODE_CAPABILITIES)
EVERY = conv.CONFIGS + conv.SMALL_CONFIGS
TRITON_OPS = [op for op, kernels in ops.KERNELS.items() if "triton" in kernels]


def problem(pixels=128 * 128, channels=64, taps=9, depth=64, dtype=torch.float16):
    return conv.Problem(pixels, channels, taps, depth, dtype)


@pytest.mark.parametrize("config", EVERY)
def test_configurations_are_products_that_a_gpu_can_make(config):
    for extent in (config.block_m, config.block_n, config.block_bytes, config.warps):
        assert extent > 0 and extent & (extent - 1) == 0
    assert (config.block_m + config.block_n) * config.block_bytes * config.stages < SM_80_BYTES
    # A Hopper product is of 64 rows for every 4 warps.
    assert (config.block_n if config.swap else config.block_m) >= 64
    assert config.split >= 1


def test_every_configuration_is_there_once():
    assert len(set(conv.CONFIGS)) == len(conv.CONFIGS)
    assert len(set(conv.SMALL_CONFIGS)) == len(conv.SMALL_CONFIGS)


@pytest.mark.parametrize("config", EVERY)
@pytest.mark.parametrize("dtype", DTYPES + CODES)
def test_steps_are_powers_of_two_that_cover_few_channels_too_many(dtype, config):
    # An instruction multiplies 32 codes, and of wider numbers 16 at most.
    least = 32 if dtype in CODES else 16
    for depth in (1, 3, 15, 16, 17, 33, 64, 100, 2048):
        step = conv.block_k(config, problem(depth=depth, dtype=dtype))
        assert least <= step <= max(least, config.block_bytes // dtype.itemsize)
        assert step & (step - 1) == 0 and (step < 2 * depth or step == least)


@pytest.mark.parametrize("config", EVERY)
@pytest.mark.parametrize("dtype", CODES)
def test_a_step_holds_twice_the_codes_in_half_the_time(dtype, config):
    codes, wide = problem(10**6, 512, 9, 512, dtype), problem(10**6, 512, 9, 512)
    assert conv.block_k(config, codes) == 2 * conv.block_k(config, wide)
    ratio = conv.microseconds(codes, config, H200) / conv.microseconds(wide, config, H200)
    # Parts are of 32 bits either way.
    assert 0.4 < ratio < (0.6 if config.split == 1 else 0.9)


@pytest.mark.parametrize("dtype", DTYPES + CODES)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("taps, depth", [(1, 1), (1, 64), (1, 300), (9, 3), (49, 3), (9, 512)])
@pytest.mark.parametrize("channels", [1, 19, 64, 65, 512])
def test_there_is_a_configuration_for_everything(channels, taps, depth, precision, dtype):
    for pixels in (1, 100, 10**6):
        asked = problem(pixels, channels, taps, depth, dtype)
        found = conv.configurations(asked, precision, H200)
        exact = precision == "ieee" and dtype is torch.float32
        assert found and set(found) <= set(conv.SMALL_CONFIGS if exact else conv.CONFIGS)
        for config in found:
            # No part without a step, and no tile of which more than half is beyond the channels.
            assert config.split <= taps * -(-depth // conv.block_k(config, asked))
            assert config.block_n <= 64 or config.block_n < 2 * channels
        times = [conv.microseconds(asked, config, H200) for config in found]
        assert times == sorted(times) and all(0 < time < float("inf") for time in times)


def test_the_first_configuration_suits_the_problem():
    def first(*sizes):
        return conv.configurations(problem(*sizes), "tf32", H200)[0]

    many_pixels, deep, tiny = first(8 * 128 * 256, 64), first(8 * 64 * 64, 512, 9, 512), first(16, 64, 9, 512)
    assert many_pixels.split == deep.split == 1
    assert deep.block_m * deep.block_n > 64 * 64
    # 16 pixels of one tile: nothing else gives more than one multiprocessor something to do.
    assert tiny.split > 1


@pytest.mark.parametrize("config", EVERY)
def test_more_work_takes_no_less_time(config):
    sizes = dict(pixels=50_000, channels=100, taps=9, depth=100)
    time = conv.microseconds(problem(**sizes), config, H200)
    for name, value in sizes.items():
        assert conv.microseconds(problem(**{**sizes, name: 4 * value}), config, H200) > time, name
    assert conv.microseconds(problem(**sizes), config, 33) > time


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_weight(dtype):
    w = random(5, 3, 2, 4).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    packed = conv.pack_weight(w, dtype)
    assert packed.shape == (5, 8, 3) and packed.is_contiguous()
    assert packed.dtype is dtype and not packed.requires_grad
    for k, c, r, s in ((0, 0, 0, 0), (4, 2, 1, 3), (2, 1, 1, 0), (3, 0, 0, 2)):
        assert packed[k, 4 * r + s, c] == w[k, c, r, s].to(dtype)


def test_weights_of_tf32_are_rounded_where_tensor_cores_would_cut_them(monkeypatch):
    w = torch.randn(300, 64, 3, 3)
    assert torch.equal(conv.pack_weight(w, torch.float32, "tf32"), conv.pack_weight(w, torch.float32))
    monkeypatch.setattr(conv, "INTERPRETED", False)
    packed = conv.pack_weight(w, torch.float32, "tf32")
    exact = conv.pack_weight(w, torch.float32, "ieee")
    assert ((packed.view(torch.int32) & 0x1FFF) == 0).all()
    # Half of the last of 10 bits at most, either way alike: to cut would be wrong by up to twice that.
    error = (packed - exact) / exact
    assert error.abs().max() <= 2**-11 and error.mean().abs() < 2**-16
    half = torch.randn(3, 2, 1, 1).half()
    assert torch.equal(conv.pack_weight(half, torch.float16, "tf32").flatten(), half.flatten())


def test_rounding_to_tf32():
    ulp = 2.0**-10
    values = [
        1 + ulp / 2,
        1 + ulp / 2.001,
        -1 - 1.5 * ulp,
        2.0,
        0.0,
        float("inf"),
        -float("inf"),
        3.4028235e38,
    ]
    rounded = [1 + ulp, 1.0, -1 - 2 * ulp, 2.0, 0.0, float("inf"), -float("inf"), float("inf")]
    assert conv.round_to_tf32(torch.tensor(values)).tolist() == rounded
    assert conv.round_to_tf32(torch.tensor([float("nan")])).isnan().all()


def test_workspace():
    like = torch.zeros(1, dtype=torch.float16)
    assert conv.workspace(conv.CONFIGS[0], 10, 3, like) is None
    parts = conv.workspace(conv.CONFIGS[-1], 10, 3, like)
    assert parts.shape == (conv.CONFIGS[-1].split, 10, 3) and parts.dtype is torch.float32
    for dtype, summed in ((torch.int8, torch.int32), (torch.float8_e4m3fn, torch.float32)):
        assert conv.workspace(conv.CONFIGS[-1], 10, 3, like.to(dtype)).dtype is summed


def test_memory_for_parts_is_the_callers_where_it_gives_some(monkeypatch):
    whole, split = conv.CONFIGS[0], conv.CONFIGS[-1]
    assert conv.scratch_bytes(whole, 10, 3) == 0
    needed = conv.scratch_bytes(split, 10, 3)
    assert needed == 4 * split.split * 10 * 3
    memory = poisoned((needed // 4,), torch.float32)
    for like, dtype in ((torch.zeros(1, dtype=torch.int8), torch.int32), (memory, torch.float32)):
        taken = conv.parts_of(memory, split, 10, 3, like)
        assert taken.data_ptr() == memory.data_ptr() and taken.dtype is dtype
        assert conv.parts_of(memory, whole, 10, 3, like) is None
        assert conv.parts_of(None, split, 10, 3, like).numel() * 4 == needed
    message = f"^parts has {needed - 4} bytes, a sum split in {split.split} needs {needed}$"
    with pytest.raises(ValueError, match=message):
        conv.parts_of(memory[1:], split, 10, 3, memory)


def test_activation():
    assert conv.activation(None) == conv.activation(1.0) == ("none", 1.0)
    assert conv.activation(0.0) == ("relu", 0.0)
    assert conv.activation(0.01) == ("leaky", 0.01)


def test_default_precision_is_torchs(monkeypatch):
    for dtype in (torch.float16, torch.bfloat16):
        assert conv.default_precision(dtype) == "tf32"
    for allowed, precision in ((False, "ieee"), (True, "tf32")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert conv.default_precision(torch.float32) == precision


@pytest.mark.parametrize("setting", ["backends.cudnn.conv", "backends.cudnn", "backends"])
def test_default_precision_follows_the_newer_settings(setting):
    # In a process of its own: a program that mixes both ways to set it may not read the older one. Up to
    # torch 2.11 a setting of convolutions does not follow the more general ones.
    told = python(
        "import torch\n"
        "from shelfkern.ops._conv_triton import default_precision\n"
        "for precision in ('ieee', 'tf32', 'ieee'):\n"
        f"    torch.{setting}.fp32_precision = precision\n"
        "    print(default_precision(torch.float32), torch.backends.cudnn.conv.fp32_precision)"
    )
    ours, torchs = told.split()[::2], told.split()[1::2]
    assert ours == torchs and (setting != "backends.cudnn.conv" or ours == ["ieee", "tf32", "ieee"])


@needs_triton
@pytest.mark.parametrize("tiles_m, tiles_n", [(1, 1), (8, 3), (21, 4), (7, 5), (9, 1), (1, 9)])
def test_tiles_are_each_made_once_eight_rows_at_a_time(tiles_m, tiles_n):
    tiles = moved("triton", torch.full((tiles_m * tiles_n, 2), -1, dtype=torch.int32))[0]
    record_tiles[(tiles_m * tiles_n,)](tiles, tiles_m, tiles_n)
    order = [tuple(tile) for tile in tiles.tolist()]
    assert sorted(order) == [(row, column) for row in range(tiles_m) for column in range(tiles_n)]
    # Groups of 8 rows one after another, and in a group column after column.
    assert order == sorted(order, key=lambda tile: (tile[0] // 8, tile[1], tile[0]))


@jit
def record_tiles(tiles, tiles_m, tiles_n):
    row, column = conv.tile_of(tl.program_id(0), tiles_m, tiles_n, 8)
    tl.store(tiles + 2 * tl.program_id(0), row)
    tl.store(tiles + 2 * tl.program_id(0) + 1, column)


# Fewer lines than programs, as many, more, more than the programs may ask for; and a grid beyond a wave.
@needs_triton
@pytest.mark.parametrize("programs, lines", [(4, 3), (4, 4), (5, 99), (3, 768), (3, 769), (200, 5000)])
def test_lines_are_each_asked_for_once_from_the_first_on(programs, lines):
    found = moved("triton", torch.full((programs, 256), -1, dtype=torch.int32))[0]
    record_lines[(programs,)](found, programs, lines)
    assert sorted(found[found >= 0].tolist()) == list(range(min(lines, programs * 256)))
    assert (found[128:] < 0).all()


@jit
def record_lines(found, programs, lines):
    line, asked = conv.lines_of(tl.program_id(0), programs, lines)
    tl.store(found + tl.program_id(0) * 256 + tl.arange(0, 256), line, mask=asked)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_is_to_the_nearest_even(dtype):
    # Ties, neighbours of ties, numbers beyond the range, and what is no number. Not numbers below the
    # normal ones: the interpreter gets those of bfloat16 wrong.
    upper = torch.arange(0, 2**16, 37).to(torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten()
    special = [float("nan"), float("inf"), float("-inf"), -0.0, 65504.0, 65519.99, 65520.0, 3.4e38]
    drawn = bits.where(bits < 2**31, bits - 2**32).int().view(torch.float32)
    values = torch.cat([drawn[~(drawn.abs() < 2.0**-126)], torch.tensor(special)])
    source, result = moved("triton", values, torch.empty_like(values, dtype=dtype))
    store_rounded[(-(-values.numel() // 1024),)](source, result, values.numel(), BLOCK=1024)
    assert torch.equal(result.cpu().nan_to_num(7), values.to(dtype).nan_to_num(7))
    assert torch.equal(result.cpu().signbit() & ~values.isnan(), values.signbit() & ~values.isnan())


@jit
def store_rounded(source, result, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count)
    tl.store(result + at, rounded(values, result), mask=at < count)


def python(code, **environment):
    """What a process of its own prints, without TRITON_INTERPRET unless given."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=env | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Asks every op for Triton, then takes what "auto" gives.
ASK = """
import torch
from shelfkern import ops
x, ones = torch.ones(1, 2, 4, 4), torch.ones(2)
w, twice = torch.ones(2, 2, 3, 3), torch.ones(1, 2, 8, 8)
for op, arguments in dict(
    bn_act_dropout=(x, torch.nn.BatchNorm2d(2)), conv_bn_act=(x, w),
    deconv_add=(x, w, ones, twice), quantize=(x, 1.0),
    shared_block=(x, w, ones, ones, ones, ones),
    upsample_add=(x, twice), upsample_bilinear=(x, (8, 8)),
    upsample_cross_entropy=(x, torch.zeros(1, 8, 8, dtype=torch.uint8), (8, 8)),
).items():
    assert getattr(ops, op)(*arguments).isfinite().all()
    try:
        getattr(ops, op)(*arguments, backend="triton")
    except RuntimeError as error:
        print(error)
"""


def test_without_triton_the_ops_say_so_and_auto_runs():
    told = python("import sys\nsys.modules['triton'] = None\n" + ASK, TRITON_INTERPRET="0").splitlines()
    assert len(told) == len(TRITON_OPS)
    for op, line in zip(TRITON_OPS, told, strict=True):
        assert line.startswith(f"{op}: backend is 'triton', which cannot run: Triton does not load (")
        assert line.endswith("pip install triton")


@pytest.mark.skipif(_triton.why_not is not None, reason=f"no Triton: {_triton.why_not}")
def test_compiled_kernels_need_a_gpu():
    no_cuda = "this torch is built without CUDA; with TRITON_INTERPRET=1 kernels run interpreted"
    no_gpu = "there is no GPU that torch can use"
    for environment, reason in (
        ({}, no_cuda if torch.version.cuda is None else no_gpu),
        (dict(TRITON_INTERPRET="0"), no_gpu),
    ):
        told = python(ASK, CUDA_VISIBLE_DEVICES="", **environment).splitlines()
        assert told == [f"{op}: backend is 'triton', which cannot run: {reason}" for op in TRITON_OPS]


@needs_triton_on_a_gpu
def test_compiled_kernels_refuse_tensors_of_the_cpu():
    with pytest.raises(RuntimeError, match="x is on cpu, the triton kernel runs on a GPU"):
        ops.upsample_add(random(1, 2, 2, 2), random(1, 2, 4, 4), backend="triton")


@needs_triton
def test_refuses_other_dtypes():
    x, w = moved("triton", random(1, 2, 4, 4).double(), random(3, 2, 3, 3))
    message = r"x is torch.float64, the triton kernel takes float32 and bfloat16 and float16$"
    with pytest.raises(RuntimeError, match=message):
        ops.conv_bn_act(x, w, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled")
def test_interpreted_kernels_run_by_name_only():
    x, w = random(1, 2, 4, 4).half(), random(3, 2, 3, 3).half()
    assert torch.equal(ops.conv_bn_act(x, w), ops.conv_bn_act(x, w, backend="reference"))
    assert ops.conv_bn_act_reference(x, w).shape == ops.conv_bn_act(x, w, backend="triton").shape
