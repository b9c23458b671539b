"""README's measured parts: each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``, made from JSON."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def with_part(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of the part ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end} to put the text between")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def fill(name: str, text: str) -> None:
    README.write_text(with_part(README.read_text(), name, text))
