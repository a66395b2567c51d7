"""``Replay``: a data set and a model for trainers that run a model, whose modules give what a store holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from flex_model.errors import StoreError
from flex_model.store.dataset import RowDataset
from flex_model.store.dtypes import dtype_name
from flex_model.store.export.selection import torch_dtype

__all__ = ["Replay", "ReplayData", "ReplayModel"]


class Replay:
    """The two arguments of EleutherAI's ``sparsify.Trainer`` that stand for a text and a model.

    >>> data = RowDataset(store, sites=["model.layers.3"], batch_size=4096)                  # doctest: +SKIP
    >>> replay = Replay(data, hookpoints={"model.layers.3": "layers.3"})                     # doctest: +SKIP
    >>> cfg = TrainConfig(SaeConfig(k=32), batch_size=1, hookpoints=["layers.3"])            # doctest: +SKIP
    >>> sparsify.Trainer(cfg, replay.dataset, replay.model).fit()                            # doctest: +SKIP

    Its trainer takes no activations: it runs a model on ``input_ids``, with hooks on ``model.base_model``. Here an
    item of the data set is one shuffled batch of rows, ``input_ids`` are these rows' numbers (as ``-1 - row``, so that
    none is a token's), and the model's modules give the rows themselves. The trainer's ``batch_size`` counts items.

    ``hookpoints``: module names by site; others keep theirs. ``inputs``: the site that is a hook point's input, by
    site, for transcoders. ``epochs``: how often each row comes. ``dtype`` should stay float32, which its sparse
    coders are. There are no logits: of the trainer's losses ``"fvu"`` works alone. ``exclude_tokens`` does nothing.
    """

    def __init__(
        self,
        data: RowDataset,
        *,
        hookpoints: Mapping[str, str] | None = None,
        inputs: Mapping[str, str] | None = None,
        epochs: int = 1,
        dtype: Any = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        points, entries = dict(hookpoints or {}), dict(inputs or {})
        names = set(data.names)
        if {*points, *entries, *entries.values()} - names:
            raise StoreError(
                f"expected hookpoints={points} and inputs={entries} of the data set's {data.names}.",
                page="bad-argument",
            )
        outputs = [name for name in data.names if name not in entries.values() or name in points]
        held: deque[dict[str, Tensor]] = deque()
        self.dataset = ReplayData(data, held, epochs=epochs)
        sources = {points.get(name, name): (entries.get(name, name), name) for name in outputs}
        if len(sources) < len(outputs):
            raise StoreError(f"two sites have the same hook point: {points}.", page="bad-argument")
        self.model = ReplayModel(data, held, sources, torch_dtype(dtype_name(dtype)), torch.device(device))


class ReplayData(IterableDataset[dict[str, Tensor]]):
    """``{"input_ids": (rows of a batch,)}``, and the rows set aside for the model."""

    def __init__(self, data: RowDataset, held: deque[dict[str, Tensor]], *, epochs: int, first: int = 0) -> None:
        self._data, self._held, self._epochs, self._first = data, held, epochs, first

    def __len__(self) -> int:
        return len(self._data) * self._epochs - self._first

    def select(self, items: range) -> ReplayData:
        """From an item on, which is how the trainer goes on after a checkpoint."""
        if items != range(items.start, len(self)):
            raise StoreError(f"expected items up to the last, {len(self)}, got {items}.", page="bad-argument")
        return ReplayData(self._data, self._held, epochs=self._epochs, first=self._first + items.start)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._held.clear()
        epoch, taken = divmod(self._first, len(self._data))
        for number in range(epoch, self._epochs):
            batches = taken if number == epoch else 0
            self._data.load_state_dict({**self._data.state_dict(), "epoch": number, "batches": batches})
            for batch in self._data:
                self._held.append(batch)
                yield {"input_ids": -1 - batch["rows"]}


class _Point(nn.Module):
    """A hook on it sees an input and an output of the store."""

    def forward(self, given: Tensor, out: Tensor) -> Tensor:
        return out


class _NoOutput:
    """A model's output, of which nothing can be asked."""

    def __getattr__(self, name: str) -> Any:
        raise StoreError(f"a store has no {name}; of sparsify's losses it serves 'fvu' alone.", page="bad-argument")


class ReplayModel(nn.Module):
    """What ``sparsify.Trainer`` uses of a transformers model: modules by name, widths, a device, and a forward."""

    def __init__(
        self,
        data: RowDataset,
        held: deque[dict[str, Tensor]],
        sources: Mapping[str, tuple[str, str]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._held, self._sources = held, dict(sources)
        self._widths = {name: data._held[name]._site.width for name in data.names}
        self.device, self.dtype = device, dtype
        self.base_model = _tree(sources)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """For the trainer to find widths with."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> _NoOutput:
        values = self._values(input_ids)
        for point, (given, out) in self._sources.items():
            self.base_model.get_submodule(point)(values[given], values[out])
        return _NoOutput()

    def _values(self, input_ids: Tensor) -> dict[str, Tensor]:
        """``(items, rows, d)``, in the order of the data set."""
        if input_ids.numel() and int(input_ids.max()) >= 0:  # the dummy
            return {n: torch.zeros(*input_ids.shape, w, device=self.device) for n, w in self._widths.items()}
        batches = [self._held.popleft() for _ in range(min(len(input_ids), len(self._held)))]
        if [(-1 - batch["rows"]).tolist() for batch in batches] != input_ids.tolist():
            raise StoreError(
                "this model gives the rows that its own data set has just dealt, once and in order, and was asked for "
                "others; give both to one trainer, without workers.",
                page="bad-argument",
            )
        return {
            name: torch.stack([batch[name].flatten(1) for batch in batches]).to(self.device, self.dtype)
            for name in self._widths
        }


def _tree(names: Iterable[str]) -> nn.Module:
    """A point at each dotted name, and on the way to it."""
    root = _Point()
    for name in names:
        at: nn.Module = root
        for part in name.split("."):
            if part not in at._modules:
                at.add_module(part, _Point())
            at = at.get_submodule(part)
    return root
