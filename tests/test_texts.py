"""Batches of tokens: packed as the rule says token by token, and resumed at any of them."""

from __future__ import annotations

import itertools
import json
import random
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenising import packed, rows, same, text, tokenizer

from flex_model.errors import DataError
from flex_model.texts import TokenBatches

pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DOCUMENTS = [[4 + (7 * i + j) % 40 for j in range(n)] for i, n in enumerate([9, 1, 0, 30, 5, 5, 2, 61, 3, 0, 12, 17])]
TEXTS = [text(ids) for ids in DOCUMENTS]
tokens = st.lists(st.lists(st.integers(0, 6), max_size=20), min_size=1, max_size=12)
added = st.none() | st.integers(0, 8)


# -- packing ---------------------------------------------------------------------------------------------------
def test_packed_without_additions_is_the_stream() -> None:
    stream = torch.tensor(list(itertools.chain(*DOCUMENTS)))
    batches = list(TokenBatches(DOCUMENTS, context_size=10, batch_size=3))
    assert [b.number for b in batches] == list(range(5)) and batches[0].labels is None
    assert torch.equal(torch.cat([b.input_ids[b.attention_mask.bool()] for b in batches]), stream)
    assert torch.equal(torch.cat([b.input_ids for b in batches])[:-1].flatten(), stream[:140])
    last = batches[-1]
    assert last.attention_mask[-1].tolist() == [1] * 5 + [0] * 5 and last.documents[-1, 5:].tolist() == [-1] * 5
    assert torch.equal(last.positions, torch.arange(10).repeat(3, 1))
    assert last.keep.dtype is torch.bool and torch.equal(last.keep, last.attention_mask.bool())
    assert {t.dtype for t in (last.input_ids, last.attention_mask, last.documents, last.positions)} == {torch.int64}
    assert last.inputs == {"input_ids": last.input_ids, "attention_mask": last.attention_mask}


@hypothesis.given(tokens, st.integers(2, 9), st.integers(1, 4), added, added, added)
@hypothesis.settings(deadline=None, max_examples=300)
def test_packed_as_token_by_token(
    documents: list[list[int]], size: int, batch: int, bos: int | None, begin: int | None, sep: int | None
) -> None:
    hypothesis.assume(any(documents))
    asked: dict[str, Any] = {"document_begin": begin, "separator": sep, "prepend_bos": bos is not None}
    made = TokenBatches(documents, _Bos(bos), context_size=size, batch_size=batch, prefetch=0, **asked)
    got = list(made)
    expected = list(packed(documents, size, bos=bos, begin=begin, sep=sep))
    assert rows(got) == expected
    assert [len(b.input_ids) for b in got[:-1]] == [batch] * (len(got) - 1)
    whole = rows(TokenBatches(documents, _Bos(bos), context_size=size, drop_last=True, batch_size=1, **asked)) if [
        row for row in expected if len(row) == size
    ] else []  # fmt: skip
    assert whole == [row for row in expected if len(row) == size]


@hypothesis.given(tokens, st.integers(2, 9), st.integers(1, 4), st.booleans())
@hypothesis.settings(deadline=None, max_examples=200)
def test_no_token_is_lost_or_doubled(documents: list[list[int]], size: int, batch: int, sep: bool) -> None:
    """What is added has ids of its own, so that it can be taken out again."""
    hypothesis.assume(any(documents))
    more = {"separator": 8 if sep else None, "prepend_bos": True, "document_begin": 9}
    got = rows(TokenBatches(documents, _Bos(7), context_size=size, batch_size=batch, prefetch=0, **more))
    assert all(row[0][0] == 7 for row in got)
    left = [pair for row in got for pair in row if pair[0] < 7]
    assert left == [(token, number) for number, ids in enumerate(documents) for token in ids]
    flat = [pair for row in got for pair in row]
    assert sum(token == 9 for token, _ in flat) == sum(map(bool, documents))
    for (token, number), (_, after) in itertools.pairwise(flat):  # a separator ends one, the others begin one
        assert number < after if token == 8 else token < 7 or number == after


