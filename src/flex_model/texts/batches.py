"""``TokenBatches``: texts, or token ids, as batches of contexts for a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from flex_model.errors import DataError
from flex_model.texts.batch import Sheet, TokenBatch
from flex_model.texts.encoder import Encoder
from flex_model.texts.options import resolve
from flex_model.texts.packing import fill
from flex_model.texts.place import START, Cursor
from flex_model.texts.prefetch import prefetched
from flex_model.texts.reading import Reading
from flex_model.texts.record import Fields, Form
from flex_model.texts.source import Source, open_source

__all__ = ["TokenBatches"]


@dataclass(frozen=True, slots=True)
class _State:
    """After some batches: how many, their tokens, and what comes next."""

    batch: int = 0
    tokens: int = 0
    cursor: Cursor = START


class TokenBatches:
    """Batches of tokens from texts of any length, in the order of the data, a function of the arguments alone.

    >>> batches = TokenBatches("pile/*.jsonl.zst", tokenizer, exclude_tokens="special")        # doctest: +SKIP
    >>> for batch in batches:                                                            # doctest: +SKIP
    ...     with fm.capture("model.layers.6") as acts:
    ...         fm(**batch.inputs)
    ...     rows = acts["model.layers.6"][batch.keep]

    To go on later, keep ``batches.state_dict()`` (JSON) and give it to ``load_state_dict`` of batches made alike: the
    next iteration goes on after the last batch that was given. Every other iteration begins at the first batch.

    source: a path, a pattern, a folder, or a list of them: JSON lines (``.jsonl``), Parquet, or text, a document a
        file (``lines=True``: a line); JSON lines and text also as ``.gz`` and ``.zst``. A ``datasets`` dataset, a
        folder that one was saved to, or with ``split=`` (and ``subset=``) the name of one, streamed. Or any iterable of
        strings, mappings or lists of token ids, or a function that returns one; an iterator can be gone through once.
        A list of strings is one of paths if its first is a path that exists or ends as the files above do. Read as it
        is used: memory holds some hundred documents and ``shuffle`` of them.
    tokenizer: a transformers tokenizer or a path of one; not needed for data that are tokens.
    text_field, tokens_field, label_field: names in mappings and columns. Ready tokens are found by themselves as
        ``input_ids``, ``tokens`` or ``token_ids`` unless ``text_field`` is another than ``"text"``. A label is an int,
        or with ready tokens one for each.
    packing: documents follow one another and are cut into contexts of ``context_size``, as in SAELens. Without it each
        has a row, where ``overflow`` is cut off or, with ``"split"``, goes on in rows of its own; rows are padded to
        the longest of the batch (``pad_to="context"``: to ``context_size``).
    prepend_bos: each context begins with BOS. None: if the tokenizer has one and the data are texts.
    document_begin: a token before each document (an id, ``"bos"`` and the like, or a text that is one token).
    separator: a token before a document that begins within a context. ``"auto"``: EOS, if the tokenizer has one and
        the data are texts. These three are not added where the document has the token already, and nothing else
        that a tokenizer adds by itself is.
    exclude_tokens: not to be kept: ids, tokens, ``"bos"`` and the like, or ``"special"`` for all special ones.
    drop_last: leave out the last batch if it has fewer rows, or a context that is not full.
    max_tokens: end with the batch in which so many are reached, padding not counted. max_batches: end after so many.
    shuffle: mix blocks of so many documents, by ``seed``. A document keeps its number in the order of the data.
    prefetch: batches that a thread makes ahead; 0 for none.

    Raises DataError: with file and line for a record that cannot be read, at the batch that needs it.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        *,
        context_size: int = 128,
        batch_size: int = 8,
        packing: bool = True,
        overflow: Literal["cut", "split"] = "cut",
        pad_to: Literal["longest", "context"] = "longest",
        prepend_bos: bool | None = None,
        document_begin: int | str | None = None,
        separator: int | str | None = "auto",
        exclude_tokens: Iterable[int | str] | str = (),
        drop_last: bool = False,
        max_tokens: int | None = None,
        max_batches: int | None = None,
        text_field: str = "text",
        tokens_field: str | None = None,
        label_field: str | None = None,
        lines: bool = False,
        split: str | None = None,
        subset: str | None = None,
        shuffle: int | None = None,
        seed: int = 0,
        prefetch: int = 4,
    ) -> None:
        self._source = open_source(source, split=split, subset=subset, lines=lines)
        self._form = _form(self._source, Fields(text_field, tokens_field, label_field))
        self._encoder = None if tokenizer is None else Encoder(tokenizer)
        if self._encoder is None and self._form.kind == "text":
            raise DataError(f"{self._source.names[0]} has texts; give a tokenizer.", page="bad-argument")
        _check_limit("max_tokens", max_tokens, 1)
        _check_limit("max_batches", max_batches, 1)
        _check_limit("prefetch", prefetch, 0)
        self._options = resolve(
            self._encoder,
            ready=self._form.kind == "tokens",
            context_size=context_size,
            batch_size=batch_size,
            packing=packing,
            overflow=overflow,
            pad_to=pad_to,
            prepend_bos=prepend_bos,
            document_begin=document_begin,
            separator=separator,
            exclude_tokens=exclude_tokens,
            drop_last=drop_last,
            shuffle=shuffle,
            seed=seed,
        )
        self._reading = Reading(self._source, self._form, self._encoder, self._options.shuffle, self._options.seed)
        self._max_tokens, self._max_batches, self._prefetch = max_tokens, max_batches, prefetch
        self._state = _State()  # after the last batch that was given
        self._begin = _State()  # where the next iteration begins

    @property
    def total(self) -> int | None:
        """At most so many batches, where that is known without reading: for a progress bar."""
        options, bounds = self._options, [self._max_batches]
        if self._max_tokens is not None and options.packing.join:
            bounds.append(-(-self._max_tokens // (options.batch_size * options.context_size)))
        if self._source.count is not None and not options.packing.join and not options.packing.split:
            bounds.append(-(-self._source.count // options.batch_size))
        return min((bound for bound in bounds if bound is not None), default=None)

    @cached_property
    def fingerprint(self) -> str:
        """Of the data (samples of them, no paths), the tokenizer and the options, joined by ``-``.

        The limits are no part of it, so that a run can go on with others.
        """
        form = [self._form.kind, self._form.name, self._form.label]
        tokenizer = None if self._encoder is None else self._encoder.hash()
        parts = [[self._source.identity(self._form.wanted()), form], tokenizer, self._options.to_dict()]
        return "-".join(hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in parts)

    @property
    def about(self) -> dict[str, Any]:
        """JSON for whoever reads what was made of the batches."""
        encoder, names = self._encoder, list(self._source.names)
        return {
            "sources": names[:100] + ([f"and {len(names) - 100} more"] if len(names) > 100 else []),
            "field": self._form.name,
            "tokenizer": None if encoder is None else {"name": encoder.name, "hash": encoder.hash()},
            "options": self._options.to_dict(),
            "limits": {"max_tokens": self._max_tokens, "max_batches": self._max_batches},
            "fingerprint": self.fingerprint,
        }

    def __iter__(self) -> Iterator[TokenBatch]:
        begin, self._begin = self._begin, _State()
        return self._given(begin, begin.batch)

    def iter_from(self, number: int) -> Iterator[TokenBatch]:
        """Batches from that number on, the same as if all were gone through.

        Those before it are tokenised and not built, from the start or from the last known place (that of
        ``load_state_dict``, or of the last batch given): a state is cheaper.
        """
        return self._given(self._state if self._state.batch <= number else _State(), number)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was given: a few numbers, in JSON, whatever is left of a document."""
        state = self._state
        told = {"batch": state.batch, "tokens": state.tokens, "cursor": state.cursor.to_list()}
        return {"fingerprint": self.fingerprint, **told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on there. Raises DataError if the data, the tokenizer or the options are others."""
        try:
            told, batch, tokens = str(state["fingerprint"]), int(state["batch"]), int(state["tokens"])
            cursor = Cursor.from_list([int(n) for n in state["cursor"]])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"expected what state_dict() gave, found {str(state)[:80]}.", page="bad-argument"
            ) from error
        if told != self.fingerprint:
            both = zip(("data", "tokenizer", "options"), told.split("-"), self.fingerprint.split("-"), strict=False)
            other = " and ".join(name for name, a, b in both if a != b) or "version"
            raise DataError(
                f"expected the state of these batches, found one of another {other}; begin anew, or give the "
                f"same again.",
                page="bad-argument",
            )
        self._state = self._begin = _State(batch, tokens, cursor)

    def _given(self, state: _State, first: int) -> Iterator[TokenBatch]:
        for batch, after in prefetched(self._made(state, first), self._prefetch):
            self._state = after
            yield batch

    def _made(self, state: _State, first: int) -> Generator[tuple[TokenBatch, _State], None, None]:
        options = self._options
        excluded = torch.tensor(options.excluded, dtype=torch.int64)
        sheets = fill(self._reading.documents(state.cursor), options.packing, self._new_sheet)
        while not self._is_over(state) and (filled := next(sheets, None)) is not None:
            sheet, cursor = filled
            if options.drop_last and not sheet.full:
                break
            number, state = state.batch, _State(state.batch + 1, state.tokens + sheet.tokens, cursor)
            if number >= first:
                yield sheet.batch(number, excluded=excluded, whole_width=options.whole_width), state
        if not state.batch:
            rest = "make no whole batch: give more, or drop_last=False" if options.drop_last else "have no tokens"
            raise DataError(f"the documents of {self._source.names[0]} {rest}.")

    def _is_over(self, state: _State) -> bool:
        tokens = self._max_tokens is not None and state.tokens >= self._max_tokens
        return tokens or (self._max_batches is not None and state.batch >= self._max_batches)

    def _new_sheet(self) -> Sheet:
        options = self._options
        labelled = self._form.label is not None
        return Sheet(options.batch_size, options.context_size, pad=options.pad, labelled=labelled)


def _form(source: Source, fields: Fields) -> Form:
    """As the first record tells."""
    for place, record in source.first(fields.wanted()):
        return fields.form(record, source.tell(place))
    raise DataError(f"{source.names[0]} has no documents; give a source that has some.")


def _check_limit(name: str, limit: int | None, least: int) -> None:
    if limit is not None and (not isinstance(limit, int) or limit < least):
        raise DataError(f"{name}: expected a number from {least}, found {limit!r}.", page="bad-argument")
