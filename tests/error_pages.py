"""The pages of errors: their parts, and how their examples run.

A page has the headings Symptom, Cause, Example and Fix. The example raises the error with the symptom's message; the
fix goes on from there. Blocks marked ``python ranks=2`` run on both ranks of a world, the others on one process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from worlds import run_world

FOLDER = Path(__file__).parent.parent / "docs" / "errors"
SECTIONS = ["Symptom", "Cause", "Example", "Fix"]


@dataclass(frozen=True)
class Page:
    """One page, read from its file."""

    slug: str
    classes: tuple[str, ...]
    sections: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Page:
        text = path.read_text()
        head, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
        assert head.startswith(f"# {path.stem}\n"), f"{path.name} must begin with its own slug"
        sections = dict(zip(parts[::2], parts[1::2], strict=True))
        return cls(path.stem, tuple(re.findall(r"`(\w+)`", head)), sections)

    def code(self, section: str) -> str:
        return "\n".join(re.findall(r"^```python.*?\n(.*?)^```$", self.sections[section], re.MULTILINE | re.DOTALL))

    @property
    def symptom(self) -> str:
        found = re.search(r"^```text\n(.*?)\n```$", self.sections["Symptom"], re.MULTILINE | re.DOTALL)
        assert found is not None, f"{self.slug} shows no message"
        return found[1]

    @property
    def ranks(self) -> int:
        found = re.search(r"^```python ranks=(\d+)$", self.sections["Example"], re.MULTILINE)
        return int(found[1]) if found else 1

    def shows(self, message: str) -> bool:
        """Whether the symptom is this message; ``...`` stands for what differs from run to run."""
        pattern = ".*".join(re.escape(part) for part in self.symptom.split("..."))
        return re.fullmatch(pattern, message, re.DOTALL) is not None


def run(page: Page) -> list[tuple[str, str, str] | None]:
    """(class, page, message) of what the example raises on each rank, None where it raises nothing; then the fix."""
    if page.ranks == 1:
        return [_run(page)]
    return run_world(page.ranks, _run, page)


def _run(page: Page) -> tuple[str, str, str] | None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page.slug}
    told = None
    try:
        exec(compile(page.code("Example"), f"{page.slug}, example", "exec"), names)
    except Exception as error:  # another rank's own may be any
        told = type(error).__name__, getattr(error, "page", ""), str(error)
    exec(compile(page.code("Fix"), f"{page.slug}, fix", "exec"), names)
    return told