@hypothesis.given(tokens, st.integers(2, 9), st.integers(1, 4), st.sampled_from(["cut", "split"]), added)
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_row_a_document(documents: list[list[int]], size: int, batch: int, over: Any, bos: int | None) -> None:
    hypothesis.assume(any(documents))
    more = {"prepend_bos": bos is not None, "overflow": over, "packing": False, "prefetch": 0}
    got = list(TokenBatches(documents, _Bos(bos), context_size=size, batch_size=batch, **more))
    expected = []
    for number, ids in enumerate(documents):
        pieces = [[(t, number) for t, _ in row] for row in packed([ids], size, bos=bos)]
        expected += pieces if over == "split" else pieces[:1]
    assert rows(got) == expected
    for b in got:
        assert b.input_ids.shape[1] == int(b.attention_mask.sum(1).max())


def test_as_saelens_packs() -> None:
    """Run where SAELens is installed. It leaves out a context that is not full, and knows no empty documents."""
    module = pytest.importorskip("sae_lens.tokenization_and_batching")
    draw = random.Random(0)
    for _ in range(300):
        documents = [[draw.randrange(6) for _ in range(draw.randrange(1, 25))] for _ in range(draw.randrange(1, 9))]
        bos, sep = (draw.choice([None, *range(8)]) for _ in range(2))
        size = draw.randrange(2, 12)
        theirs = module.concat_and_batch_sequences(
            iter(map(torch.tensor, documents)), size, begin_batch_token_id=bos, sequence_separator_token_id=sep
        )
        ours = TokenBatches(
            documents, _Bos(bos), context_size=size, prepend_bos=bos is not None, separator=sep, prefetch=0
        )
        assert [r.tolist() for r in theirs] == [[t for t, _ in row] for row in rows(ours) if len(row) == size]


class _Bos:
    """A tokenizer for data that are tokens: it is asked for its BOS alone."""

    all_special_ids = ()

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self) -> None: ...
    def convert_tokens_to_ids(self) -> None: ...
    def get_vocab(self) -> dict[str, int]:
        return {}


# -- special tokens --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adds_bos", [False, True])
def test_texts_get_one_bos_and_separators(adds_bos: bool) -> None:
    made = tokenizer(adds_bos=adds_bos)
    assert made("w0")["input_ids"] == ([1, 4, 2] if adds_bos else [4])
    expected = list(packed(DOCUMENTS, 8, bos=1, sep=2))
    assert rows(TokenBatches(TEXTS, made, context_size=8)) == expected
    assert rows(TokenBatches(TEXTS, made, context_size=8, prepend_bos=True, separator="eos")) == expected
    begun = [f"<s> {t}" for t in TEXTS if t]
    assert rows(TokenBatches(begun, made, context_size=8, packing=False)) == [
        [(1, i)] + [(t, i) for t in ids[:7]] for i, ids in enumerate(filter(None, DOCUMENTS))
    ]
    plain = TokenBatches(TEXTS, made, context_size=8, prepend_bos=False, separator=None)
    assert rows(plain) == list(packed(DOCUMENTS, 8))
    words = TokenBatches(TEXTS, made, context_size=8, prepend_bos=False, separator="w3", document_begin="bos")
    assert rows(words) == list(packed(DOCUMENTS, 8, begin=1, sep=7))


def test_a_tokenizer_without_bos() -> None:
    made = tokenizer(bos=False)
    assert rows(TokenBatches(TEXTS, made, context_size=8)) == list(packed(DOCUMENTS, 8, sep=2))
    with pytest.raises(DataError, match=r"prepend_bos=True: the tokenizer .* has no BOS"):
        TokenBatches(TEXTS, made, prepend_bos=True)


def test_ready_tokens_stay_as_they_are_unless_asked() -> None:
    assert rows(TokenBatches(DOCUMENTS, tokenizer(), context_size=8)) == list(packed(DOCUMENTS, 8))
    asked = TokenBatches(DOCUMENTS, tokenizer(), context_size=8, prepend_bos=True, separator="eos")
    assert rows(asked) == list(packed(DOCUMENTS, 8, bos=1, sep=2))


