"""What a forward pass asks of streams, events and graphs, by a stand-in that remembers."""

import contextlib
import dataclasses
import functools
import threading

import pytest
import torch
from models import CONFIGS, assert_as_exact_as_eager, build, images
from recording import Recording

from shelfkern import nn as published
from shelfkern.engine import order
from shelfkern.engine.gpu.algorithm import Algorithm
from shelfkern.engine.gpu.device import H200
from shelfkern.engine.gpu.forward import OVERLAP_GAIN, Forward, recipes
from shelfkern.engine.gpu.program import GpuProgram, Options
from shelfkern.engine.gpu.timing import compile_ahead, tuner_of
from shelfkern.engine.lower import lower
from shelfkern.engine.tuning import Candidate, TuneCache, Tuner

CPU = torch.device("cpu")


def algorithm(step, log, scratch=0, in_arena=True):
    """Writes nothing, but says that it ran, with what, and whether it may overlap."""

    def run(inputs, outputs, memory, overlap):
        log(step, [x.data_ptr() for x in inputs], [x.data_ptr() for x in outputs], memory, overlap)
        return None if in_arena else torch.zeros(step.output.shape(1, 64, 64))

    time = 10.0 if step.detail().startswith("3x3") else 1.0
    return Algorithm("recorded", time, 1, lambda: run, in_arena, scratch)


def forward_of(plan, runtime, log, streams=2, own=(), scratch=0):
    steps = [algorithm(s, log, scratch, index not in own) for index, s in enumerate(plan.steps)]
    found = recipes(plan, (1, 64, 64), torch.float16, steps, streams, overlap=True)
    chosen = next(one for one in found if one.name == f"{streams} stream{'s' * (streams > 1)}, overlapping")
    return Forward(chosen, images(1, 64, 64), runtime)


@pytest.mark.parametrize("own", [(), (3, 8)])
@pytest.mark.parametrize("name", ["shelfnet18_lw", "shelfnet50"])
def test_no_two_steps_race(name, own):
    """Whatever order the streams run in, no step writes what another may still read, or reads too early."""
    with torch.device("meta"):
        plan = lower(getattr(published, name)())
    runtime = Recording()
    touched = []

    def log(step, inputs, outputs, scratch, overlap):
        begun = frozenset(runtime.ended[runtime.stream])
        runtime.work(step.name + step.op)
        touched.append((step, begun))

    forward = forward_of(plan, runtime, log, own=own, scratch=1 << 12)
    assert any(forward.recipe.order.streams)
    forward.run()
    assert [step for step, _ in touched] == list(plan.steps)

    steps = [step for index, step in enumerate(plan.steps) if index not in own]
    spans = {step.output: span(forward._values[step.output.index]) for step in steps}
    name_of = {step: step.name + step.op for step in plan.steps}
    begun = dict(touched)
    writer = {step.output: step for step in plan.steps}
    readers = {value: [step for step in plan.steps if value in step.inputs] for value in writer}
    for index, step in enumerate(plan.steps):
        for value in step.inputs:
            assert name_of[writer[value]] in begun[step]
        memory = [span(forward._scratch[index]), *(spans[value] for value in step.outputs if value in spans)]
        # What lies in the same memory and is not its own: all that touches it has ended, or begins after.
        for value, lies in spans.items():
            if value == step.output or not any(overlaps(lies, mine) for mine in memory):
                continue
            if plan.steps.index(writer[value]) < index:
                users = [writer[value], *readers[value]]
                assert all(name_of[user] in begun[step] for user in users), (step.name, value)
            else:
                assert name_of[step] in begun[writer[value]]


def span(tensor):
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def overlaps(one, other):
    return one[0] < other[1] and other[0] < one[1]


def test_one_stream_where_two_are_not_asked_for():
    plan = lower(build(CONFIGS["deconv"]))
    runtime, ran = Recording(), []
    forward = forward_of(plan, runtime, lambda step, *rest: ran.append((step.name, rest[3])), streams=1)
    runtime.log.clear()
    forward.run()
    assert runtime.log == [] and len(ran) == len(plan.steps)
    # All but the first may begin early: each waits for the one ahead of it by itself.
    assert [overlap for _, overlap in ran] == [False] + [True] * (len(ran) - 1)


