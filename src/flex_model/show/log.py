"""``Log``: what a run does, written by each rank for whoever looks on (``flex-model watch``): a line a forward.

No rank talks to another for it. Of a value that is sharded each rank writes the squares of what it holds, and how much
of that is its own; the reader adds them up.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial

from flex_model.components.place import Place
from flex_model.core.asked import asked
from flex_model.core.block import hooks_on
from flex_model.core.bound import Bound
from flex_model.core.hook_function import HookFunction
from flex_model.core.naming.globs import Pattern
from flex_model.core.register import bind
from flex_model.errors import FlexModelError
from flex_model.layout.layout import Layout, replicates

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.core.runtime import Runtime

__all__ = ["FOLDER", "logged"]

FOLDER = "log"  # in the folder of a run, beside what else is in there


class _Norms:
    """A sink of shards: of each site the squares of the numbers that are here, summed, and how many these are. Of what
    several ranks hold alike each counts its share."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.due = False
        self.squares: dict[str, list[Tensor]] = {}
        self.counts: dict[str, float] = {}
        self.refused: dict[str, str] = {}

    def meet(self, key: Any, local: Tensor, layout: Layout) -> None:
        if not self.due or not local.is_floating_point():
            return
        if any(isinstance(p, Partial) for p in layout.placements):
            self.refused[str(key)] = "ranks hold summands of it"
            return
        axes = zip(self._runtime.mesh.axes, layout.placements, strict=False)
        share = 1 / prod(axis.size for axis, placement in axes if replicates(placement))
        self.squares.setdefault(str(key), []).append(local.detach().float().square().sum() * share)
        self.counts[str(key)] = self.counts.get(str(key), 0.0) + share * local.numel()

    def part(self, key: Any, local: Tensor) -> None:
        self.refused[str(key)] = "its rows are tokens at experts"

    def put(self, key: Any, value: Any) -> None:
        """A whole value, which a pipeline's stages send one another: one of them tells."""
        if isinstance(value, Tensor) and self._runtime.whole.is_main:
            self.meet(key, value, Layout((), "whole"))

    def refuse(self, key: Any, error: Exception) -> None:
        self.refused[str(key)] = str(error)

    def empty(self, key: Any, reason: str) -> None:
        self.refused[str(key)] = reason

    def taken(self) -> tuple[list[str], Tensor | None, dict[str, float]]:
        """Names, their squares, and counts."""
        names, counts = list(self.squares), self.counts
        stacked = torch.stack([torch.stack(v).sum() for v in self.squares.values()]) if names else None
        self.squares, self.counts = {}, {}
        return names, stacked, counts


class _Log:
    """One rank's file. Writing must not disturb the run: if it fails, that is said once and nothing more is written."""

    def __init__(self, runtime: Runtime, path: Path, norms: _Norms, every: int) -> None:
        self._runtime, self._norms, self._every = runtime, norms, every
        self._calls = 0
        self._hooks: list[Any] = []
        self._running: list[Bound] | None = None  # hooks of the forward that began last
        self._waiting: tuple[dict[str, Any], list[str], Tensor | None, dict[str, float], Any] | None = None
        folder = path / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank-{runtime.whole.rank:05d}.jsonl").open("a", encoding="utf-8")
        self._write({"begin": time.time(), "rank": runtime.whole.rank, "every": every})

    def before(self, module: nn.Module, args: Any) -> None:
        if self._runtime.quiet:
            return
        self._leave()
        self._norms.due = self._calls % self._every == 0
        self._running = [b for b in self._runtime.bounds if b.sink is not self._norms]

    def _leave(self) -> None:
        """The forward before is over, with its backward if it had one: its values leave for the host; those before are
        there."""
        self._flush()
        bounds, self._running = self._running, None
        if bounds is None:
            return
        hooks = [[b.name, b.hook_type, b.enabled, b.edit is not None] for b in bounds]
        line: dict[str, Any] = {"call": self._calls, "time": time.time(), "fired": [b.fired for b in bounds]}
        if hooks != self._hooks:
            self._hooks = line["hooks"] = hooks
        self._calls += 1
        names, squares, counts = self._norms.taken()
        arrived = None
        if squares is not None and squares.is_cuda:
            squares = squares.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting = line, names, squares, counts, arrived

    def _flush(self) -> None:
        if self._waiting is None:
            return
        line, names, squares, counts, arrived = self._waiting
        self._waiting = None
        if arrived is not None:
            arrived.synchronize()
        if squares is not None:
            values = zip(names, squares.tolist(), strict=True)
            line["squares"] = {name: [value, counts[name]] for name, value in values}
        if self._norms.refused:
            line["refused"], self._norms.refused = self._norms.refused, {}
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            self._close()
            warnings.warn(f"{self._file.name} cannot be written ({error}); the run goes on without it.", stacklevel=2)

    def _close(self) -> None:
        with suppress(OSError):  # what was left in it
            self._file.close()

    def close(self) -> None:
        self._leave()
        self._flush()
        self._write({"end": time.time()})
        self._close()


@contextmanager
def logged(fm: FlexModel, path: str | Path, patterns: tuple[Pattern | Place, ...], every: int) -> Iterator[None]:
    """See ``FlexModel.log``."""
    if every < 1:
        raise FlexModelError(f"every={every}: expected a number of forwards from 1.", page="bad-argument")
    runtime = fm._runtime
    runtime.look()
    norms = _Norms(runtime)
    bounds: list[Bound] = []
    for one in asked(runtime.names, patterns, hook_type="forward", unpack_idx=0, select=None):
        hook = HookFunction(one.name, unpack_idx=one.unpack_idx)
        bounds.append(bind(runtime, hook, one.hook_type, one.key, norms, "shards", temporary=True))
    log = _Log(runtime, Path(path), norms, every)
    roots = list(runtime.names.places[""].values())
    handles = [r.register_forward_pre_hook(log.before) for r in roots]
    try:
        with hooks_on(runtime, bounds, [], {}, tell=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        log.close()
