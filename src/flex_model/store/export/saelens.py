"""``to_saelens``: the folder that SAELens reads as cached activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flex_model.errors import StoreError
from flex_model.progress import progress_bar
from flex_model.store.export.contexts import Contexts, Windows
from flex_model.store.export.selection import Selection, piece
from flex_model.store.export.shards import Exported, Shards
from flex_model.store.export.staging import Sink, staging
from flex_model.store.export.tables import arrow
from flex_model.store.reader import ActivationStore

__all__ = ["to_saelens"]

_FLOATS = ("float16", "float32", "float64")
_TOKENS = "token_ids"


def to_saelens(
    store: ActivationStore,
    path: str | Path,
    *,
    hook_names: Mapping[str, str] | None = None,
    sites: Sequence[str] | None = None,
    context_size: int | None = None,
    start: int = 0,
    packed: bool | None = None,
    incomplete: Literal["refuse", "drop"] = "refuse",
    rows: Any = None,
    dtype: Any = None,
    shard_bytes: int = 1 << 29,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Exported:
    """Write a data set of contexts, as SAELens's ``CacheActivationsRunner`` does, without the model.

    >>> to_saelens(store, "out", hook_names={"model.layers.3": "blocks.3.hook_resid_post"},
    ...            dtype="float32")                                                          # doctest: +SKIP
    >>> cfg = LanguageModelSAERunnerConfig(hook_name="blocks.3.hook_resid_post", use_cached_activations=True,
    ...     cached_activations_path="out", context_size=128, ...)                            # doctest: +SKIP

    A row is a context: under each hook's name ``Array2D((context_size, d_in))``, d_in being the site's row flattened,
    and ``token_ids`` as int32 if the store has them. ``hook_names``: by site; others of ``sites`` (if None: there are
    none, or all without ``hook_names``) keep their module's name, which is SAELens's own for models of transformers.
    SAELens takes one hook of a folder, and reads ``token_ids`` in its own ``dtype``, which should hold them.

    ``context_size``: what the store's ``about`` says if None. ``start``: the first position that goes out (1 where
    the first tokens were not stored), as SAELens's ``seqpos_slice=(start, None)``; its ``context_size`` is then the
    number of positions that are left. ``packed``: whether a context holds several documents, as ``about`` says if
    None. A context that lacks a row is never padded: such rows are counted, and refused, or left out with
    ``incomplete="drop"``. SAELens has neither bf16 nor fp8: give ``dtype``. The rest is as for ``to_safetensors``.
    """
    arrow(), _datasets()
    if incomplete not in ("refuse", "drop"):
        raise StoreError(f"incomplete={incomplete!r} is unknown; expected 'refuse' or 'drop'.", page="bad-argument")
    sites = list(hook_names) if sites is None and hook_names is not None else sites
    columns = [_TOKENS] if _TOKENS in store.columns else []
    allowed = (*_FLOATS, "int64", "int32")
    chosen = Selection.of(
        store, sites=sites, columns=columns, rows=rows, dtype=dtype, allowed=allowed, what="SAELens's Array2D"
    )
    size = context_size if context_size is not None else _told_size(store)
    told = packed if packed is not None else bool(store.about.get("packed", False))
    contexts = Contexts(store, chosen.rows, size, start=start, packed=told)
    job = _Job(chosen, contexts, _hooks(chosen, hook_names or {}))
    shards = Shards(contexts.count(drop=incomplete == "drop"), job.context_bytes, shard_bytes, "arrow")
    with staging(path, overwrite=overwrite) as folder:
        with progress_bar(job.steps(shards), "exporting", progress) as tick:
            windows = Windows(contexts)
            shards.write(folder, lambda sink, first, stop: job.write(sink, windows, stop - first, tick))
        for name, body in job.described([name for name, _, _ in shards.cuts]).items():
            folder.write(name, body)
        left_out = len(chosen.rows) - shards.total * size
        return shards.finish(folder, path, chosen, kind="saelens", per=size, left_out=left_out)


@dataclass(frozen=True, slots=True)
class _Job:
    selection: Selection
    contexts: Contexts
    hooks: dict[str, str]

    @property
    def context_bytes(self) -> int:
        return self.contexts.size * self.selection.row_bytes

    def steps(self, shards: Shards) -> int:
        return sum(-(-(stop - first) // piece(self.context_bytes)) for _, first, stop in shards.cuts)

    @property
    def features(self) -> Any:
        datasets, size = _datasets(), self.contexts.size
        told = {
            hook: datasets.Array2D((size, site.width), site.dtype)
            for hook, site in zip(self.hooks.values(), self.selection.sites.values(), strict=True)
        }
        tokens = datasets.Sequence(datasets.Value("int32"), length=size)
        return datasets.Features(told | ({_TOKENS: tokens} if self.selection.columns else {}))

    def write(self, sink: Sink, windows: Windows, count: int, tick: Callable[..., object]) -> None:
        pa, schema = arrow(), self.features.arrow_schema
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as file:
            for done in range(0, count, size := piece(self.context_bytes)):
                file.write(self._batch(schema, windows.take(min(size, count - done))))
                tick()

    def _batch(self, schema: Any, firsts: Any) -> Any:
        import numpy as np

        pa, size = arrow(), self.contexts.size
        rows = (firsts[:, None] + np.arange(size)).reshape(-1)
        arrays = []
        for name, hook in self.hooks.items():
            width = self.selection.sites[name].width
            values = pa.array(self.selection.read(name, rows).reshape(-1).numpy())
            for each in (width, size):
                offsets = np.arange(0, len(values) + 1, each, dtype=np.int32)
                values = pa.ListArray.from_arrays(pa.array(offsets), values)
            arrays.append(pa.ExtensionArray.from_storage(schema.field(hook).type, values))
        if self.selection.columns:
            tokens = self.selection.read(_TOKENS, rows).numpy()
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(_int32(tokens)), size))
        return pa.record_batch(arrays, schema=schema)

    def described(self, files: Sequence[str]) -> dict[str, Any]:
        """What ``datasets.load_from_disk`` reads beside the files."""
        import dataclasses

        from flex_model.store.segment import checksum

        info = dataclasses.asdict(_datasets().DatasetInfo(features=self.features))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": checksum(repr((self.features, self.selection.store, self.contexts, files)).encode())[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        return {"dataset_info.json": info, "state.json": state}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise StoreError("this export needs datasets; install flex-model[export].", page="not-installed") from None
    return datasets


def _told_size(store: ActivationStore) -> int:
    told = store.about.get("context_size")
    if not isinstance(told, int):
        raise StoreError("the store does not say its context_size; give context_size=.", page="bad-argument")
    return told


def _hooks(selection: Selection, hook_names: Mapping[str, str]) -> dict[str, str]:
    """By site, in the order of the sites."""
    unknown = [site for site in hook_names if site not in selection.sites]
    hooks = {site: hook_names.get(site, site) for site in selection.sites}
    if unknown or len({*hooks.values(), _TOKENS}) <= len(hooks):
        raise StoreError(
            f"expected hook_names for some of {list(hooks)}, each of its own and none {_TOKENS!r}, got "
            f"{dict(hook_names)}.",
            page="bad-argument",
        )
    return hooks


def _int32(tokens: Any) -> Any:
    import numpy as np

    if len(tokens) and (tokens.max() > np.iinfo(np.int32).max or tokens.min() < np.iinfo(np.int32).min):
        raise StoreError("SAELens reads token_ids as int32, and the store has larger ones.", page="export-dtype")
    return tokens.astype(np.int32)
