"""``stream``: activations as shuffled batches while the model runs, for training on more than a disk would hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flex_model.errors import HarvestError
from flex_model.harvest.loader import Loader
from flex_model.harvest.run import Run

__all__ = ["stream"]

Rows = dict[str, Tensor]


def stream(run: Run, loader: Loader, *, batch_size: int, buffer: int, seed: int, drop_last: bool) -> Iterator[Rows]:
    """See ``FlexModel.stream``."""
    if batch_size < 1 or buffer < batch_size:
        raise HarvestError(
            f"expected batch_size from 1 and a buffer of as many rows, got {batch_size} and {buffer}.",
            page="bad-argument",
        )
    return _mixed(_rows(run, loader), batch_size=batch_size, buffer=buffer, seed=seed, drop_last=drop_last)


def _rows(run: Run, loader: Loader) -> Iterator[Rows]:
    """The rows of each batch, in order, on every rank. Hooks are on while the model runs, and not in between."""
    for number, given in enumerate(loader.batches(0)):
        whole, mine = run.batch(given, loader.contexts)
        loader.took(len(whole.keep))
        with run.hooked():
            run.step(number, mine, of=whole.as_run(run.dealers))
        rows = run.taking.end()
        run.meet()
        rows.ready()
        columns = {name: column[rows.batch.keep] for name, column in rows.batch.columns.items()}
        shapes = {name: site.shape for name, site in run.sites.items()}
        values = {name: pieces[0].rows.unflatten(1, shapes[name]) for name, pieces in rows.values.items()}
        yield {**values, **columns}


def _mixed(given: Iterator[Rows], *, batch_size: int, buffer: int, seed: int, drop_last: bool) -> Iterator[Rows]:
    """Batches drawn from a buffer, which is half used up before more comes in."""
    draw = torch.Generator().manual_seed(seed)
    held: list[Rows] = []
    count = 0
    for rows in given:
        held.append(rows)
        count += _count(rows)
        if count >= buffer:
            whole, held = _shuffled(held, draw), []
            keep = min(buffer // 2, count - batch_size)
            while count - batch_size >= keep:
                batch, whole = _split(whole, batch_size)
                count -= batch_size
                yield batch
            held.append(whole)
    whole = _shuffled(held, draw) if count else {}
    while count >= batch_size or (count and not drop_last):
        batch, whole = _split(whole, batch_size)
        count -= _count(batch)
        yield batch


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _shuffled(held: list[Rows], draw: torch.Generator) -> Rows:
    whole = {name: torch.cat([rows[name] for rows in held]) for name in held[0]}
    order = torch.randperm(_count(whole), generator=draw)
    return {name: value.index_select(0, order.to(value.device)) for name, value in whole.items()}


def _split(rows: Rows, size: int) -> tuple[Rows, Rows]:
    """The first rows as a copy, so that a batch does not hold the whole buffer, and the rest."""
    return {n: v[:size].clone() for n, v in rows.items()}, {n: v[size:] for n, v in rows.items()}
