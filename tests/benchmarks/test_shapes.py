"""The problems of the op benchmarks, their arithmetic and their traffic."""

from __future__ import annotations

import collections

import pytest
import torch
from shapes import MODELS, SIZES, Problem, plan_of, problems_of, table, use

from shelfkern import ops

FP32, BF16 = torch.float32, torch.bfloat16


def only(op, text):
    """The one problem of an op that prints as the text."""
    (found,) = (entry.problem for entry in table() if entry.problem.op == op and str(entry.problem) == text)
    return found


@pytest.mark.parametrize(
    "op, text, flop, dtype, nbytes",
    [
        # x, weights, scale and shift, residual, result.
        (
            "conv_bn_act",
            "1x64x128x128-3x3s1-to_64x128x128-relu-residual",
            2 * 64 * 128 * 128 * 64 * 9,
            BF16,
            2 * 64 * 128 * 128 + 2 * 64 * 64 * 9 + 4 * 2 * 64 + 2 * 2 * 64 * 128 * 128,
        ),
        # One copy of the weights for two convolutions.
        (
            "shared_block",
            "1x256x16x16-3x3s1-to_256x16x16-leaky0.01",
            2 * 2 * 256 * 16 * 16 * 256 * 9,
            FP32,
            4 * (2 * 256 * 16 * 16 + 256 * 256 * 9 + 4 * 256),
        ),
        # uint8 pixels; the convolution's result is four times what is written.
        (
            "stem",
            "1x512x512x3-raw-7x7s2-to_64x128x128-leaky0.01",
            2 * 64 * 256 * 256 * 3 * 49,
            BF16,
            512 * 512 * 3 + 2 * 64 * 3 * 49 + 4 * 2 * 64 + 2 * 64 * 128 * 128,
        ),
        # Each pixel of x meets nine taps.
        (
            "deconv_add",
            "1x128x64x64-3x3s2-to_64x128x128",
            2 * 128 * 64 * 64 * 64 * 9,
            FP32,
            4 * (128 * 64 * 64 + 128 * 64 * 9 + 64 + 2 * 64 * 128 * 128),
        ),
        # A float32 gate; one multiplication and one addition.
        (
            "upsample_add",
            "1x64x32x32-to_64x64x64",
            2 * 64 * 64 * 64,
            BF16,
            2 * 64 * 32 * 32 + 4 * 64 + 2 * 2 * 64 * 64 * 64,
        ),
        (
            "attention_gate",
            "1x64x32x32-to_64",
            2 * 64 * 64,
            BF16,
            2 * 64 * 32 * 32 + 2 * 64 * 64 + 4 * 3 * 64,
        ),
        (
            "upsample_argmax",
            "1x19x64x64-to_512x512",
            2 * 4 * 19 * 512 * 512,
            FP32,
            4 * 19 * 64 * 64 + 512 * 512,
        ),
        (
            "upsample_bilinear",
            "1x19x64x64-to_19x512x512",
            2 * 4 * 19 * 512 * 512,
            BF16,
            2 * 19 * (64 * 64 + 512 * 512),
        ),
        # out, in float32, is read and written.
        (
            "upsample_softmax_sum",
            "1x19x64x64-to_19x512x512",
            2 * 4 * 19 * 512 * 512,
            BF16,
            2 * 19 * 64 * 64 + 2 * 4 * 19 * 512 * 512,
        ),
        # x and the result's gradient are read, the gradient of x is written; forward, and twice backward.
        (
            "conv_train",
            "1x64x128x128-3x3s2-to_128x64x64",
            3 * 2 * 128 * 64 * 64 * 64 * 9,
            FP32,
            4 * (2 * 64 * 128 * 128 + 128 * 64 * 64 + 128 * 64 * 9),
        ),
        # uint8 labels; the gradient has the scores' size.
        (
            "upsample_cross_entropy",
            "1x19x64x64-labels_512x512-to_19x64x64",
            2 * 2 * 4 * 19 * 512 * 512,
            BF16,
            2 * 2 * 19 * 64 * 64 + 512 * 512,
        ),
    ],
)
def test_arithmetic_and_traffic_as_counted_by_hand(op, text, flop, dtype, nbytes):
    problem = only(op, text)
    assert problem.flop == flop
    assert problem.bytes(dtype) == nbytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_the_table_covers_every_step_of_the_plan(model, size):
    plan = plan_of(model)
    counts = collections.Counter()
    macs = 0
    for entry in table():
        problem, times = entry.problem, entry.uses.get(use(model, size), 0)
        counts[problem.op] += times
        macs += times * problem.macs * (not problem.raw and not problem.trains)
    resizes = ("upsample_bilinear", "upsample_softmax_sum", "upsample_argmax", "upsample_cross_entropy")
    assert [counts.pop(op) for op in resizes] == [1, 1, 1, 1]
    # The loss's resize has a gradient.
    resize_macs = 5 * 4 * plan.num_classes * size[0] * size[1]
    assert macs == plan.macs(1, *size) + resize_macs
    norms = sum(step.op == "conv_bn_act" and step.scale is not None for step in plan.steps)
    assert counts.pop("bn_act_dropout") == norms
    assert counts.pop("shared_block_train", 0) == counts["shared_block"]
    assert counts.pop("conv_train") + counts.pop("bn_act_conv_train") == counts["conv_bn_act"]
    assert counts.pop("max_pool_train") == 1
    # The stem is there twice, for raw and for normalised images.
    assert counts == collections.Counter(step.op for step in plan.steps) + collections.Counter(["stem"])


def test_problems_are_distinct_and_so_are_their_names():
    problems = [entry.problem for entry in table()]
    assert len(set(problems)) == len(problems)
    assert len({(problem.op, str(problem)) for problem in problems}) == len(problems)


def test_every_op_has_a_few_quick_problems():
    quick = collections.Counter(entry.problem.op for entry in table() if entry.quick)
    training = {"conv_train", "bn_act_conv_train", "shared_block_train", "max_pool_train"}
    assert set(quick) == set(ops.NAMES) - {"quantize"} | training
    assert max(quick.values()) <= 3


def test_a_batch_multiplies_activations_but_not_weights():
    one, four = (next(problems_of(plan_of("shelfnet18_lw"), n, (64, 64))) for n in (1, 4))
    assert four.flop == 4 * one.flop
    fixed = 4 * (64 * 3 * 49 + 2 * 64)
    assert four.bytes(FP32) - fixed == 4 * (one.bytes(FP32) - fixed)


def test_a_problem_without_weights_reads_none():
    assert Problem("upsample_bilinear", ((1, 2, 3, 4),), (1, 2, 5, 6), 0).bytes(FP32) == 4 * (24 + 60)
