"""Which steps may run at the same time, and which others each waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .plan import Plan


@dataclasses.dataclass(frozen=True)
class Order:
    """Steps assigned to streams. Within a stream, a step begins when the previous one has ended.

    Attributes:
        streams: for each step, the stream it runs in; 0 is the main one, which ends last.
        waits: for each step, the steps of other streams that must also have ended.
        before: for each step, a bit mask of all steps that have ended when it begins.
    """

    streams: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]

    def ended(self, first: int, step: int) -> bool:
        """Whether step `first` has always ended when `step` begins; after the last step, all have."""
        return step >= len(self.before) or bool(self.before[step] >> first & 1)


def in_sequence(plan: Plan) -> Order:
    """All steps in one stream."""
    return _order(plan, [0] * len(plan.steps))


def side_by_side(plan: Plan, microseconds: Sequence[float]) -> Order:
    """Two streams: the longest chain of steps in the main one, and steps with slack in the other.

    So shortcuts run beside the convolutions they bridge, and laterals beside the backbone.

    Args:
        plan: plan whose steps depend on each other through values alone.
        microseconds: time of each step.
    """
    slack = _slack(_needs(plan), microseconds)
    return _order(plan, [int(time > 1e-6) for time in slack])


def _slack(needs: Sequence[set[int]], microseconds: Sequence[float]) -> list[float]:
    """How much later each step could begin without delaying the end."""
    ends: list[float] = []
    for step, needed in enumerate(needs):
        ends.append(max((ends[other] for other in needed), default=0.0) + microseconds[step])
    latest = [ends[-1]] * len(needs)
    for step in reversed(range(len(needs))):
        for other in needs[step]:
            latest[other] = min(latest[other], latest[step] - microseconds[step])
    return [last - end for last, end in zip(latest, ends, strict=True)]


def _needs(plan: Plan) -> list[set[int]]:
    """For each step, the steps that write its inputs."""
    writer = {value: index for index, step in enumerate(plan.steps) for value in step.outputs}
    return [{writer[value] for value in step.inputs} for step in plan.steps]


def _order(plan: Plan, streams: Sequence[int]) -> Order:
    before: list[int] = []
    waits: list[tuple[int, ...]] = []
    last: dict[int, int] = {}
    for step, needed in enumerate(_needs(plan)):
        ended = 0
        if streams[step] in last:
            ended = before[last[streams[step]]] | 1 << last[streams[step]]
        missing = []
        # The latest first: it may already have waited for the others.
        for other in sorted(needed, reverse=True):
            if not ended >> other & 1:
                missing.append(other)
                ended |= before[other] | 1 << other
        before.append(ended)
        waits.append(tuple(missing))
        last[streams[step]] = step
    return Order(tuple(streams), tuple(waits), tuple(before))


def makespan(order: Order, microseconds: Sequence[float]) -> float:
    """Microseconds until the last step has ended, if concurrent steps did not slow each other down."""
    ends: list[float] = []
    last: dict[int, float] = {}
    for step, stream in enumerate(order.streams):
        begin = max([last.get(stream, 0.0), *(ends[other] for other in order.waits[step])])
        ends.append(begin + microseconds[step])
        last[stream] = ends[-1]
    return max(ends, default=0.0)
