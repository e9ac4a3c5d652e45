"""The algorithms of a whole plan at one size: the fastest of each layer, and then the fastest pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

from ... import native
from .. import plan as p
from ..problem import Packed, Size, key_of
from ..tuning import Call, Candidate, Tuner
from .algorithm import Algorithm, Context
from .algorithms import algorithms
from .timing import TIE, candidate

# Names of the algorithms of all steps.
Names = tuple[str, ...]
# What results outside the arena must promise, as a part of the time, to be tried.
PROMISE = 0.98
# What prepares forward passes to be timed, of the algorithms of each.
Passes = Callable[[Sequence[Names]], Sequence[Callable[[], Call]]]


def choose(plan: p.Plan, size: Size, context: Context, tuner: Tuner, passes: Passes) -> Names:
    """Names of the algorithms to take for n images seen as h x w.

    Layers are timed one by one, with nothing in the caches. That does not show what a result outside the
    arena costs in a network, fresh pages and activations pushed out of the caches: so passes are timed too,
    of the fastest algorithms that write into the arena, of the fastest of all if they promise to be worth it,
    and of those that were predicted.

    Args:
        passes: forward passes of named algorithms, on weights and memory that go with them.
    """
    layers = [_Layer(step, size, context, tuner) for step in plan.steps]
    predicted = tuple(layer.names[0] for layer in layers)
    if not size[0]:
        return predicted
    fastest = tuple(layer.fastest() for layer in layers)
    if not any(layer.measured for layer in layers):
        return fastest
    winner = in_arena = tuple(layer.fastest_in_arena() for layer in layers)
    # Two at a time, for each takes memory for its weights.
    if _sum(layers, fastest) < PROMISE * _sum(layers, winner):
        winner = _faster((winner, fastest), layers, tuner, passes)
    if predicted not in (winner, in_arena):
        winner = _faster((winner, predicted), layers, tuner, passes)
    return winner


def _faster(ways: Sequence[Names], layers: Sequence[_Layer], tuner: Tuner, passes: Passes) -> Names:
    by_digest = {_digest(names): names for names in ways}
    candidates = [
        Candidate(digest, _sum(layers, names), prepare)
        for (digest, names), prepare in zip(by_digest.items(), passes(ways), strict=True)
    ]
    key = f"forward {_digest([*(layer.key for layer in layers), *sorted(by_digest)])}"
    return by_digest[tuner.choose(key, candidates)]


class _Layer:
    """A step at one size: its algorithms, and what is known of them."""

    def __init__(self, step: p.Step, size: Size, context: Context, tuner: Tuner) -> None:
        self._problem = step, size, context
        self._found = algorithms(step, size, context, Packed())
        self._tuner = tuner
        self.key = key_of(step, size, context.dtype, extents=context.extents)
        self.names = [algorithm.name for algorithm in self._found]

    @property
    def measured(self) -> Mapping[str, float]:
        """Microseconds by name of what was timed."""
        return self._tuner.measured(self.key, cold=True)

    def fastest(self) -> str:
        """The tuner's choice, which may time them."""
        if len(self._found) == 1:
            return self.names[0]
        step, size, context = self._problem
        # With packed weights of their own, which go when the layer was timed.
        found = algorithms(step, size, context, Packed())
        candidates = [candidate(step, algorithm, size, context) for algorithm in found]
        spent = self._tuner.spent
        winner = self._tuner.choose(self.key, candidates, cold=True)
        if self._tuner.spent > spent:
            del found, candidates
            native.give_back()
        return winner

    def fastest_in_arena(self) -> str:
        """The best measured of those that write into the arena; of all, where none does."""
        names = [algorithm.name for algorithm in self._found if algorithm.in_arena] or self.names
        times = {name: self.measured[name] for name in names if name in self.measured}
        limit = TIE * min(times.values(), default=math.inf)
        return next((name for name in names if times.get(name, math.inf) <= limit), names[0])

    def microseconds(self, name: str) -> float:
        """What an algorithm takes: measured, or predicted."""
        predicted = next(a.microseconds for a in self._found if a.name == name)
        return self.measured.get(name, predicted)


def _sum(layers: Sequence[_Layer], names: Names) -> float:
    return sum(layer.microseconds(name) for layer, name in zip(layers, names, strict=True))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def named(found: Sequence[Algorithm], name: str) -> Algorithm:
    """The algorithm of a name."""
    return next(algorithm for algorithm in found if algorithm.name == name)
