import json
import threading
import time
import weakref

import pytest
import torch
from models import CONFIGS, assert_as_exact_as_eager, build, images

import shelfkern
from shelfkern import native
from shelfkern.engine.cpu import choice, library, timing
from shelfkern.engine.cpu.timing import Tuners
from shelfkern.engine.problem import Packed
from shelfkern.engine.tuning import CpuClock

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
needs_onednn = pytest.mark.skipif(
    library.onednn_reason() is not None, reason=f"no oneDNN: {library.onednn_reason()}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing measured, and a folder for what is."""
    monkeypatch.setenv("SHELFKERN_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("backend", ["auto", "library"])
@torch.no_grad()
def test_autocast_of_the_caller_does_not_matter(backend):
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model, backend=backend)
    expected, labels = fast(x), fast.predict(x)
    with torch.autocast("cpu", torch.bfloat16):
        # What is packed there, too.
        for module in (fast, shelfkern.accelerate(model, backend=backend)):
            assert torch.equal(module(x), expected) and torch.equal(module.predict(x), labels)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("backend", ["auto", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_what_is_no_number_stays_none(name, dtype, backend):
    model, x = build(CONFIGS[name]), images(1, 96, 128)
    x[0, 1, 20, 30] = torch.nan
    found = shelfkern.accelerate(model, dtype, backend=backend)(x).isnan()
    # Winograd's transforms spread it over their tiles.
    assert found[model(x).isnan()].all() and found.any()


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("auto", torch.float32),
        ("library", torch.float32),
        pytest.param("auto", torch.int8, marks=needs_native),
    ],
)
def test_the_default_device_does_not_matter(backend, dtype):
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    raw = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    options = dict(backend=backend, calibration=raw if dtype is torch.int8 else None)
    fast = shelfkern.accelerate(model, dtype, **options)
    expected, labels, coarse = fast(x), fast.predict(raw), fast.coarse_scores(x)
    with torch.device("meta"):
        library.onednn_reason.cache_clear()
        again = shelfkern.accelerate(model, dtype, **options)
        assert again.plan.describe() == fast.plan.describe()
        for module in (fast, again):
            assert torch.equal(module(x), expected) and torch.equal(module.predict(raw), labels)
            assert torch.equal(module.coarse_scores(x), coarse)


class Clock:
    """Finds candidates the faster, the earlier their names begin one of `order`; runs each once."""

    def __init__(self, *order):
        self.order, self.timed = order, []

    def measure(self, calls, cold):
        assert len(calls) > 1
        self.timed += calls
        for call in calls.values():
            call()
        # Layers are timed with nothing in the caches, passes as they run.
        return {name: self._place(name) if cold else self._pass(name) for name in calls}

    def _pass(self, name):
        return 1.0

    def _place(self, name):
        return next((i + 1.0 for i, begin in enumerate(self.order) if name.startswith(begin)), 100.0)


@pytest.fixture
def finds(monkeypatch):
    """Makes the clock find some candidates the fastest; gives it."""

    def use(*order):
        clock = Clock(*order)
        monkeypatch.setattr(timing, "CpuClock", lambda: clock)
        return clock

    return use


def algorithm_names(fast, n=1, h=64, w=64):
    return fast.plan.algorithms(n, h, w)


@needs_native
@needs_onednn
@torch.no_grad()
def test_what_is_fastest_runs_and_is_known_to_the_next(finds, cache):
    model, sizes = build(CONFIGS["no_lateral"]), [(1, 64, 64), (2, 45, 83)]
    clock = finds("onednn", "torch")
    fast = shelfkern.accelerate(model, tune=True)
    assert_as_exact_as_eager(fast, model, [images(*size) for size in sizes], torch.float32)
    assert set(algorithm_names(fast)) == {"onednn", "torch"} and "onednn" in str(fast.plan)
    assert {"native direct", "native winograd 4x4", "native winograd 2x2", "onednn"} <= set(clock.timed)
    count = len(clock.timed)
    fast(images(1, 64, 64)), fast.plan.describe(1, 64, 64)
    assert len(clock.timed) == count

    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["environment"]["threads"] == "1"
    again = shelfkern.accelerate(model)
    assert algorithm_names(again) == algorithm_names(fast)
    # Another size was not measured.
    assert "native direct" in algorithm_names(again, 1, 320, 320) and len(clock.timed) == count


@needs_native
@needs_onednn
@torch.no_grad()
def test_what_is_fastest_by_itself_but_not_in_a_pass_does_not_run(finds):
    model, clock = build(CONFIGS["attention"]), finds("onednn", "torch")
    passes = []
    clock._pass = lambda name: passes.append(name) or 10.0 - len(passes)
    fast = shelfkern.accelerate(model, tune=True)
    assert_as_exact_as_eager(fast, model, [images(1, 64, 64)], torch.float32)
    assert len(passes) == 2 and all(name.startswith("native") for name in algorithm_names(fast))


@needs_native
@torch.no_grad()
def test_alike_layers_are_timed_once(finds):
    clock = finds("native direct")
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), tune=True)
    fast.warmup([(64, 64)])
    assert clock.timed.count("native direct") < algorithm_names(fast).count("native direct")


