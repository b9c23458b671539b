"""Measured parts of README and docs: each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``, made from JSON."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
#: The page that each part stands on.
PAGES = {
    "headline": ROOT / "README.md",
    "figures": ROOT / "docs" / "memory-and-speed.md",
    "processors": ROOT / "docs" / "memory-and-speed.md",
    "demo": ROOT / "docs" / "demonstration.md",
    "demo-choice": ROOT / "docs" / "demonstration.md",
    "demo-real": ROOT / "docs" / "demonstration.md",
    "demo-sweep": ROOT / "docs" / "demonstration.md",
    "demo-real-sweep": ROOT / "docs" / "demonstration.md",
    "shards": ROOT / "docs" / "distributed.md",
    "integrations": ROOT / "docs" / "trainers.md",
    "sampled-kl": ROOT / "docs" / "on-policy-and-drafts.md",
    "bias": ROOT / "docs" / "sparse-targets.md",
    "tolerance": ROOT / "docs" / "tolerance.md",
    "cache": ROOT / "docs" / "teacher-cache.md",
    "instructions": ROOT / "docs" / "gpu.md",
}


def with_part(page: str, name: str, text: str) -> str:
    """``page`` with ``text``, which may be empty, between the markers of the part ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end} to put the text between")
    before, rest = page.split(begin, 1)
    inner = f"{text}\n" if text else ""
    return f"{before}{begin}\n{inner}{end}{rest.split(end, 1)[1]}"


def fill(name: str, text: str) -> None:
    page = PAGES[name]
    page.write_text(with_part(page.read_text(), name, text))


def is_filled(name: str, text: str) -> bool:
    page = PAGES[name].read_text()
    return with_part(page, name, text) == page