@pytest.mark.parametrize(
    "asked, ids",
    [((), []), ("bos", [1]), ("special", [0, 1, 2, 3]), (["eos", "w0", 9], [2, 4, 9]), ([], []), (5, [5])],
)
def test_excluded_tokens_are_not_kept(asked: Any, ids: list[int]) -> None:
    for batch in TokenBatches(TEXTS, tokenizer(), context_size=8, exclude_tokens=asked):
        excluded = torch.tensor([[t in ids for t in row] for row in batch.input_ids.tolist()])
        assert torch.equal(batch.keep, batch.attention_mask.bool() & ~excluded)


def test_pad_to_context_and_labels() -> None:
    kinds = (int, np.int64, torch.tensor)
    records = [{"text": t, "label": kinds[i % 3](i)} for i, t in enumerate(TEXTS)]
    more = {"context_size": 8, "batch_size": 3, "label_field": "label"}
    batches = list(TokenBatches(records, tokenizer(), packing=False, pad_to="context", **more))
    assert {b.input_ids.shape[1] for b in batches} == {8} and (batches[0].input_ids[1, 2:] == 3).all()
    for batch in [*batches, *TokenBatches(records, tokenizer(), **more)]:
        assert torch.equal(batch.labels, batch.documents.masked_fill(batch.documents == -1, -100))
    ready = [{"tokens": ids, "label": [t % 3 for t in ids]} for ids in DOCUMENTS]
    for batch in TokenBatches(ready, tokenizer(), prepend_bos=True, separator="eos", document_begin=0, **more):
        assert torch.equal(batch.labels, (batch.input_ids % 3).masked_fill(batch.input_ids < 4, -100))


# -- how it ends -----------------------------------------------------------------------------------------------
def test_limits_and_total() -> None:
    more = {"context_size": 10, "batch_size": 2}
    assert len(list(TokenBatches(DOCUMENTS, max_batches=3, **more))) == 3
    assert [b.number for b in TokenBatches(DOCUMENTS, max_tokens=41, **more)] == [0, 1, 2]
    assert TokenBatches(DOCUMENTS, max_tokens=41, **more).total == 3
    assert TokenBatches(DOCUMENTS, max_tokens=41, max_batches=2, **more).total == 2
    assert TokenBatches(DOCUMENTS, **more).total is None
    assert TokenBatches(DOCUMENTS, packing=False, **more).total == 6
    assert TokenBatches(iter(DOCUMENTS), packing=False, **more).total is None