def test_steps_that_wait_for_another_stream_do_not_begin_early():
    plan = lower(build(CONFIGS["deconv"]))
    runtime, overlapping = Recording(), {}
    forward = forward_of(plan, runtime, lambda step, *rest: overlapping.update({step.name: rest[3]}))
    forward.run()
    waits = forward.recipe.order.waits
    for step, waited in zip(plan.steps, waits, strict=True):
        assert overlapping[step.name] == (not waited and step is not plan.steps[0])
    assert any(waits) and not all(waits)


def test_a_side_stream_is_joined_and_begins_after_the_pass_before():
    plan = lower(build(CONFIGS["deconv"]))
    runtime = Recording()
    runtime.ended["main"].add("before")
    forward = forward_of(plan, runtime, lambda step, *rest: runtime.work(step.name))
    forward.run()
    assert {step.name for step in plan.steps} <= runtime.ended["main"]
    side = next(name for name in runtime.ended if name.startswith("side"))
    assert "before" in runtime.ended[side]


def program(model, runtime, graphs=True):
    options = Options(CPU, torch.float32, ours=False, graphs=graphs)
    plan = lower(model)
    return GpuProgram(plan, options, model.normalisation, model.align_corners, tuner_of(CPU, False), runtime)


@torch.no_grad()
def test_a_graph_is_captured_once_and_replayed():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime)
    kinds = functools.partial(count, runtime)
    for _ in range(3):
        fast.scores(images(1, 64, 64))
    assert (kinds("capture"), kinds("replay")) == (1, 3)
    fast.labels(images(1, 64, 64))
    fast.scores(images(1, 32, 64))
    # Labels are another graph, since the argmax is in it; and so is every size.
    assert (kinds("capture"), kinds("replay")) == (3, 5)
    fast.scores(images(1, 64, 64).half())
    assert kinds("capture") == 3


@torch.no_grad()
def test_images_are_enlarged_inside_the_graph():
    runtime, model = Recording(), build(CONFIGS["enlarged"])
    fast = program(model, runtime)
    inputs = [images(1, 45, 71), images(1, 45, 71, seed=1), images(1, 45, 71)]
    assert_as_exact_as_eager(fast.scores, model, inputs, torch.float32)
    assert (count(runtime, "capture"), count(runtime, "replay")) == (1, 3)


@torch.no_grad()
def test_coarse_scores_are_kept_from_the_next_pass():
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = program(model, Recording())
    coarse = fast.coarse_scores(x)
    fast.coarse_scores(images(1, 64, 64, seed=1))
    torch.testing.assert_close(coarse, model.coarse_scores(x), rtol=1e-4, atol=1e-4)


def count(runtime, kind):
    return sum(entry[0] == kind for entry in runtime.log)


@torch.no_grad()
def test_without_graphs_nothing_is_captured():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime, graphs=False)
    fast.scores(images(1, 64, 64))
    assert count(runtime, "capture") == count(runtime, "replay") == 0


@torch.no_grad()
def test_memory_used_in_another_stream_is_waited_for():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime, graphs=False)
    fast.scores(images(1, 64, 64))
    other = runtime.side_stream()
    before = len(runtime.log)
    with runtime.on(other):
        fast.scores(images(1, 64, 64))
    waits = [entry for entry in runtime.log[before:] if entry[:2] == ("wait", other)]
    marks = [entry for entry in runtime.log[:before] if entry[:2] == ("mark", "main")]
    assert waits[0][2] == marks[-1][2]
    # And its memory is not given to others before that stream is done with it.
    assert {stream for stream, _ in runtime.kept} == {other}


@torch.no_grad()
def test_a_pass_bound_in_one_stream_may_run_first_in_another():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime, graphs=False)
    forward = fast.bind(images(1, 64, 64), labels=False)
    other = runtime.side_stream()
    with runtime.on(other):
        forward.wait()
    assert {stream for stream, _ in runtime.kept} == {other}
    assert runtime.log[-1][:2] == ("wait", other)


