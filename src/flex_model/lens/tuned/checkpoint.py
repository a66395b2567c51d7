"""A run of ``TunedLens.fit`` on disk, to go on from.

Each translator has a file, whoever trains it, so that any number of ranks can go on. ``run.json`` names the folder of
the last complete step, and is written when that is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model import FlexModelError
from flex_model.lens.tuned.ranks import Ranks

__all__ = ["Checkpoint"]


class Checkpoint:
    """In ``folder``, of a run with these settings. All ranks call every method but ``state``."""

    def __init__(self, folder: Path, ranks: Ranks, settings: Mapping[str, Any]) -> None:
        self.folder, self.ranks, self.settings = folder, ranks, dict(settings)

    def write(self, loss: Tensor, states: Mapping[int, Any]) -> None:
        """``loss`` (steps so far, translators); this rank's ``states`` by translator."""
        here = self.folder / f"step-{len(loss)}"
        here.mkdir(parents=True, exist_ok=True)
        for index, state in states.items():
            torch.save(state, here / f"{index}.pt")
        self.ranks.gather(torch.tensor([len(loss)]), "a checkpoint of a tuned lens")  # all files are there
        if self.ranks.index == 0:
            run = {"done": len(loss), "settings": self.settings, "loss": loss.tolist()}
            (self.folder / "run.json.new").write_text(json.dumps(run))
            os.replace(self.folder / "run.json.new", self.folder / "run.json")
            for old in (p for p in self.folder.glob("step-*") if p != here):
                shutil.rmtree(old)

    def losses(self) -> Tensor | None:
        """What ``write`` was given last; None where it was never called. Raises where the run is another one."""
        file = self.folder / "run.json"
        run: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"done": 0}
        found = [int(d) for d in self.ranks.gather(torch.tensor([run["done"]]), "the checkpoint of a tuned lens")]
        if len(set(found)) > 1:
            raise FlexModelError(
                f"ranks found checkpoints after {found} steps in {str(self.folder)!r}; expected one folder that all of "
                f"them see.",
                page="ranks-differ",
            )
        if not run["done"]:
            return None
        theirs = run["settings"]
        other = [f"{n}={theirs.get(n)!r}" for n, value in self.settings.items() if theirs.get(n) != value]
        if other:
            raise FlexModelError(
                f"the checkpoint in {str(self.folder)!r} is of a run with {', '.join(other)}; give the same, or "
                f"another folder.",
                page="bad-argument",
            )
        return torch.tensor(run["loss"], dtype=torch.float64)

    def state(self, index: int, done: int, device: torch.device) -> Any:
        return torch.load(self.folder / f"step-{done}" / f"{index}.pt", weights_only=True, map_location=device)