@needs_native
@needs_onednn
@torch.no_grad()
def test_each_number_of_threads_has_its_own_choice(finds, cache):
    model = build(CONFIGS["no_lateral"])
    finds("onednn", "torch")
    fast = shelfkern.accelerate(model, tune=True)
    x = images(1, 64, 64)
    fast(x)
    torch.set_num_threads(2)  # the fixture of all tests sets it back
    finds("native")
    assert_as_exact_as_eager(fast, model, [x], torch.float32)
    assert all(name.startswith("native") for name in algorithm_names(fast))
    torch.set_num_threads(1)
    assert set(algorithm_names(fast)) == {"onednn", "torch"}
    assert_as_exact_as_eager(fast, model, [x], torch.float32)
    threads = [json.loads(file.read_text())["environment"]["threads"] for file in cache.glob("*.json")]
    assert sorted(threads) == ["1", "2"]


@torch.no_grad()
def test_real_tuning_gives_a_right_network(cache):
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model, tune=1.0)
    fast.warmup([(64, 96)], outputs=["scores"])
    assert_as_exact_as_eager(fast, model, [images(1, 64, 96)], torch.float32)
    assert native.why_not or list(cache.glob("*.json"))


def test_seconds_hold_for_all_numbers_of_threads_together():
    tuners = Tuners(5)
    first = tuners.of(1)
    assert first.seconds == 5 and isinstance(first.clock, CpuClock)
    first.spent = 3.0
    assert tuners.of(2).seconds == 2 and tuners.of(1) is first
    first.spent = 60.0
    assert tuners.of(3).seconds == 0
    assert Tuners(False).of(1).clock is None and Tuners(True).of(1).seconds == 60


@needs_native
@torch.no_grad()
def test_losers_leave_no_weights_behind(finds):
    model = build(CONFIGS["no_lateral"])
    finds("native direct")
    fast = shelfkern.accelerate(model, tune=True)
    fast(images(1, 64, 64))
    forms = {form for packed in fast._program()._packed for form in packed._made}
    assert forms == {"direct"}
    # Describing a size packs nothing.
    fast.plan.describe(1, 128, 128)
    assert forms == {form for packed in fast._program()._packed for form in packed._made}


@needs_native
@torch.no_grad()
def test_while_layers_are_timed_weights_of_one_are_packed(finds, monkeypatch):
    alive, counts = weakref.WeakSet(), []

    class Noted(Packed):
        def __init__(self):
            super().__init__()
            alive.add(self)

    clock = finds("native direct")
    measure = clock.measure

    def noted(calls, cold):
        counts.append((cold, sum(bool(packed._made) for packed in alive)))
        return measure(calls, cold)

    clock.measure = noted
    monkeypatch.setattr(choice, "Packed", Noted)
    shelfkern.accelerate(build(CONFIGS["no_lateral"]), tune=True)(images(1, 64, 64))
    # A layer after the other, and none when whole passes are timed.
    assert set(counts) == {(True, 0), (True, 1), (False, 0)} and len(counts) > 10