@torch.no_grad()
def test_packed_weights_are_there_before_any_stream_reads_them():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime, graphs=False)
    fast.recipe((1, 64, 64))
    assert count(runtime, "synchronize") == 0
    fast.scores(images(1, 64, 64))
    packed = sum(len(step._made) for step in fast._packed)
    assert count(runtime, "synchronize") == packed > 40
    fast.scores(images(1, 64, 32))
    assert count(runtime, "synchronize") == packed


@torch.no_grad()
def test_calls_at_once_have_memory_of_their_own():
    runtime = Recording()
    fast = program(build(CONFIGS["attention"]), runtime)
    key = fast._key(images(1, 64, 64), False)
    with fast._passes.borrow(key) as one, fast._passes.borrow(key) as other:
        assert one is not other and one.images.data_ptr() != other.images.data_ptr()
    assert count(runtime, "capture") == 2
    with fast._passes.borrow(key) as again:
        assert again in (one, other)


def test_predictions_are_for_the_gpu():
    fast = program(build(CONFIGS["attention"]), Recording())
    assert fast.context.gpu is H200
    found = fast.recipe((1, 64, 64))
    times = [step.algorithm.microseconds for step in found.steps]
    assert found.microseconds <= order.makespan(found.order, times) <= sum(times)
    assert found.launches == sum(step.algorithm.launches for step in found.steps)


def test_ways_to_launch_a_pass():
    plan = lower(build(CONFIGS["deconv"]))
    steps = [dataclasses.replace(algorithm(s, None), name="triton") for s in plan.steps]
    found = {one.name: one for one in recipes(plan, (1, 64, 64), torch.float16, steps, 2, True)}
    assert set(found) == {"1 stream", "2 streams", "1 stream, overlapping", "2 streams, overlapping"}
    one, early = found["1 stream"], found["1 stream, overlapping"]
    assert early.microseconds == pytest.approx(one.microseconds - OVERLAP_GAIN * (len(steps) - 1))
    assert found["2 streams"].microseconds < one.microseconds
    ordered = recipes(plan, (1, 64, 64), torch.float16, steps, 2, True)
    assert [each.microseconds for each in ordered] == sorted(each.microseconds for each in ordered)
    assert [each.name for each in recipes(plan, (1, 64, 64), torch.float16, steps, 1, False)] == ["1 stream"]
    # The library's kernels wait for the one ahead in any case.
    theirs = [dataclasses.replace(each, name="cudnn") for each in steps]
    slow = recipes(plan, (1, 64, 64), torch.float16, theirs, 1, True)
    assert slow[0].microseconds == slow[1].microseconds


def test_a_way_to_launch_is_chosen_by_timing_whole_passes():
    runtime = Recording()
    fast = program(build(CONFIGS["deconv"]), runtime)
    measured = {}

    class Clock:
        def measure(self, calls, cold):
            for name, call in calls.items():
                if "stream" in name:
                    begin = len(runtime.log)
                    call()
                    measured[name] = [entry[0] for entry in runtime.log[begin:]]
            return {name: 1.0 if name == "1 stream" else 2.0 for name in calls}

    fast.tuner = Tuner(TuneCache(None, {}), Clock())
    assert fast.recipe((1, 64, 64)).name == "1 stream"
    # Passes in one stream ask nothing of the runtime, those in two do.
    assert measured["1 stream"] == [] and "wait" in measured["2 streams"]
    assert set(measured) == {"1 stream", "2 streams", "1 stream, overlapping", "2 streams, overlapping"}


def test_kernels_are_compiled_beside_each_other(monkeypatch):
    """All that will run, several at once; one that fails keeps none of the others."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ran.append("synchronize"))
    ran, both = [], threading.Barrier(2, timeout=30)

    def candidate(name, fails=False):
        def prepare():
            both.wait()
            if fails:
                raise RuntimeError("does not compile")
            return lambda: ran.append(name)

        return Candidate(name, 1.0, prepare)

    compile_ahead([candidate("a"), candidate("b", fails=True), candidate("c"), candidate("d")], CPU, 2)
    assert sorted(ran[:-1]) == ["a", "c", "d"] and ran[-1] == "synchronize"
