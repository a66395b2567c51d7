"""Environments of other packages, beside this project's own, which they are no part of.

    python benchmarks/environments.py              make those that tests need; nothing is done to one that is there

``lines.py`` makes its own as it needs them.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PEERS = Path(__file__).parent / ".peers"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

TESTED = {
    "saes": [line for line in (Path(__file__).parent / "saes.txt").read_text().splitlines() if not line.startswith("#")]
}


def python_of(folder: str) -> Path:
    """The interpreter of an environment, made or not."""
    return PEERS / folder / "bin" / "python"


def is_made(folder: str, needs: list[str]) -> bool:
    """Of just this."""
    made = PEERS / folder / "made-of.txt"
    return made.exists() and made.read_text() == "\n".join(needs)


def make(folder: str, needs: list[str], *, constrained: bool = False) -> str:
    """The interpreter of an environment, which is made if it is not there. Raises CalledProcessError."""
    python = python_of(folder)
    if not is_made(folder, needs):
        venv.create(PEERS / folder, with_pip=True, clear=True)
        pins = ["-c", str(CONSTRAINTS)] if constrained else []
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *pins, *needs], check=True, capture_output=True, text=True
        )
        (PEERS / folder / "made-of.txt").write_text("\n".join(needs))
    return str(python)


def main() -> None:
    for folder, needs in TESTED.items():
        try:
            print(f"{folder}: {make(folder, needs, constrained=True)}")
        except subprocess.CalledProcessError as error:
            sys.exit(f"{folder} cannot be made:\n{error.stderr}")


if __name__ == "__main__":
    main()
