import collections
import dataclasses
import itertools

import pytest
import torch
from models import CONFIGS, build
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from shelfkern.engine import arena
from shelfkern.engine.lower import lower
from shelfkern.nn import shelfnet18_lw, shelfnet34_lw, shelfnet50, shelfnet101
from shelfkern.nn.blocks import ConvBNAct, SharedBlock


@pytest.mark.parametrize(
    "build_model, counts",
    [
        # Counted by hand: backbone convolutions and shortcuts, laterals, merges (2 each), downs, head.
        (shelfnet18_lw, dict(stem=1, conv_bn_act=19 + 3 + 8 + 2 + 2, shared_block=5, attention_gate=4)),
        (shelfnet34_lw, dict(stem=1, conv_bn_act=35 + 0 + 8 + 2 + 2, shared_block=5, attention_gate=4)),
        (shelfnet50, dict(stem=1, conv_bn_act=52 + 4 + 3 + 1, shared_block=1 + 3 + 5 + 3, deconv_add=6)),
        (shelfnet101, dict(stem=1, conv_bn_act=103 + 4 + 3 + 1, shared_block=1 + 3 + 5 + 3, deconv_add=6)),
    ],
)
def test_steps_of_the_published_models(build_model, counts):
    with torch.device("cpu"):
        plan = lower(build_model())
    ops = collections.Counter(step.op for step in plan.steps)
    counts["upsample_add"] = counts.get("attention_gate", 0)
    assert ops == +collections.Counter(counts)


@pytest.mark.parametrize("name", CONFIGS)
def test_multiply_adds_equal_those_of_the_model(name):
    model = build(CONFIGS[name])
    plan = lower(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(2, 3, 64, 96))
    size = 2, *plan.extents.seen(64, 96)
    merges = sum(
        s.macs_per_output() * torch.Size(s.output.shape(*size)).numel()
        for s in plan.steps
        if s.op == "upsample_add"
    )
    assert plan.macs(*size) - merges == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_written_once_before_it_is_read(name):
    plan = lower(build(CONFIGS[name]))
    written = set()
    for step in plan.steps:
        assert set(step.inputs) <= written
        assert step.output not in written
        written.add(step.output)


def test_shared_blocks_hold_one_copy_of_their_weights():
    model = build(CONFIGS["attention"])
    plan = lower(model)
    blocks = [step for step in plan.steps if step.op == "shared_block"]
    convs = [m.conv.weight for m in model.modules() if isinstance(m, SharedBlock)]
    assert [b.weight.data_ptr() for b in blocks] == [w.data_ptr() for w in convs]


def test_print_shows_every_step():
    plan = lower(build(CONFIGS["attention"]))
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.steps) + 2
    assert "shelf.columns.0.bottom" in str(plan)
    assert lines[-1].startswith(f"{len(plan.steps)} steps, ")


@pytest.mark.parametrize("name", CONFIGS)
def test_arena_never_overlaps_what_lives_together(name):
    plan = lower(build(CONFIGS[name]))
    values = {value for step in plan.steps for value in (step.output, *step.temporaries)}
    size = (2, 64, 96)
    layout = arena.lay_out(plan, values, *size, torch.float32)
    bytes_of = {v: arena.value_bytes(v, *size, torch.float32) for v in values}
    dies = plan.last_uses()
    alive = []
    for index, step in enumerate(plan.steps):
        alive = [v for v in alive if dies[v] >= index] + [step.output]
        together = [*alive, *step.temporaries]
        spans = sorted((layout.offsets[v], layout.offsets[v] + bytes_of[v]) for v in together)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        assert spans[-1][1] <= layout.size
    assert layout.size < sum(bytes_of.values()) / 2


class _OtherBlock(ConvBNAct):
    pass


def _subclass(model):
    model.shelf.laterals[0].__class__ = _OtherBlock


def _hook(model):
    model.head.register_forward_hook(lambda *_: None)


def _parametrize(model):
    parametrizations.weight_norm(model.head.classify)


def _activation(model):
    model.backbone.act = nn.GELU()


@pytest.mark.parametrize(
    "change, message",
    [
        (_subclass, "model has a _OtherBlock at 'shelf.laterals.0', which has no fused form"),
        (_hook, "model has forward hooks at 'head'"),
        (_parametrize, "model has a ParametrizedConv2d at 'head.classify'"),
        (_activation, "model has the activation GELU"),
    ],
)
def test_what_a_plan_cannot_run_is_refused(change, message):
    model = build(CONFIGS["attention"])
    change(model)
    with pytest.raises(TypeError, match=message):
        lower(model)


def test_plans_are_immutable():
    plan = lower(build(CONFIGS["attention"]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps[0].act = None


def test_a_description_is_of_what_the_backbone_sees():
    plan = lower(build(CONFIGS["enlarged"]))
    assert plan.describe(1, 33, 40).endswith(plan.describe(1, 40, 40).splitlines()[-1])
    assert "at 1 x 3 x 64 x 64" in plan.describe(1, 33, 40)
    assert "at 1 x 3 x 64 x 64" in lower(build(CONFIGS["attention"])).describe(1, 33, 40)
