"""The pages of documentation against the package: links, and the table of ops."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shelfkern import ops

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "shelfkern/weights/camvid.md"]
# Ops are named as their files.
OPS = sorted(path.stem for path in (ROOT / "shelfkern/ops").glob("*.py") if path.stem in ops.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_every_op_is_listed_with_its_kernels():
    page = (ROOT / "docs/ops.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line[:3] == "| `"
    ]
    kernels = {row[0].strip("`"): row[3] for row in rows}
    assert sorted(kernels) == OPS
    for name, backends in ops.KERNELS.items():
        assert kernels[name] == ", ".join(backends), name
