"""``RowDataset``: batches of rows for training a probe, an SAE or a lens, shuffled over the whole store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flex_model.errors import StoreError
from flex_model.store.reader import ActivationStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RowDataset"]


class RowDataset(IterableDataset[dict[str, Tensor]]):
    """Batches ``{name: (batch_size, ...)}`` of the given sites and columns, and ``"rows"``: which rows these are.

    >>> data = RowDataset(store, sites=["mlp"], batch_size=4096)                        # doctest: +SKIP
    >>> for batch in torch.utils.data.DataLoader(data, batch_size=None, num_workers=2): # doctest: +SKIP
    ...     train(batch["mlp"])

    Blocks of ``block`` rows are put in an order drawn from the seed and the epoch, and the rows of each ``buffer``
    blocks are mixed; only these are in memory. ``ranks`` data-parallel ranks get equally many rows, no row twice;
    what is left out in an epoch is fewer rows than there are ranks, and with ``drop_last`` those after the last full
    batch of each rank.

    The batches of a rank do not depend on the number of DataLoader workers, so that (epoch, batches taken) is all
    there is to resume: ``state_dict``. Without workers an epoch ends by setting the next; with workers, call
    ``set_epoch``, as for torch's DistributedSampler. The store is read as of when the dataset was made.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size: int,
        sites: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        block: int = 256,
        buffer: int = 64,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        drop_last: bool = True,
    ) -> None:
        if min(batch_size, block, buffer, ranks) < 1 or not 0 <= rank < ranks:
            raise StoreError(
                f"expected sizes from 1 and a rank below ranks, got batch_size={batch_size}, block={block}, "
                f"buffer={buffer}, rank={rank}, ranks={ranks}.",
                page="bad-argument",
            )
        self.names = [*(store.sites if sites is None else sites), *columns]
        self._held = {name: store[name] for name in self.names}
        self._rows, self._drop_last = len(store), drop_last
        self._batch_size, self._block, self._buffer = batch_size, block, buffer
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._place = torch.zeros(
            2, dtype=torch.int64
        ).share_memory_()  # epoch, batches taken: workers that stay see it

    @property
    def epoch(self) -> int:
        return int(self._place[0])

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, at its first batch."""
        self._place[:] = torch.tensor([epoch, 0])

    def __len__(self) -> int:
        """Batches of an epoch, on each rank."""
        mine = self._rows // self._ranks
        return mine // self._batch_size if self._drop_last else -(-mine // self._batch_size)

    def state_dict(self, *, batches: int | None = None) -> dict[str, int]:
        """Where the loop is. ``batches``: how many it took of this epoch; give it with workers, which read ahead."""
        taken = int(self._place[1]) if batches is None else batches
        return {"epoch": self.epoch, "batches": taken, "seed": self._seed, "rows": self._rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on after those batches."""
        if (state["seed"], state["rows"]) != (self._seed, self._rows):
            raise StoreError(
                f"expected the state of seed {self._seed} and {self._rows} rows, got seed {state['seed']} and "
                f"{state['rows']} rows; the order would be another.",
                page="bad-argument",
            )
        self._place[:] = torch.tensor([state["epoch"], state["batches"]])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, taken = self._place.tolist()
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for batch in self._batches(epoch, range(taken + number, len(self), workers)):
            if worker is None:
                self._place[:] = torch.tensor([epoch, taken := taken + 1])
            yield batch
        if worker is None:
            self.set_epoch(epoch + 1)

    def _batches(self, epoch: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        """The rows of a pool that these batches need are read at once, in order."""
        import numpy as np

        order = _Order(self, epoch)
        size, pool_rows = self._batch_size, self._block * self._buffer
        mine = self._rows // self._ranks
        pool, rows, held = -1, np.empty(0, np.int64), _Held(self, np.empty(0, np.int64))
        for number in numbers:
            pieces = []
            at, stop = number * size, min(mine, (number + 1) * size)
            while at < stop:  # a batch may reach into the next pools
                if at // pool_rows != pool:
                    pool = at // pool_rows
                    rows = order.pool(pool)
                    held = _Held(self, rows[_wanted(len(rows), pool * pool_rows, size, numbers)])
                end = min(stop, pool * pool_rows + len(rows))
                pieces.append(held.take(rows[at - pool * pool_rows : end - pool * pool_rows]))
                at = end
            yield {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _wanted(count: int, start: int, size: int, numbers: range) -> NDArray[np.bool_]:
    """Which rows of a pool, whose first is row ``start`` of the epoch, belong to these batches."""
    import numpy as np

    batch = (np.arange(count) + start) // size
    wanted: NDArray[np.bool_] = (batch >= numbers.start) & ((batch - numbers.start) % numbers.step == 0)
    return wanted & (batch < numbers.stop)


class _Order:
    """A rank's rows in the order of an epoch, pool by pool: a function of the seed, so that there is no state."""

    def __init__(self, data: RowDataset, epoch: int) -> None:
        import numpy as np

        self._data, self._epoch = data, epoch
        blocks = -(-data._rows // data._block)
        self._blocks = np.random.default_rng([data._seed, epoch]).permutation(blocks)
        sizes = np.full(blocks, data._block)
        sizes[self._blocks == blocks - 1] -= blocks * data._block - data._rows  # the store's last block
        self._starts = np.cumsum(sizes) - sizes

    def pool(self, number: int) -> NDArray[np.int64]:
        """Rows of the store, mixed."""
        import numpy as np

        data = self._data
        mine, size = data._rows // data._ranks, data._block * data._buffer
        places = np.arange(number * size, min(mine, (number + 1) * size)) + data._rank * mine
        block = np.searchsorted(self._starts, places, side="right") - 1
        rows = self._blocks[block] * data._block + places - self._starts[block]
        mixed: NDArray[np.int64] = np.random.default_rng([data._seed, self._epoch, data._rank, number]).permutation(
            rows
        )
        return mixed


class _Held:
    """Rows of a pool in memory."""

    def __init__(self, data: RowDataset, rows: NDArray[np.int64]) -> None:
        import numpy as np

        self._sorted = np.sort(rows)
        self._values = {name: held.torch(self._sorted) for name, held in data._held.items()}

    def take(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        import numpy as np

        at = torch.from_numpy(np.searchsorted(self._sorted, rows))
        return {**{n: v.index_select(0, at) for n, v in self._values.items()}, "rows": torch.from_numpy(rows)}
