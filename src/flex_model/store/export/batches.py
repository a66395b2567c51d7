"""``Batches`` and ``HookBatches``: what trainers of SAEs call ``next`` on, dealt from a store."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from flex_model.errors import StoreError
from flex_model.store.dataset import RowDataset
from flex_model.store.dtypes import dtype_name
from flex_model.store.export.selection import torch_dtype

__all__ = ["Batches", "HookBatches"]

T = TypeVar("T")


class _Endless(Iterator[T], Generic[T]):
    """Batches of one epoch after another, and where they are."""

    def __init__(self, data: RowDataset, *, dtype: Any, epochs: int | None, workers: int) -> None:
        if not len(data):
            raise StoreError(
                "the data set has no batch: its batch_size is larger than the rows of a rank; give a smaller one, or "
                "drop_last=False.",
                page="bad-argument",
            )
        self._data, self._dtype, self._epochs = data, torch_dtype(dtype_name(dtype)), epochs
        self._loader = DataLoader(data, batch_size=None, num_workers=workers)
        self.load_state_dict(data.state_dict())

    def __next__(self) -> T:
        return self._of(next(self._stream))

    @abstractmethod
    def _of(self, batch: dict[str, Tensor]) -> T: ...

    def _site(self, batch: dict[str, Tensor], name: str) -> Tensor:
        """``(batch, d)``."""
        return batch[name].flatten(1).to(self._dtype)

    def state_dict(self) -> dict[str, int]:
        """Where it is: a few numbers, for a checkpoint of the trainer. The buffer is read again."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next batch is the one after those."""
        self._data.load_state_dict(state)
        self._state = dict(state)
        self._stream = _rounds(self._data, self._loader, self._state, self._epochs)


def _rounds(data: RowDataset, loader: Any, state: dict[str, int], epochs: int | None) -> Iterator[dict[str, Tensor]]:
    """Knows nothing of who holds it: a loader in a cycle of references takes seconds to end its workers."""
    while epochs is None or state["epoch"] < epochs:
        data.load_state_dict(state)
        for batch in loader:
            state["batches"] += 1
            yield batch
        state.update(epoch=state["epoch"] + 1, batches=0)


class Batches(_Endless[Tensor]):
    """``(batch, d)`` of the one site of a RowDataset: SAELens's ``data_provider``, and good for any loop.

    >>> data = RowDataset(store, sites=["model.layers.3"], batch_size=4096)                  # doctest: +SKIP
    >>> SAETrainer(cfg, sae, data_provider=Batches(data)).fit()                              # doctest: +SKIP

    A row of several dims is flattened. It goes on from where the data set is, and ends after ``epochs``, counted from
    the data set's first; SAELens asks for ``total_training_samples`` whatever there are, so that it needs None: never.
    ``dtype`` should be that of the SAE. ``workers`` read ahead. Memory is the data set's buffer, and another for each
    worker. Raises StoreError where the data set has several sites, or not one batch.
    """

    def __init__(
        self, data: RowDataset, *, dtype: Any = "float32", epochs: int | None = None, workers: int = 0
    ) -> None:
        super().__init__(data, dtype=dtype, epochs=epochs, workers=workers)
        if len(data.names) != 1:
            raise StoreError(
                f"expected a data set of one site, got {data.names}; give RowDataset one, or take HookBatches.",
                page="bad-argument",
            )

    def _of(self, batch: dict[str, Tensor]) -> Tensor:
        return self._site(batch, self._data.names[0])


class HookBatches(_Endless[dict[str, Tensor]]):
    """``{hook name: (batch, d)}`` of one token a row: SAELens's ``MultiSAETrainer``, and crosscoders.

    >>> data = RowDataset(store, sites=["model.layers.3", "model.layers.7"], batch_size=4096)   # doctest: +SKIP
    >>> MultiSAETrainer(cfg, saes, hook_names, data_provider=HookBatches(data))                 # doctest: +SKIP

    ``hook_names``: by site or column; others keep their names. The rest is as for ``Batches``.
    """

    def __init__(
        self,
        data: RowDataset,
        *,
        hook_names: Mapping[str, str] | None = None,
        dtype: Any = "float32",
        epochs: int | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(data, dtype=dtype, epochs=epochs, workers=workers)
        given = dict(hook_names or {})
        self._hooks = {name: given.get(name, name) for name in data.names}
        if given.keys() - set(data.names) or len(set(self._hooks.values())) < len(self._hooks):
            raise StoreError(
                f"expected hook_names for some of {data.names}, each of its own, got {given}.", page="bad-argument"
            )

    def _of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {hook: self._site(batch, name) for name, hook in self._hooks.items()}
