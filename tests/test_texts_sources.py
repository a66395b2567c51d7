"""Where texts come from: the same documents, whatever holds them; and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenising import packed, rows, same, text, tokenizer

from flex_model.errors import DataError
from flex_model.texts import TokenBatches
from flex_model.texts.encoder import Encoder

pytest.importorskip("transformers")

DOCUMENTS = [[4 + (3 * i + j) % 40 for j in range(1 + i * 5 % 23)] for i in range(40)]
TEXTS = [text(ids) for ids in DOCUMENTS]
RECORDS = [{"text": t, "n": i, "other": [0.5]} for i, t in enumerate(TEXTS)]
MORE: dict[str, Any] = {"context_size": 8, "batch_size": 4}


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def jsonl(folder: Path) -> Any:
    (folder / "a.jsonl").write_bytes(lines(RECORDS[:10]) + b"\n  \r\n" + lines(RECORDS[10:15]))
    (folder / "b.jsonl").write_bytes(lines(RECORDS[15:])[:-1])  # the last line is not ended
    return str(folder / "*.jsonl")


def packed_jsonl(folder: Path) -> Any:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS[:15])))
    with pytest.importorskip("pyarrow").output_stream(folder / "b.jsonl.zst", compression="zstd") as file:
        file.write(lines(RECORDS[15:]))
    return [folder / "a.jsonl.gz", folder / "b.jsonl.zst"]


def strings(folder: Path) -> Any:
    (folder / "a.jsonl").write_bytes(lines(TEXTS))
    return folder / "a.jsonl"


def parquet(folder: Path) -> Any:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(RECORDS[:33]), folder / "a.parquet", row_group_size=7)
    (folder / "sub").mkdir()
    parquet.write_table(arrow.Table.from_pylist(RECORDS[33:]), folder / "sub" / "b.parquet")
    (folder / "README.md").write_text("no document")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "c.txt").write_text("none either")
    return folder


def documents(folder: Path) -> Any:
    for i, t in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(t)
    return str(folder)


def code(folder: Path) -> Any:
    for i, t in enumerate(TEXTS):
        (folder / f"{i:02}.py").write_text(t)
    return str(folder / "*.py")


def dataset(folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(RECORDS).with_format("torch")


def stream(folder: Path) -> Any:
    return dataset(folder).to_iterable_dataset(num_shards=3)


def made(folder: Path) -> Any:
    return pytest.importorskip("datasets").IterableDataset.from_generator(lambda: iter(RECORDS))


def saved(folder: Path) -> Any:
    dataset(folder).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = [jsonl, packed_jsonl, strings, parquet, documents, code, dataset, stream, made, saved]
ITEMS: list[Callable[[Path], Any]] = [
    lambda _: TEXTS,
    lambda _: tuple(RECORDS),
    lambda _: iter(TEXTS),
    lambda _: lambda: iter(RECORDS),
    lambda _: (r for r in RECORDS),
]


@pytest.mark.parametrize("kind", [*KINDS, *ITEMS])
def test_the_same_documents(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    assert rows(TokenBatches(kind(tmp_path), tokenizer(), **MORE)) == list(packed(DOCUMENTS, 8, bos=1, sep=2))


@pytest.mark.parametrize("shuffle", [None, 6])
@pytest.mark.parametrize("kind", [*KINDS, ITEMS[0], ITEMS[3]])
def test_any_of_them_goes_on(kind: Callable[[Path], Any], tmp_path: Path, shuffle: int | None) -> None:
    source = kind(tmp_path)
    whole = list(TokenBatches(source, tokenizer(), shuffle=shuffle, **MORE))
    first = TokenBatches(source, tokenizer(), shuffle=shuffle, **MORE)
    for k, _ in enumerate(first, 1):
        second = TokenBatches(source, tokenizer(), shuffle=shuffle, **MORE)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(same(a, b) for a, b in zip(second, whole[k:], strict=True))
    assert k == len(whole) > 10


def test_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:20]) + "\r\n\n" + "\n".join(TEXTS[20:]))
    batches = TokenBatches(tmp_path / "a.txt", tokenizer(), lines=True, **MORE)
    assert rows(batches) == list(packed(DOCUMENTS, 8, bos=1, sep=2))


def test_an_iterator_is_gone_through_once() -> None:
    batches = TokenBatches(iter(TEXTS), tokenizer(), **MORE)
    state = batches.state_dict()
    whole = list(batches)
    with pytest.raises(DataError, match="an iterator, which is used up"):
        list(batches)
    again = TokenBatches(iter(TEXTS), tokenizer(), **MORE)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize(
    "record, fields",
    [
        (lambda ids: ids, {}),
        (lambda ids: tuple(ids), {}),
        (lambda ids: torch.tensor(ids, dtype=torch.int32), {}),
        (lambda ids: torch.tensor(ids).numpy(), {}),
        (lambda ids: {"text": "w", "input_ids": ids}, {}),
        (lambda ids: {"tokens": ids}, {}),
        (lambda ids: {"token_ids": torch.tensor(ids)}, {}),
        (lambda ids: {"input_ids": "x", "mine": ids}, {"tokens_field": "mine"}),
    ],
)
def test_ready_tokens(record: Callable[[list[int]], Any], fields: dict[str, str]) -> None:
    batches = TokenBatches([record(ids) for ids in DOCUMENTS], **fields, **MORE)
    assert rows(batches) == list(packed(DOCUMENTS, 8))


def test_ready_tokens_of_a_tensor_and_of_tables(tmp_path: Path) -> None:
    whole = torch.arange(48).view(6, 8)
    assert torch.equal(torch.cat([b.input_ids for b in TokenBatches(whole, **MORE)]), whole)
    from pyarrow import Table, parquet

    parquet.write_table(
        Table.from_pylist([{"input_ids": ids, "text": "w"} for ids in DOCUMENTS]), tmp_path / "a.parquet"
    )
    assert rows(TokenBatches(tmp_path, **MORE)) == list(packed(DOCUMENTS, 8))
    table = pytest.importorskip("datasets").load_dataset("parquet", data_dir=str(tmp_path), split="train",
                                                         cache_dir=str(tmp_path / "cache"))  # fmt: skip
    for source in (table, table.with_format("numpy"), table.to_iterable_dataset()):
        assert rows(TokenBatches(source, **MORE)) == list(packed(DOCUMENTS, 8))


def test_another_field_of_the_text() -> None:
    records = [{"body": t, "tokens": ids} for t, ids in zip(TEXTS, DOCUMENTS, strict=True)]
    words = [{"tokens": t.split(), "text": t} for t in TEXTS]  # as in data of named entities
    for source, fields in ((records, {"text_field": "body"}), (words, {})):
        batches = TokenBatches(source, tokenizer(), **fields, **MORE)
        assert rows(batches) == list(packed(DOCUMENTS, 8, bos=1, sep=2))


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*args: Any, **more: Any) -> Any:
        asked.append((args, more))
        return stream(tmp_path)

    monkeypatch.setattr(datasets, "load_dataset", load)
    batches = TokenBatches("owner/stories", tokenizer(), split="train", subset="en", **MORE)
    assert rows(batches) == list(packed(DOCUMENTS, 8, bos=1, sep=2))
    assert asked == [(("owner/stories", "en"), {"split": "train", "streaming": True})]


# -- what identifies them --------------------------------------------------------------------------------------
def test_the_fingerprint_is_of_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        jsonl(folder)
    a, b = (TokenBatches(f, tokenizer(), **MORE) for f in (one, two))
    assert a.fingerprint == b.fingerprint and len(a.fingerprint.split("-")) == 3
    assert json.loads(json.dumps(a.about))["sources"] == [str(one / "a.jsonl"), str(one / "b.jsonl")]
    assert a.about["fingerprint"] == a.fingerprint and a.about["options"]["context_size"] == 8
    (two / "b.jsonl").write_bytes((two / "b.jsonl").read_bytes().replace(b"w7", b"w8", 1))
    changed = TokenBatches(two, tokenizer(), **MORE).fingerprint
    assert [x == y for x, y in zip(changed.split("-"), a.fingerprint.split("-"), strict=True)] == [False, True, True]


def test_the_fingerprint_is_that_of_another_process(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = jsonl(tmp_path)
    script = (
        "import sys; from flex_model.texts import TokenBatches\n"
        "print(TokenBatches(sys.argv[1], sys.argv[2], exclude_tokens='special').fingerprint)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, source, str(tmp_path / "tokenizer")], capture_output=True, text=True, check=True
    )
    here = TokenBatches(source, tmp_path / "tokenizer", exclude_tokens="special").fingerprint
    assert run.stdout.split()[-1] == here


# -- tokenizers ------------------------------------------------------------------------------------------------
def test_a_fast_tokenizer_is_copied() -> None:
    theirs = tokenizer(adds_bos=True)
    theirs(["w1 w2 w3"], truncation=True, max_length=2, padding="max_length")
    before = theirs.backend_tokenizer.to_str()
    assert '"truncation":{' in before.replace(" ", "").replace("\n", "")
    ours = Encoder(theirs)
    assert [ids.tolist() for ids in ours.encode(["w1 w2 w3 <s> zzz", "", "w0"])] == [[5, 6, 7, 1, 0], [], [4]]
    assert theirs.backend_tokenizer.to_str() == before
    assert ours.hash() == Encoder(tokenizer()).hash()  # what it adds by itself is no part of it


def test_as_the_tokenizer_itself(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [p.read_text(encoding="utf-8") for p in sorted(Path(json.__file__).parent.glob("*.py"))] + ["", "é\n ñ 🙂"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<eos>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<eos>")
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(theirs).encode(texts)] == expected
    assert list(range(len(texts))) == sorted(
        {d for r in rows(TokenBatches(texts, theirs)) for _, d in r} | {len(texts) - 2}
    )


def test_a_slow_tokenizer() -> None:
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        vocab_size = 26

        def get_vocab(self) -> dict[str, int]:
            return {chr(97 + i): i for i in range(26)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **more: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token) - 97

        def _convert_id_to_token(self, index: int) -> str:
            return chr(97 + index)

    made = Letters(bos_token="<s>", eos_token="</s>")
    batches = TokenBatches(["abc", "", "za"], made, context_size=8)
    assert rows(batches) == list(packed([[0, 1, 2], [], [25, 0]], 8, bos=made.bos_token_id, sep=made.eos_token_id))
    assert batches.fingerprint == TokenBatches(["abc", "", "za"], made, context_size=8).fingerprint


# -- what is wrong with them -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.jsonl", b'{"text": "w1"}\n\n{"text": "w2"\n', r"a\.jsonl, line 3: expected a record in JSON, found "),
        ("a.jsonl", b'{"text": "w1"}\n{"txt": "w2"}\n', r"a\.jsonl, line 2: expected a field 'text', found txt"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": null}\n', r"line 2: expected a text, found nothing \(null\)"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": 5}\n', r"line 2: expected a text, found int '5'"),
        ("a.jsonl", b'{"text": "w1"}\n["w1"]\n', r"line 2: expected a record with the field .*, found a list of str"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": "\\ud800"}\n', r"line 2: expected a text in Unicode"),
        ("a.jsonl", b'{"txt": "w1"}\n', r"line 1: expected one of the fields text, .* found txt; choose"),
        ("a.json", b'[\n{"text": "w1"}]\n', r"line 1: .*the file is one array: write a record a line"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": [1.5]}\n', r"line 2: expected a list of .*, found a list of float"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": [-1]}\n', r"line 2: expected a list of token ids, found the id -1"),
        ("a.jsonl", b'{"tokens": [1]}\n{"tokens": [true]}\n', r"line 2: expected a list of .*, found a list of bool"),
        ("a.jsonl", b"", "has no documents"),
        ("a.jsonl", b"\n \n", "has no documents"),
        ("a.jsonl", b"[" * 100000 + b"\n", "line 1: expected a record in JSON"),
        ("a.txt", b"w1 \xff", r"a\.txt cannot be read: 'utf-8' codec"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], r"a\.jsonl\.gz cannot be read: Compressed file ended"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"no parquet at all", r"a\.parquet cannot be read"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        list(TokenBatches(tmp_path / name, tokenizer()))
    assert error.value.page == "data-unreadable"


def test_a_folder_has_one_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("w1")
    jsonl(tmp_path)
    with pytest.raises(DataError, match=r"expected files of one kind, found \.jsonl, \.txt; give a pattern, such as"):
        TokenBatches(tmp_path, tokenizer())


def test_broken_tables(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"text": "w1"}, {"text": None}]), tmp_path / "a.parquet")
    parquet.write_table(Table.from_pylist([{"txt": "w1"}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: expected a text, found nothing"):
        list(TokenBatches(tmp_path / "a.parquet", tokenizer()))
    with pytest.raises(DataError, match=r"b\.parquet: expected one of the fields text, .* found txt"):
        TokenBatches(tmp_path / "b.parquet", tokenizer())
    table = pytest.importorskip("datasets").Dataset.from_list([{"txt": "w1"}])
    with pytest.raises(DataError, match=r"Dataset: expected one of the fields text, .* found txt"):
        TokenBatches(table, tokenizer())
    splits = pytest.importorskip("datasets").DatasetDict(train=table, test=table)
    with pytest.raises(DataError, match="expected split= to be one of train, test, found None"):
        TokenBatches(splits, tokenizer())


@pytest.mark.parametrize(
    "records, label, told",
    [
        ([{"text": "w1", "n": "x"}], "n", "item 0 of the texts: expected the label 'n' to be an int, found str 'x'"),
        ([{"text": "w1", "n": [1]}], "n", "expected the label 'n' to be an int, found a list of 1"),
        ([{"text": "w1", "n": 1 << 63}], "n", "expected the label 'n' to be an int, found int '9223372036854775808'"),
        ([{"text": "w1", "n": 1.0}], "n", "expected the label 'n' to be an int, found float '1.0'"),
        ([{"text": "w1"}], "n", r"expected the label 'n' to be an int, found nothing \(null\)"),
        ([{"tokens": [1, 2], "n": [1]}], "n", "expected the label 'n' to be an int or 2 of them, found a list of 1"),
        (["w1"], "n", "label_field='n' needs records with fields, found str"),
    ],
)
def test_broken_labels(records: list[Any], label: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        list(TokenBatches(records, tokenizer(), label_field=label))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source": 5}, "expected a path, a dataset or an iterable of texts or token ids, found int"),
    ({"source": {"a": 1}}, "found dict"),
    ({"source": "gone.jsonl"}, r"gone\.jsonl: expected a file, a pattern, or a folder .* give split= as well"),
    ({"source": ["gone.jsonl", "w1 w2"]}, "expected paths after 'gone.jsonl', found 'w1 w2'"),
    ({"tokenizer": None}, "list has texts; give a tokenizer"),
    ({"tokenizer": 5}, "expected a transformers tokenizer or a path of one, found int"),
    ({"tokenizer": "/no/such"}, "no tokenizer can be read from /no/such"),
    ({"context_size": 0}, "context_size: expected a number from 1, found 0"),
    ({"context_size": 1}, "context_size: expected 2 or more with a BOS"),
    ({"batch_size": 2.5}, "batch_size: expected a number from 1, found 2.5"),
    ({"shuffle": -1}, "shuffle: expected a number from 1, found -1"),
    ({"max_batches": 0}, "max_batches: expected a number from 1, found 0"),
    ({"prefetch": -1}, "prefetch: expected a number from 0, found -1"),
    ({"overflow": "drop", "packing": False}, "overflow: expected 'cut' or 'split', found 'drop'"),
    ({"overflow": "split"}, "overflow= is for packing=False"),
    ({"separator": "eos", "packing": False}, "separator= is for packing=True"),
    ({"pad_to": "left"}, "pad_to: expected 'longest' or 'context', found 'left'"),
    ({"exclude_tokens": ["w1 w2"]}, "exclude_tokens: expected 'w1 w2' to be one token of .*, found 2"),
    ({"exclude_tokens": [2.5]}, "exclude_tokens: expected an id or a token, found 2.5"),
    ({"separator": "sep"}, "separator: the tokenizer .* has no SEP; give an id"),
    ({"source": [[1]], "tokenizer": None, "prepend_bos": True}, "prepend_bos=True: expected .* a tokenizer that knows"),
]


@pytest.mark.parametrize("given, told", BAD, ids=[told[:30] for _, told in BAD])
def test_bad_arguments(given: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        TokenBatches(**{"source": TEXTS, "tokenizer": tokenizer(), **given})
    assert error.value.page in ("bad-argument", "data-unreadable")


@pytest.mark.parametrize("package, name", [("pyarrow", "a.parquet"), ("pyarrow", "a.jsonl.zst"), ("datasets", "x/y")])
def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, name: str) -> None:
    real = importlib.import_module

    def absent(module: str, *more: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError
        return real(module, *more)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    source, split = (name, "train") if package == "datasets" else (tmp_path / name, None)
    with pytest.raises(DataError, match=f"these texts need {package}; run: pip install {package}") as error:
        TokenBatches(source, tokenizer(), split=split)
    assert error.value.page == "not-installed"


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from flex_model.texts import TokenBatches\n"
        "assert next(iter(TokenBatches([[1, 2, 3]]))).input_ids.shape == (1, 128)\n"
        "print([m for m in ('transformers', 'tokenizers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
