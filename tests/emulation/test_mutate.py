from __future__ import annotations

import mutate
import pytest

OPS = sorted(path.stem for path in mutate.KERNELS.glob("*.cu"))

KERNEL = """
DEVICE bool inside(int y, int h) { return y >= 0 && y < h; }

KERNEL(32)
toy_kernel(const Args args) {
    const bool in = inside(y, args.h);
    wait_for_previous();
    cp_async_16(a, b, in && c < args.c);
    if (pixel >= args.pixels || !in) return;
    out.store(min(i, n - 1), in ? x : 0);
    if constexpr (kTwo) barrier();
}

void launch_toy() { if (rows < 0) barrier(); }
"""


def test_every_barrier_wait_and_mask_is_taken_out_once():
    found = [fault.removed for fault in mutate.faults("toy", KERNEL)]
    assert [line[line.index("[-") :] for line in found] == [
        "[-y >= 0 -]{ true }&& y < h; }",
        "[- y < h-]{ true }; }",
        "[-inside(y, args.h)-]{ true };",
        "[-wait_for_previous();-]{;}",
        "[- in -]{ true }&& c < args.c);",
        "[- c < args.c-]{ true });",
        "[-pixel >= args.pixels -]{ false }|| !in) return;",
        "[- !in-]{ false }) return;",
        "[-min(i, n - 1)-]{(i)}, in ? x : 0);",
        "[- in-]{true} ? x : 0);",
        "[-if constexpr (kTwo) barrier();-]{;}",
    ]


def test_a_fault_changes_one_place():
    for fault in mutate.faults("toy", KERNEL):
        changed = fault.mutated()
        assert (
            changed != KERNEL and changed.splitlines()[fault.line - 1] != KERNEL.splitlines()[fault.line - 1]
        )
        assert len(changed.splitlines()) == len(KERNEL.splitlines())


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_faults_to_plant(op):
    source = (mutate.KERNELS / f"{op}.cu").read_text()
    found = mutate.faults(op, source)
    # All that orders memory is in device code.
    ordering = [fault for fault in found if fault.replacement == ";"]
    assert len(ordering) == len(mutate.ORDERING.findall(source)) > 0
    assert len(found) > len(ordering)


def test_every_excuse_is_for_a_fault_that_there_is():
    there = {
        f"{op}: {fault.removed}"
        for op in OPS
        for fault in mutate.faults(op, (mutate.KERNELS / f"{op}.cu").read_text())
    }
    assert set(mutate.EQUIVALENT) <= there
