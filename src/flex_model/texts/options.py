"""``Options``: what a user asked of the batches, checked, with the tokens that it means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flex_model.errors import DataError
from flex_model.texts.encoder import Encoder
from flex_model.texts.packing import Packing

__all__ = ["Options", "resolve"]

Token = int | str | None


@dataclass(frozen=True, slots=True)
class Options:
    """All that a batch depends on beside the data and the tokenizer."""

    context_size: int
    batch_size: int
    packing: Packing
    whole_width: bool
    pad: int
    excluded: tuple[int, ...]
    drop_last: bool
    shuffle: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(
    encoder: Encoder | None,
    *,
    ready: bool,
    context_size: int,
    batch_size: int,
    packing: bool,
    overflow: Literal["cut", "split"],
    pad_to: Literal["longest", "context"],
    prepend_bos: bool | None,
    document_begin: Token,
    separator: Token,
    exclude_tokens: Iterable[int | str] | str,
    drop_last: bool,
    shuffle: int | None,
    seed: int,
) -> Options:
    """``ready``: the data are tokens, to which nothing is added unless it is asked for."""
    for name, number in (("context_size", context_size), ("batch_size", batch_size), ("shuffle", shuffle or 1)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise DataError(f"{name}: expected a number from 1, found {number!r}.", page="bad-argument")
    for name, word, known in (("overflow", overflow, ("cut", "split")), ("pad_to", pad_to, ("longest", "context"))):
        if word not in known:
            raise DataError(f"{name}: expected {' or '.join(map(repr, known))}, found {word!r}.", page="bad-argument")
    if packing and overflow != "cut":
        raise DataError("overflow= is for packing=False; packed documents are never cut.", page="bad-argument")
    if not packing and separator not in ("auto", None):
        raise DataError(
            "separator= is for packing=True; documents in rows of their own need none.", page="bad-argument"
        )

    def token(asked: Token, option: str) -> int | None:
        return None if asked is None else _token(encoder, asked, option)

    if separator == "auto":
        separator = encoder.role("eos") if encoder is not None and packing and not ready else None
    if prepend_bos is None:
        bos = encoder.role("bos") if encoder is not None and not ready else None
    else:
        bos = token("bos", "prepend_bos=True") if prepend_bos else None
    if bos is not None and context_size < 2:
        raise DataError("context_size: expected 2 or more with a BOS in each context, found 1.", page="bad-argument")
    rule = Packing(
        packing, overflow == "split", bos, token(document_begin, "document_begin"), token(separator, "separator")
    )
    pads = [] if encoder is None else [encoder.role(name) for name in ("pad", "eos")]
    return Options(
        context_size=context_size,
        batch_size=batch_size,
        packing=rule,
        whole_width=packing or pad_to == "context",
        pad=next((pad for pad in pads if pad is not None), 0),
        excluded=_excluded(encoder, exclude_tokens),
        drop_last=bool(drop_last),
        shuffle=shuffle or 1,
        seed=seed if shuffle else 0,
    )


def _token(encoder: Encoder | None, asked: int | str, option: str) -> int:
    if encoder is not None:
        return encoder.token(asked, option)
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked
    raise DataError(f"{option}: expected an id, or a tokenizer that knows {asked!r}; give one.", page="bad-argument")


def _excluded(encoder: Encoder | None, asked: Iterable[int | str] | str) -> tuple[int, ...]:
    ids: set[int] = set()
    for one in [asked] if isinstance(asked, str | int) else asked:
        if one == "special" and encoder is not None:
            ids.update(encoder.special())
        else:
            ids.add(_token(encoder, one, "exclude_tokens"))
    return tuple(sorted(ids))
