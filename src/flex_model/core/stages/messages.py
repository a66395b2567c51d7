"""``Messages``: what editing functions left in ``save_ctx`` travels from stage to stage with each microbatch.

Forward, a stage tells the next one all that was written since the step began; backward, it tells the one before what
is new. The messages go beside the schedule's own, over a gloo group, and only where hooks on several stages use it.
"""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist

from flex_model.core.save_ctx import Saved
from flex_model.layout.mesh import ModelMesh
from flex_model.trees import find_leaves

__all__ = ["Messages"]


class Messages:
    """The messages of one step. ``coordinates``: where along the stage axis each stage is; all of one step's tags fit
    ``microbatches``."""

    def __init__(self, mesh: ModelMesh, coordinates: list[int], microbatches: int) -> None:
        self._mesh, self._coordinates, self._microbatches = mesh, coordinates, microbatches
        self._group = mesh.channel()
        self._sent: list[tuple[Any, torch.Tensor]] = []  # buffers live until they are gone

    def _route(self, sender: int, receiver: int, microbatch: int) -> tuple[int, int] | None:
        """(coordinate of the other rank, tag) of a message; None where there is none to send."""
        if not (0 <= sender < len(self._coordinates) and 0 <= receiver < len(self._coordinates)):
            return None
        there, here = self._coordinates[sender], self._coordinates[receiver]
        if there == here:
            return None
        backward = int(receiver < sender)
        tag = 2 * (2 * (sender * self._microbatches + microbatch) + backward)
        return (here if there == self._mesh.stage else there), tag

    def send(self, saved: Saved, before: Saved, *, stage: int, to: int, microbatch: int) -> None:
        """Tell stage ``to`` what ``saved`` has that ``before`` had not."""
        route = self._route(stage, to, microbatch)
        if route is None:
            return
        peer, tag = route
        values: dict[str, object] = {}
        withheld = {n: reason for n, reason in saved.withheld.items() if n not in before.withheld}
        for name, value in saved.changed_since(before).items():
            reason = _reason(name, value, stage)
            if reason:
                withheld[name] = reason
            else:
                values[name] = value
        payload = _packed(values, withheld, stage) if values or withheld else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([payload.numel()])
        self._sent.append((dist.isend(size, group=self._group, group_dst=peer, tag=tag), size))
        if payload.numel():
            self._sent.append((dist.isend(payload, group=self._group, group_dst=peer, tag=tag + 1), payload))

    def receive(self, saved: Saved, *, stage: int, source: int, microbatch: int) -> None:
        """Add to ``saved`` what stage ``source`` has told."""
        route = self._route(source, stage, microbatch)
        if route is None:
            return
        peer, tag = route
        size = torch.zeros(1, dtype=torch.long)
        dist.recv(size, group=self._group, group_src=peer, tag=tag)
        if not int(size):
            return
        payload = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(payload, group=self._group, group_src=peer, tag=tag + 1)
        values, withheld = torch.load(io.BytesIO(payload.numpy().tobytes()), weights_only=False)
        saved.values.update(values)
        for name in values:
            saved.withheld.pop(name, None)
        for name in withheld:
            saved.values.pop(name, None)
        saved.withheld.update(withheld)

    def wait(self) -> None:
        """All messages of the step have left."""
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()


def _reason(name: str, value: object, stage: int) -> str:
    """Why a value stays where it is."""
    if any(leaf.tensor.requires_grad for leaf in find_leaves(value)):
        return (
            f"it was written on stage {stage} with a graph, which does not cross stages; "
            f"write save_ctx.{name} = x.detach() there."
        )
    return ""


def _packed(values: dict[str, object], withheld: dict[str, str], stage: int) -> torch.Tensor:
    file = io.BytesIO()
    try:
        torch.save((values, withheld), file)
    except Exception:  # find which of them cannot be pickled
        kept = {}
        for name, value in values.items():
            try:
                torch.save(value, io.BytesIO())
                kept[name] = value
            except Exception as error:
                withheld[name] = f"its value on stage {stage} cannot be sent ({type(error).__name__}: {error})"
        file = io.BytesIO()
        torch.save((kept, withheld), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
