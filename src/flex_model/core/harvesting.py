"""``FlexModel.harvest`` and ``FlexModel.stream``: activations of many batches, to a store or as shuffled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from flex_model.components.place import Place
from flex_model.core.hook_function import HookType
from flex_model.core.naming.globs import Pattern

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel
    from flex_model.harvest import Forecast, Harvested

__all__ = ["Harvesting"]


class Harvesting:
    """What ``FlexModel`` can do with a loader of batches; ``flex_model.harvest`` does it."""

    def harvest(
        self,
        batches: Iterable[Any],
        patterns: Pattern | Place | Sequence[Pattern | Place],
        path: str | Path,
        *,
        hook_type: HookType = "forward",
        unpack_idx: int | str = 0,
        select: Any = None,
        rows: Literal["tokens", "samples"] | None = None,
        positions: Any = None,
        exclude_tokens: Sequence[int] = (),
        columns: Sequence[str] = (),
        dtype: torch.dtype | str | None = None,
        own_batches: bool = False,
        forward: Callable[..., Any] | None = None,
        stop: bool = True,
        resume: bool = True,
        commit_every: int | None = None,
        about: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        queue_bytes: int = 1 << 28,
        segment_bytes: int = 1 << 28,
        dry_run: bool = False,
    ) -> Harvested | Forecast:
        """Run ``batches`` through the model, and write what the patterns match to the store ``path``; all ranks.

        >>> texts = TokenBatches("pile.jsonl", tokenizer, context_size=512, batch_size=16)      # doctest: +SKIP
        >>> fm.harvest(texts, fm.at("resid_post"), "acts", dtype="bfloat16")                    # doctest: +SKIP
        >>> ActivationStore("acts")["@resid_post.5"][:4]                                        # doctest: +SKIP

        Every number is written by one rank that has it, and nothing is gathered: rows ``(row, ...)`` are in the order
        of the data, whatever the ranks. A row is a token where the model is given ids (B, S), else a sample
        (``rows``). Padding (``attention_mask``) has no rows.

        ``batches``: ``texts.TokenBatches``, or any iterable of the model's keywords or of its one input. All ranks
        give the same, and data-parallel ranks run their part of the samples of each; with ``own_batches=True`` each
        gives its own. ``path``: a folder, or ``s3://`` or ``gs://``. ``select``: some columns of each row, by an index
        or a function, also of sharded dims; a function that computes with values needs whole rows on every rank.
        ``positions``: an index of the sequence. ``exclude_tokens``: ids without rows. ``columns``: entries of
        batches that are not the model's, a number a row, stored beside ``token_ids``. ``dtype``: rows are cast before
        they are copied. ``forward``: calls the model on a batch, such as a schedule's ``eval``. ``stop``: forwards end
        behind the last site. ``resume``: go on after the last commit of a store that the same data and options began.
        ``commit_every``: steps; about 30 seconds or 1 GiB a rank if not given.

        ``dry_run``: write nothing; run three batches, and tell bytes, size and time.

        The model runs in eval mode without gradients. Memory is that of one batch's sites and ``queue_bytes`` a rank.
        Raises HarvestError and StoreError on all ranks; what is committed stays readable.
        """
        from flex_model.harvest.forecast import forecast
        from flex_model.harvest.harvest import harvest
        from flex_model.harvest.loader import Loader
        from flex_model.harvest.run import Run, asked_for

        model = cast("FlexModel", self)
        job = asked_for(
            patterns,
            rows=rows,
            positions=positions,
            exclude_tokens=exclude_tokens,
            columns=columns,
            dtype=dtype,
            hook_type=hook_type,
            unpack_idx=unpack_idx,
            select=select,
            own_batches=own_batches,
            stop=stop,
            commit_every=commit_every,
            about=dict(about or {}),
        )
        if dry_run:
            return forecast(Run(model, job, forward), Loader(batches, own=own_batches), path)
        return harvest(
            model,
            batches,
            path,
            job=job,
            forward=forward,
            resume=resume,
            progress=progress,
            queue_bytes=queue_bytes,
            segment_bytes=segment_bytes,
        )

    def stream(
        self,
        batches: Iterable[Any],
        patterns: Pattern | Place | Sequence[Pattern | Place],
        *,
        batch_size: int = 4096,
        buffer: int = 1 << 16,
        seed: int = 0,
        drop_last: bool = True,
        hook_type: HookType = "forward",
        unpack_idx: int | str = 0,
        select: Any = None,
        rows: Literal["tokens", "samples"] | None = None,
        positions: Any = None,
        exclude_tokens: Sequence[int] = (),
        columns: Sequence[str] = (),
        dtype: torch.dtype | str | None = None,
        forward: Callable[..., Any] | None = None,
        stop: bool = True,
    ) -> Iterator[dict[str, Tensor]]:
        """``harvest`` without a disk: batches of shuffled whole rows while the model runs, for training on them.

        >>> for batch in fm.stream(texts, fm.at("resid_post", 5), batch_size=4096):            # doctest: +SKIP
        ...     loss = sae(batch["@resid_post.5"]).loss

        Each batch is ``{site: (batch_size, ...)}`` with the side columns, the same on every rank, on FlexModel's
        ``device``; data-parallel trainers take their part of it. Rows are drawn from ``buffer`` of them, which is
        filled again when half is used: a function of the data and ``seed``. The other arguments are those of
        ``harvest``. All ranks go through it, as far as each other; hooks are off while the loop's own code runs.
        """
        from flex_model.harvest.loader import Loader
        from flex_model.harvest.run import Run, asked_for
        from flex_model.harvest.stream import stream

        model = cast("FlexModel", self)
        job = asked_for(
            patterns,
            rows=rows,
            positions=positions,
            exclude_tokens=exclude_tokens,
            columns=columns,
            dtype=dtype,
            hook_type=hook_type,
            unpack_idx=unpack_idx,
            select=select,
            stop=stop,
        )
        run = Run(model, job, forward, whole=True)
        given = Loader(batches, own=False)
        return stream(run, given, batch_size=batch_size, buffer=buffer, seed=seed, drop_last=drop_last)
