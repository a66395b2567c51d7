"""Result pages: sections that say how they were made, each in place of the one of its title."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

__all__ = ["how", "put"]


def how(script: str) -> str:
    """The command, where it ran, and what else ran there."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "numpy"))
    return (
        f"`{' '.join([script, *sys.argv[1:]])}`, at {_commit()}; {versions}, Python {platform.python_version()}; "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before it began."
    )


def put(page: Path, section: str, heading: str) -> None:
    """A section on a page, which has this heading if it is new."""
    title, _, _ = section.partition("\n")
    text = page.read_text() if page.exists() else f"# {heading}\n"
    kept = ["## " + one.strip() + "\n" for one in text.split("\n## ")[1:]]
    at = next((i for i, one in enumerate(kept) if one.partition("\n")[0] == title), len(kept))
    kept[at : at + 1] = [section]
    page.write_text("\n".join([text.partition("\n## ")[0].strip() + "\n", *kept]))


def _commit() -> str:
    """With a plus where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return (head or "an unknown commit") + ("+" if dirty else "")