@pytest.mark.parametrize(
    "documents, more, told",
    [
        ([], {}, "has no documents"),
        ([[], []], {}, "have no tokens"),
        ([[1, 2]], {"drop_last": True}, "make no whole batch"),
    ],
)
def test_data_without_a_batch(documents: list[list[int]], more: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        list(TokenBatches(documents, **more))


# -- resuming --------------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "begun": {"document_begin": "w1", "separator": "w2", "batch_size": 1},
    "long batches": {"batch_size": 5},
    "no additions": {"prepend_bos": False, "separator": None, "context_size": 1},
    "shuffled": {"shuffle": 5, "seed": 3},
    "all shuffled": {"shuffle": 100},
    "cut": {"packing": False},
    "split": {"packing": False, "overflow": "split", "context_size": 4},
    "split and shuffled": {"packing": False, "overflow": "split", "context_size": 4, "shuffle": 4},
    "whole only": {"drop_last": True},
    "not ahead": {"prefetch": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_at_every_batch(case: str) -> None:
    records = [{"text": t, "label": i} for i, t in enumerate(TEXTS)]

    def made(**more: Any) -> TokenBatches:
        asked = {"context_size": 8, "batch_size": 2, "label_field": "label", **CASES[case], **more}
        return TokenBatches(records, tokenizer(), **asked)

    batches = made()
    states, undisturbed = [json.dumps(batches.state_dict())], []
    for batch in batches:
        undisturbed.append(batch)
        states.append(json.dumps(batches.state_dict()))
    assert len(undisturbed) > 3
    for k, state in enumerate(states):
        other = made(max_tokens=10**6)  # limits may change
        other.load_state_dict(json.loads(state))
        assert other.state_dict() == json.loads(state)
        for rest in (list(other), list(made().iter_from(k))):
            assert len(rest) == len(undisturbed) - k
            assert all(same(a, b) for a, b in zip(rest, undisturbed[k:], strict=True))
        assert all(same(a, b) for a, b in zip(other, undisturbed, strict=True)), "then from the first again"
        assert len(state) < 200
    left = made()
    next(iter(left))
    assert all(same(a, b) for a, b in zip(left.iter_from(2), undisturbed[2:], strict=True)), "from a known place"


def test_limits_hold_after_a_resume() -> None:
    first = TokenBatches(DOCUMENTS, context_size=10, batch_size=2, max_batches=2)
    assert len(list(first)) == 2
    for limit in ({"max_batches": 4}, {"max_tokens": 61}):
        second = TokenBatches(DOCUMENTS, context_size=10, batch_size=2, **limit)
        second.load_state_dict(first.state_dict())
        assert [b.number for b in second] == [2, 3]


@pytest.mark.parametrize(
    "other, told",
    [
        ({"context_size": 9}, "another options"),
        ({"exclude_tokens": [4]}, "another options"),
        ({"source": TEXTS[:-1]}, "another data"),
        ({"tokenizer": tokenizer(bos=False)}, "another tokenizer and options"),
    ],
)
def test_another_state_is_refused(other: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"source": TEXTS, "tokenizer": tokenizer()}
    state = TokenBatches(**given).state_dict()
    TokenBatches(**given, max_tokens=5, prefetch=0).load_state_dict(state)
    with pytest.raises(DataError, match=told):
        TokenBatches(**{**given, **other}).load_state_dict(state)
    for bad in ({}, {**state, "cursor": 3}, {**state, "batch": "x"}):
        with pytest.raises(DataError, match=r"expected what state_dict\(\) gave"):
            TokenBatches(**given).load_state_dict(bad)


def test_shuffled_blocks_are_a_permutation() -> None:
    def order(seed: int, block: int) -> list[int]:
        batches = TokenBatches(DOCUMENTS, context_size=8, packing=False, shuffle=block, seed=seed)
        return [d for b in batches for d in b.documents[:, 0].tolist()]

    full = [i for i, ids in enumerate(DOCUMENTS) if ids]
    assert order(0, 1) == full and sorted(order(0, 100)) == full
    assert order(0, 100) == order(0, 100) != order(1, 100)
    assert sorted(order(0, 4)[:3]) == full[:3]


# -- ahead -----------------------------------------------------------------------------------------------------
def test_a_loop_that_is_left_ends_the_thread() -> None:
    drawn: list[int] = []

    def items() -> Iterator[list[int]]:
        for i in range(10**9):
            drawn.append(i)
            yield [i % 50] * 100

    before = threading.active_count()
    batches = iter(TokenBatches(items, context_size=100, batch_size=1, prefetch=3))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before and len(drawn) < 5000


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_after_the_batches_before_it(prefetch: int) -> None:
    documents: list[Any] = [[1] * 10, [2] * 10, [3] * 10, "text"]
    batches = TokenBatches(documents, context_size=10, batch_size=1, prefetch=prefetch)
    got = []
    with pytest.raises(DataError, match="item 3 of the texts: expected a list of token ids, found str 'text'"):
        for batch in batches:
            got.append(int(batch.input_ids[0, 0]))
    assert got == [1, 2, 3]
    assert len(list(TokenBatches(documents, context_size=10, batch_size=1, max_batches=3, prefetch=prefetch))) == 3


def test_memory_does_not_grow_with_the_data() -> None:
    made = tokenizer()

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in TokenBatches(lambda: itertools.repeat(TEXTS[3], count), made, shuffle=50):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(40000) < 1.3 * peak(10000)
