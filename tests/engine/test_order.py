"""Which steps may run at the same time: on plans drawn by hand, and on those of the models."""

import itertools

import pytest
import torch
from models import CONFIGS, build

from shelfkern import nn as published
from shelfkern.engine import arena
from shelfkern.engine.lower import lower
from shelfkern.engine.order import Order, in_sequence, makespan, side_by_side
from shelfkern.engine.plan import MaxPool, Plan, Value

VALUES = [Value(index, 8, 4) for index in range(8)]


def plan(*edges):
    """A plan whose step i reads the results of the steps given."""
    steps = [
        MaxPool(f"step{index}", tuple(VALUES[other] for other in needed), VALUES[index])
        for index, needed in enumerate(edges)
    ]
    return Plan(tuple(steps), 8)


# 0 -> 1 (shortcut) -> 4; 0 -> 2 -> 3 -> 4.
BRIDGED = plan((), (0,), (0,), (2,), (3, 1))


def test_a_sequence_has_one_stream_and_no_waits():
    order = in_sequence(BRIDGED)
    assert order.streams == (0,) * 5 and order.waits == ((),) * 5
    assert order.before == (0b0, 0b1, 0b11, 0b111, 0b1111)
    assert makespan(order, [1, 2, 3, 4, 5]) == 15


def test_a_shortcut_runs_beside_what_it_bridges():
    order = side_by_side(BRIDGED, [1, 2, 3, 4, 5])
    assert order.streams == (0, 1, 0, 0, 0)
    # The shortcut waits for 0 and the sum for the shortcut; 3 follows 2 in its stream.
    assert order.waits == ((), (0,), (), (), (1,))
    assert order.before == (0b0, 0b1, 0b1, 0b101, 0b1111)
    assert makespan(order, [1, 2, 3, 4, 5]) == 1 + 3 + 4 + 5


def test_the_longer_branch_stays_in_the_main_stream():
    order = side_by_side(BRIDGED, [1, 9, 3, 4, 5])
    assert order.streams == (0, 0, 1, 1, 0)
    assert makespan(order, [1, 9, 3, 4, 5]) == 1 + 9 + 5


def test_a_chain_has_nothing_to_run_beside():
    chain = plan((), (0,), (1,), (2,))
    assert side_by_side(chain, [1, 1, 1, 1]) == in_sequence(chain)


def test_what_was_waited_for_is_not_waited_for_again():
    # 1 and 2 on the side, both needed by 4 and 5.
    order = side_by_side(plan((), (0,), (1,), (0,), (3, 1, 2), (4, 2)), [1, 1, 1, 9, 1, 1])
    assert order.streams == (0, 1, 1, 0, 0, 0)
    # 2 comes after 1 in its stream.
    assert order.waits == ((), (0,), (), (), (2,), ())


MODELS = ("shelfnet18_lw", "shelfnet34_lw", "shelfnet50", "shelfnet101")


@pytest.mark.parametrize("name", MODELS)
def test_every_step_begins_after_those_it_needs(name):
    with torch.device("meta"):
        found = lower(getattr(published, name)())
    times = [1.0 + 9 * (step.detail().startswith("3x3")) for step in found.steps]
    order = side_by_side(found, times)
    writer = {step.output: index for index, step in enumerate(found.steps)}
    for index, step in enumerate(found.steps):
        assert all(order.ended(writer[value], index) for value in step.inputs)
        assert not order.ended(index, index)
    # Shortcuts and all laterals but the last.
    side = {found.steps[index].name for index, stream in enumerate(order.streams) if stream}
    assert {name for name in side if "downsample" in name or "laterals" in name} == side
    assert sum("downsample" in name for name in side) == sum(
        "downsample" in step.name for step in found.steps
    )
    assert makespan(order, times) < makespan(in_sequence(found), times)
    # The last step begins when all others have ended.
    assert order.before[-1] == (1 << len(found.steps) - 1) - 1


def together(order: Order, first: list[int], second: list[int]) -> bool:
    """Whether two values, touched by these steps, may be alive at once in some run."""

    def apart(a, b):
        return all(step < len(order.before) and order.ended(step, b[0]) for step in a)

    return not apart(first, second) and not apart(second, first)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parallel", [False, True])
def test_the_arena_never_overlaps_what_may_live_together(name, parallel):
    found = lower(build(CONFIGS[name]))
    times = [1.0 + 9 * (step.detail().startswith("3x3")) for step in found.steps]
    order = side_by_side(found, times) if parallel else in_sequence(found)
    scratch = {index: 1000 * (index % 3) for index in range(len(found.steps))}
    values = {value for step in found.steps for value in (step.output, *step.temporaries)}
    size = (2, 64, 96)
    layout = arena.lay_out(found, values, *size, torch.float16, order, scratch)

    touched = {}
    for index, step in enumerate(found.steps):
        for value in (step.output, *step.temporaries):
            touched[value] = [index]
        for value in step.inputs:
            touched[value].append(index)
        if scratch[index]:
            touched[arena.Scratch(index)] = [index]
    touched[found.scores].append(len(found.steps))

    def span(tenant):
        known = isinstance(tenant, arena.Scratch)
        nbytes = scratch[tenant.step] if known else tenant.bytes(*size, torch.float16)
        return layout.offsets[tenant], layout.offsets[tenant] + nbytes

    assert set(layout.offsets) == set(touched)
    for one, other in itertools.combinations(touched, 2):
        (begin, end), (start, stop) = span(one), span(other)
        if together(order, touched[one], touched[other]):
            assert end <= start or stop <= begin, (one, other)
    whole = sum(span(tenant)[1] - span(tenant)[0] for tenant in touched)
    assert max(span(tenant)[1] for tenant in touched) <= layout.size < whole / 2


def test_values_side_by_side_need_memory_of_their_own():
    # 1 dies at 2; 3, written beside it, may not take its place.
    bridged = plan((), (0,), (1,), (0,), (2, 3))
    values = {step.output for step in bridged.steps}
    order = side_by_side(bridged, [1, 5, 5, 1, 1])
    assert order.streams == (0, 0, 0, 1, 0)
    layout = arena.lay_out(bridged, values, 1, 64, 64, torch.float16, order)
    assert layout.offsets[VALUES[3]] not in (layout.offsets[VALUES[1]], layout.offsets[VALUES[2]])
    in_turn = arena.lay_out(bridged, values, 1, 64, 64, torch.float16)
    assert in_turn.size < layout.size