@needs_native
@torch.no_grad()
def test_passes_that_are_timed_share_one_arena(finds, monkeypatch):
    clock, arenas = finds("onednn"), []
    measure, empty = clock.measure, native.empty
    passes = []

    def noted(calls, cold):
        if not cold:
            passes.append(len(calls))
        return measure(calls, cold)

    def counted(shape, dtype, pooled=True):
        if dtype is torch.uint8:
            arenas.append(shape)
        return empty(shape, dtype, pooled)

    clock.measure = noted
    monkeypatch.setattr(native, "empty", counted)
    shelfkern.accelerate(build(CONFIGS["no_lateral"]), tune=True)(images(1, 64, 64))
    # Theirs, and that of the pass that was chosen.
    assert passes == [2] and len(arenas) == 2


@needs_native
@needs_onednn
@pytest.mark.parametrize(("gain", "passes"), [(1.05, 1), (1.01, 0)])
@torch.no_grad()
def test_results_outside_the_arena_must_promise_to_be_worth_it(gain, passes, finds, monkeypatch):
    clock, timed = finds("onednn"), []
    monkeypatch.setattr(timing, "TIE", 1.0)
    monkeypatch.setattr(clock, "_place", lambda name: 1.0 if name.startswith(("onednn", "torch")) else gain)
    monkeypatch.setattr(clock, "_pass", lambda name: timed.append(name) or 1.0)
    fast = shelfkern.accelerate(build(CONFIGS["no_lateral"]), tune=True)
    fast(images(1, 64, 64))
    assert len(timed) == 2 * passes
    assert ("onednn" in algorithm_names(fast)) == bool(passes)


@needs_native
def test_accelerating_packs_and_copies_nothing():
    model = build(CONFIGS["attention"])
    fast = shelfkern.accelerate(model)
    assert not any(packed._made for packed in fast._program()._packed)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    filters = [t for step in fast.plan.steps for t in step.weights() if t.ndim == 4]
    assert filters and all(t.data_ptr() in own for t in filters)


@torch.no_grad()
def test_tuning_uses_up_no_random_numbers(finds):
    finds("native")
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), tune=True)
    state = torch.get_rng_state()
    fast(images(1, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)


@needs_native
@torch.no_grad()
def test_new_weights_are_not_tuned_again(finds):
    model, clock = build(CONFIGS["attention"]), finds("onednn", "torch", "native")
    fast = shelfkern.accelerate(model, tune=True)
    fast(images(1, 64, 64))
    count = len(clock.timed)
    model.head.classify.weight.mul_(2)
    assert_as_exact_as_eager(fast, model, [images(1, 64, 64)], torch.float32)
    assert len(clock.timed) == count


@torch.no_grad()
def test_calls_from_many_threads_while_it_tunes(finds):
    model, clock = build(CONFIGS["attention"]), finds("native winograd", "native")
    plain = shelfkern.accelerate(model, backend="native" if native.why_not is None else "library")
    fast = shelfkern.accelerate(model, backend=plain.backend, tune=True)
    inputs = [images(1, 64, 32 * (1 + i)) for i in range(3)]
    expected = [plain(x).clone() for x in inputs]
    tolerance = 1e-4 * expected[0].std().item()
    wrong = []

    def work(offset):
        time.sleep(0.01 * offset)
        for i in range(6):
            x = inputs[(i + offset) % 3]
            if not torch.allclose(fast(x), expected[(i + offset) % 3], rtol=0, atol=tolerance):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong and (clock.timed or native.why_not)
