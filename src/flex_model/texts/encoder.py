"""``Encoder``: a tokenizer of its own, and which of its tokens are special."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex_model.errors import DataError
from flex_model.texts.optional import needed

__all__ = ["Encoder"]

_SAFE: dict[str, Any] = {"trust_remote_code": False}
_ROLES = ("bos", "eos", "pad", "sep", "cls", "unk")


class Encoder:
    """Texts to token ids, without the special tokens that a tokenizer adds.

    It works on a copy of a fast tokenizer, without truncation and padding: the user's own may be in use in another
    thread meanwhile, and is not changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str | Path):
            tokenizer = _load(tokenizer)
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise DataError(
                f"expected a transformers tokenizer or a path of one, found {type(tokenizer).__name__}.",
                page="bad-argument",
            )
        self._tokenizer = tokenizer
        self._fast = _copy(tokenizer)
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)

    def hash(self) -> str:
        """Of all that ids depend on."""
        told = [
            self._fast.to_str() if self._fast is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        ]
        told += [type(self._tokenizer).__name__, str(getattr(self._tokenizer, "split_special_tokens", False))]
        return hashlib.sha256("\0".join(told).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Token ids (T,) of each."""
        if self._fast is not None:
            rows = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [array("q", row) for row in rows]

    def role(self, name: str) -> int | None:
        """The id of ``bos`` and the like, if the tokenizer has one."""
        found = getattr(self._tokenizer, f"{name}_token_id", None)
        return None if found is None else int(found)

    def special(self) -> list[int]:
        return sorted(int(i) for i in self._tokenizer.all_special_ids)

    def token(self, asked: int | str, option: str) -> int:
        """An id, a role such as ``"bos"``, or a text that is one token."""
        if isinstance(asked, int) and not isinstance(asked, bool):
            return asked
        if asked in _ROLES:
            found = self.role(str(asked))
            if found is None:
                raise DataError(
                    f"{option}: the tokenizer {self.name} has no {str(asked).upper()}; give an id, or leave it out.",
                    page="bad-argument",
                )
            return found
        if not isinstance(asked, str):
            raise DataError(f"{option}: expected an id or a token, found {asked!r}.", page="bad-argument")
        ids = self.encode([asked])[0]
        if len(ids) != 1:
            raise DataError(
                f"{option}: expected {asked!r} to be one token of {self.name}, found {len(ids)}; give an id, one of "
                f"{', '.join(_ROLES)}, or a text that is one token.",
                page="bad-argument",
            )
        return int(ids[0])


def _load(path: str | Path) -> Any:
    try:
        return needed("transformers").AutoTokenizer.from_pretrained(str(path), **_SAFE)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        why = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"no tokenizer can be read from {path}: {why}.", page="bad-argument") from error


def _copy(tokenizer: Any) -> Any:
    """Its own code in Rust, if it has one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        return None
    own = type(backend).from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.post_processor = None  # it adds special tokens and corrects offsets, and neither is asked for
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own
