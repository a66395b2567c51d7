"""Small tokenizers and what batches are compared with, for the tests of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from flex_model.texts import TokenBatch

WORDS = [f"w{i}" for i in range(40)]


def tokenizer(bos: bool = True, adds_bos: bool = False) -> Any:
    """A word is a token: ``w3`` has the id 3 + 4; <s> is 1, </s> 2, <pad> 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def text(ids: Iterable[int]) -> str:
    return " ".join(f"w{i - 4}" for i in ids)


def rows(batches: Iterable[TokenBatch]) -> list[list[tuple[int, int]]]:
    """(token, document) of each context, without padding."""
    return [
        [(t, d) for t, d, m in zip(*row, strict=True) if m]
        for b in batches
        for row in zip(b.input_ids.tolist(), b.documents.tolist(), b.attention_mask.tolist(), strict=True)
    ]


def packed(
    documents: list[list[int]], size: int, *, bos: int | None = None, begin: int | None = None, sep: int | None = None
) -> Iterator[list[tuple[int, int]]]:
    """The rule of packing, token by token."""
    row: list[tuple[int, int]] = []
    before = -1
    for number, ids in enumerate(documents):
        ids = [begin, *ids] if begin is not None and ids and ids[0] != begin else ids
        if row and ids and sep not in (None, ids[0]):
            row.append((sep, before))
        for token in ids:
            if len(row) == size:
                yield row
                row = []
            if not row and bos not in (None, token):
                row.append((bos, number))
            row.append((token, number))
        before = number if ids else before
        if len(row) == size:
            yield row
            row = []
    if row:
        yield row


def same(a: TokenBatch, b: TokenBatch) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        return x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(x, y)

    names = ("input_ids", "attention_mask", "documents", "positions", "keep", "labels")
    return a.number == b.number and all(equal(getattr(a, n), getattr(b, n)) for n in names)
