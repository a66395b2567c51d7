"""Probes: equal to plain torch on values taken by hand, and the same under every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import leaves, relative_error
from test_lens import placed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from flex_model import FlexModel, FlexModelError, edits
from flex_model.lens import Probe, steering_vector, train_probe, train_probes
from flex_model.lens.patching import Inputs

Batch = tuple[dict[str, Tensor], Tensor]
ROWS, LENGTH = 8, 6


def data(seed: int = 0, count: int = 3, kind: str = "class") -> list[Batch]:
    """Batches padded on the right, the last one on the left and longer; labels that follow from the tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = LENGTH + (2 if number == count - 1 else 0)
        ids = torch.randint(1, 60, (ROWS, length), generator=generator)
        lengths = torch.randint(2, length + 1, (ROWS,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        mask = mask.flip(1) if number == count - 1 else mask
        labels = {
            "class": (ids * mask).sum(1) % 3,
            "two": (ids[:, 0] > 30).long(),
            "every": torch.where(ids % 5 == 0, -100, ids % 2),
            "float": (ids * mask).sum(1) / 60,
        }[kind]
        found.append(({"input_ids": ids, "attention_mask": mask}, labels))
    return found


def plain_values(batches: list[Batch], layer: int) -> list[Tensor]:
    """(B, S, D) of each batch, by a plain hook."""
    model, seen = models.make("llama"), []
    handle = model.model.layers[layer].register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        for inputs, _ in batches:
            model(**inputs)
    handle.remove()
    return seen


def plain_rows(batches: list[Batch], layer: int, tokens: str) -> tuple[Tensor, Tensor]:
    """Row by row, in float64."""
    rows, labels = [], []
    for (inputs, given), values in zip(batches, plain_values(batches, layer), strict=True):
        for row, mask, label in zip(values.double(), inputs["attention_mask"].bool(), given, strict=True):
            real = row[mask]
            if tokens == "every":
                kept = label[mask] != -100
                rows += list(real[kept])
                labels += label[mask][kept].tolist()
            else:
                rows.append(real[-1] if tokens == "last" else real.mean(0))
                labels.append(label.item())
    return torch.stack(rows), torch.tensor(labels)


def by_hand(x: Tensor, y: Tensor, decay: float = 0.01) -> tuple[Tensor, Tensor]:
    """The minimum of the loss, found with Newton's method on autograd's Hessian."""
    mean, std = x.mean(0), x.std(0, correction=0)
    z = (x - mean) / std
    classes = int(y.max()) + 1

    def loss(flat: Tensor) -> Tensor:
        w = flat.view(classes, -1)
        logits = z @ w[:, :-1].T + w[:, -1]
        return cross_entropy(logits, y) + decay / 2 * w[:, :-1].pow(2).sum()

    flat = torch.zeros(classes * (x.shape[1] + 1), dtype=torch.float64)
    for _ in range(12):
        gradient = torch.func.grad(loss)(flat)
        hessian = torch.func.hessian(loss)(flat)
        flat = flat - torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution
    w = flat.view(classes, -1)
    weight = w[:, :-1] / std
    return weight, w[:, -1] - weight @ mean


# -- the same as by hand ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "kind"), [("last", "class"), ("mean", "class"), ("every", "every")])
def test_linear_probes_by_hand(tokens: Any, kind: str) -> None:
    batches, test = data(kind=kind), data(seed=1, kind=kind)
    sweep = train_probes(FlexModel(models.make("llama")), batches, tokens=tokens, test=test)
    assert sweep.layers == (0, 1) and sweep.accuracy.shape == (2,)
    for layer in range(2):
        x, y = plain_rows(batches, layer, tokens)
        weight, bias = by_hand(x, y)
        probe = sweep[layer]
        assert relative_error(probe.weight, weight) < 1e-5 and relative_error(probe.bias, bias) < 1e-5
        logits = x @ weight.T + bias
        assert relative_error(probe(x), logits) < 1e-5
        assert probe.train_score == pytest.approx(float((logits.argmax(-1) == y).double().mean()))
        others, theirs = plain_rows(test, layer, tokens)
        predicted = (others @ weight.T + bias).argmax(-1)
        assert probe.accuracy == probe.test_score == pytest.approx(float((predicted == theirs).double().mean()))
        assert torch.equal(probe.predicted, predicted) and torch.equal(probe.labels, theirs)
    alone = train_probe(FlexModel(models.make("llama")), batches, layer=1, tokens=tokens)
    assert torch.equal(alone.weight, sweep[1].weight) and alone.accuracy == sweep[1].train_score


def test_a_regression_by_hand() -> None:
    """Ridge regression has a closed form."""
    batches, test = data(kind="float"), data(seed=1, kind="float")
    probe = train_probe(FlexModel(models.make("llama")), batches, layer=1, test=test)
    x, y = plain_rows(batches, 1, "last")
    y = y.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    z, t = (x - mean) / std, (y - y.mean()) / y.std(correction=0)
    ridge = torch.linalg.solve(z.T @ z + 0.01 / 2 * len(z) * torch.eye(z.shape[1]).double(), z.T @ t)
    weight = ridge / std * y.std(correction=0)
    assert relative_error(probe.weight[0], weight) < 1e-5 and relative_error(probe.direction, weight) < 1e-5
    others, theirs = plain_rows(test, 1, "last")
    predicted = (others - mean) @ weight + y.mean()
    assert relative_error(probe(others), predicted) < 1e-5
    residual = (predicted - theirs).pow(2).sum() / (theirs - theirs.mean()).pow(2).sum()
    assert probe.score == pytest.approx(1 - float(residual), abs=1e-5)
    with pytest.raises(FlexModelError, match="a regression has no accuracy"):
        _ = probe.accuracy


def test_an_attention_probe_by_hand() -> None:
    """Trained sequence by sequence, of its real tokens alone."""
    batches, queries, decay = data(), 2, 0.02
    probe = train_probe(
        FlexModel(models.make("llama")),
        batches,
        layer=0,
        kind="attention",
        queries=queries,
        weight_decay=decay,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0),
        epochs=20,
        batch_size=1000,
        seed=3,
    )
    sequences = [
        row[mask].double()
        for (inputs, _), values in zip(batches, plain_values(batches, 0), strict=True)
        for row, mask in zip(values, inputs["attention_mask"].bool(), strict=True)
    ]
    y = torch.cat([labels for _, labels in batches])
    every = torch.cat(sequences)
    mean, std = every.mean(0), every.std(0, correction=0)
    drawn = torch.randn(queries, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    query = nn.Parameter(drawn / 32**0.5)
    weight, bias = (nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in ((queries, 3, 32), (3,)))
    optimizer = torch.optim.AdamW([weight, bias, query], lr=0.05, weight_decay=0)

    def logits(x: Tensor) -> Tensor:
        z = (x - mean) / std
        out = bias
        for q, w in zip(query, weight, strict=True):
            out = out + w @ (torch.softmax(z @ q, 0) @ z)
        return out

    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(torch.stack([logits(x) for x in sequences]), y)
        (loss + decay / 2 * (weight.pow(2).sum() + query.pow(2).sum())).backward()
        optimizer.step()
    found = torch.stack([logits(x) for x in sequences]).detach()
    assert probe.train_score == pytest.approx(float((found.argmax(-1) == y).double().mean()))
    for x, want in zip(sequences, found, strict=True):
        padded = torch.cat([x, torch.full((2, 32), 7.0, dtype=torch.float64)])
        got = probe(padded[None], torch.tensor([[1] * len(x) + [0, 0]]))
        assert relative_error(got[0], want) < 1e-5
    assert probe.weight.shape == (2, 3, 32) and probe.query is not None


def test_what_lies_at_padding_is_not_read() -> None:
    """Other tokens there, more of them, or none."""

    def padded(token: int, more: int) -> list[Batch]:
        out = []
        for inputs, labels in data()[:2]:  # on the right, where no token attends to it
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            ids = torch.where(mask == 1, ids, token)
            extra = torch.full((ROWS, more), token)
            mask = torch.cat([mask, torch.zeros(ROWS, more, dtype=torch.long)], 1)
            out.append(({"input_ids": torch.cat([ids, extra], 1), "attention_mask": mask}, labels))
        return out

    fm = FlexModel(models.make("llama"))
    for keywords in ({}, {"tokens": "mean"}, {"kind": "attention", "epochs": 5}):
        one, two = (train_probe(fm, padded(*x), layer=1, **keywords) for x in ((1, 0), (50, 3)))
        assert relative_error(one.weight, two.weight) < 1e-5 and torch.equal(one.predicted, two.predicted)
    without = [({"input_ids": inputs["input_ids"]}, labels) for inputs, labels in data()]
    full = [({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, labels) for inputs, labels in without]
    one, two = (train_probe(fm, x, layer=1) for x in (without, full))
    assert torch.equal(one.weight, two.weight)


def test_the_direction_moves_the_logit_as_it_says() -> None:
    fm = FlexModel(models.make("llama"))
    for keywords in ({}, {"kind": "attention", "queries": 3, "epochs": 5}):
        probe = train_probe(fm, data(kind="two"), layer=1, **keywords)
        x = plain_values(data(kind="two")[:1], 1)[0] if keywords else plain_values(data(kind="two")[:1], 1)[0][:, -1]
        moved = probe(x + 0.5 * probe.direction) - probe(x)
        want = 0.5 * probe.direction.double().pow(2).sum()
        assert relative_error(moved[:, 1] - moved[:, 0], want.expand(len(x))) < 1e-4
    with fm.edit(fm.at("resid_post", 1), edits.add(probe.direction)), torch.no_grad():
        fm(**data()[0][0])
    with pytest.raises(FlexModelError, match="3 classes has no one direction"):
        _ = train_probe(fm, data(), layer=0).direction


def test_heads_and_other_components() -> None:
    fm = FlexModel(models.make("llama"))
    every = train_probe(fm, data(), layer=0, component="z")
    one = train_probe(fm, data(), layer=0, component="z", head=1)
    few = train_probe(fm, data(), layer=0, component="z", head=[1, 3], tokens="mean")
    assert [p.weight.shape[1] for p in (every, one, few)] == [32, 8, 16] and every.layer == one.layer == 0
    assert every(torch.ones(5, 4, 8)).shape == every(torch.ones(5, 32)).shape == (5, 3)
    outside = train_probe(fm, data(), component="ln_final")
    assert outside.layer is None and outside.weight.shape == (3, 32)
    sweep = train_probes(fm, data(), layers=[-1], component="mlp_post")
    assert sweep.layers == (1,) and sweep.best is sweep[1] and len(sweep) == 1 and list(sweep) == [sweep[1]]
    with pytest.raises(FlexModelError, match="no probe of layer 7; there are of 1"):
        sweep[7]


def test_units_that_do_not_vary_get_no_weight() -> None:
    model = models.make("llama")
    model.model.layers[0].register_forward_hook(lambda m, a, o: torch.cat([o[..., :-1], o[..., -1:] * 0 + 3], -1))
    fm = FlexModel(model)
    for keywords in ({}, {"kind": "attention", "epochs": 3}):
        probe = train_probe(fm, data(), layer=1, component="resid_pre", **keywords)
        assert float(probe.weight[..., -1].abs().max()) == 0 < float(probe.weight[..., 0].abs().max())


# -- the same under every engine -------------------------------------------------------------------------------
def _cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind of labels and keywords, by name."""
    sgd: Any = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    return {
        "last": ("class", {}),
        "mean": ("class", {"tokens": "mean"}),
        "every": ("every", {"tokens": "every"}),
        "sgd": ("class", {"optimizer": sgd, "batch_size": 5, "epochs": 4}),
        "regression": ("float", {}),
        "attention": ("class", {"kind": "attention", "queries": 2, "batch_size": 7, "epochs": 5}),
        "heads": ("class", {"component": "z"}),
        "one head": ("class", {"component": "z", "head": 3, "tokens": "mean"}),
    }


def _all(fm: FlexModel, mine: Callable[[Inputs], Inputs]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, (kind, keywords) in _cases().items():
        parts = []
        for batches in (data(kind=kind), data(seed=1, kind=kind)):
            split = (mine({**inputs, "labels": labels}) for inputs, labels in batches)
            parts.append([({k: v for k, v in x.items() if k != "labels"}, x["labels"]) for x in split])
        sweep = train_probes(fm, parts[0], test=iter(parts[1]), **keywords)
        probes = [[p.weight.flatten(), p.bias, *([] if p.query is None else [p.query.flatten()])] for p in sweep]
        scores = [[p.train_score, p.test_score] for p in sweep]
        found[name] = [torch.cat([t for p in probes for t in p]).tolist(), scores]
    clean, other = (mine(b[0]) for b in data(kind="two")[:2])
    found["steering"] = [steering_vector(fm, clean, other, layer=1, method="probe").vector.tolist(), []]
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    return _all(FlexModel(models.make("llama")), lambda batch: batch)


def _spread(engine: str, path: str) -> dict[str, list[Any]]:
    if engine == "pp":
        from test_pipeline_transformers import load

        return _all(FlexModel(load("llama", Path(path))[1]), lambda batch: batch)
    model, mine = placed(engine, path)
    return _all(FlexModel(model), mine)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "pp"])
def test_the_same_under_every_engine(engine: str, path: str, alone: dict[str, list[Any]]) -> None:
    for found in run_world(2, _spread, engine, path):
        for name, (weights, scores) in alone.items():
            error = relative_error(torch.tensor(found[name][0]), torch.tensor(weights))
            assert error < 1e-5, f"{name} is off by {error:.1e}"
            assert relative_error(torch.tensor(found[name][1]), torch.tensor(scores)) < 1e-5, name


class Bytes(TorchDispatchMode):
    """What goes through collectives, sent and received."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.moved += sum(t.numel() * t.element_size() for t in leaves(args))
        return func(*args, **(kwargs or {}))


def _moved() -> list[int]:
    fm = FlexModel(nn.parallel.DistributedDataParallel(models.make("llama")))
    rank = dist.get_rank()
    batches = [({"input_ids": x["input_ids"].chunk(2)[rank]}, y.chunk(2)[rank]) for x, y in data(count=1)]
    found = []
    for tokens in ("last", "mean"):
        for _ in range(2):  # layouts are found in the first
            with Bytes() as run:
                train_probe(fm, batches, layer=1, tokens=tokens, epochs=1)
        found.append(run.moved)
    return found


def test_only_the_last_tokens_move() -> None:
    row = 32 * 4  # float32
    for last, every in run_world(2, _moved):
        assert every - last == (ROWS // 2 + ROWS) * (LENGTH + 2 - 1) * row and last < (ROWS // 2 + ROWS) * 2 * row


# -- steering --------------------------------------------------------------------------------------------------
def test_steering_along_a_probe() -> None:
    (positive, _), (negative, _) = data(kind="two")[:2]
    fm = FlexModel(models.make("llama"))
    mean = steering_vector(fm, positive, negative, layer=1)
    found = steering_vector(fm, positive, negative, layer=1, method="probe")
    labels = [torch.ones(ROWS).long(), torch.zeros(ROWS).long()]
    probe = train_probe(fm, list(zip((positive, negative), labels, strict=True)), layer=1)
    assert float(found.vector.norm()) == pytest.approx(float(mean.vector.norm()), rel=1e-5)
    assert relative_error(found.vector / found.vector.norm(), probe.direction / probe.direction.norm()) < 1e-5
    assert found.separation[0] > 0 > found.separation[1]


# -- kept, shown -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "keywords"),
    [("class", {"test": data(seed=1)}), ("float", {}), ("two", {"kind": "attention", "epochs": 2})],
)
def test_save_and_load(kind: str, keywords: dict[str, Any], tmp_path: Path) -> None:
    probe = train_probe(FlexModel(models.make("llama")), data(kind=kind), layer=1, **keywords)
    again = Probe.load(probe.save(tmp_path / "probe.safetensors"))
    for name in Probe.__slots__:
        one, two = getattr(probe, name), getattr(again, name)
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two, name
    x = torch.randn(2, 3, 32)
    assert torch.equal(probe(x), again(x)) and [p.name for p in tmp_path.iterdir()] == ["probe.safetensors"]


def test_a_file_that_holds_no_probe(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FlexModelError, match="holds no probe"):
        Probe.load(tmp_path / "other.safetensors")


def test_tables_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("pandas")
    fm = FlexModel(models.make("llama"))
    sweep = train_probes(fm, data(), test=data(seed=1))
    table = sweep.to_dataframe()
    assert list(table.columns) == ["layer", "train", "test"] and list(table["layer"]) == [0, 1]
    assert list(table["test"]) == sweep.accuracy.tolist()
    rows = sweep[0].to_dataframe()
    assert list(rows.columns) == ["row", "label", "predicted"] and len(rows) == 3 * ROWS
    assert float((rows["label"] == rows["predicted"]).mean()) == pytest.approx(sweep[0].accuracy)
    figure = sweep[0].plot()
    assert sum(int(n) for row in figure.data[0].text for n in row) == 3 * ROWS
    assert [curve.name for curve in sweep.plot().data] == ["train", "test", "commonest class"]
    regression = train_probes(fm, data(kind="float"))
    assert list(regression.to_dataframe().columns) == ["layer", "train"]
    for one in (sweep, sweep[0], regression, regression[0]):
        one.plot().write_html(tmp_path / "picture.html")
        assert (tmp_path / "picture.html").stat().st_size > 1000


# -- bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"kind": "mlp"}, "kind='mlp' is unknown; expected 'linear' or 'attention'"),
        ({"tokens": "first"}, "tokens='first' is unknown; expected 'last', 'mean' or 'every'"),
        ({"layer": None}, "is in 2 layers; name one"),
        ({"component": "pattern"}, "'pattern' has none"),
        ({"epochs": 0}, "epochs=0; expected at least 1"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"queries": 0}, "queries=0; expected at least 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0; expected at least 0"),
        ({"optimizer": lambda p: torch.optim.SGD(p, 1e200)}, "training a probe diverged"),
        ({"tokens": "every"}, r"labels \(8,\); expected \(8, 6\), one a token"),
        ({"test": data(seed=1, kind="float")}, "labels are torch.int64 for training and torch.float32 in the test"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], words: str) -> None:
    fm = FlexModel(models.make("llama"))
    with pytest.raises(FlexModelError, match=words):
        train_probe(fm, data(), **{"layer": 1, **keywords})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x, y[:3]), "batch 0 has 3 labels for 8 rows"),
        (lambda x, y: (x, y[:, None]), r"labels \(8, 1\); expected \(8,\), one a row"),
        (lambda x, y: (x, y * 0 + 1), "all 24 labels are 1; a probe needs two kinds"),
        (lambda x, y: (x, y * 0.0), "all 24 labels are 0.0"),
        (lambda x, y: (x, y * float("nan")), "batch 0 has labels that are not finite"),
        (lambda x, y: (x, y * 0 - 100), "no row has a label"),
        (lambda x, y: (x, y - 1), "the label -1 is no class"),
        (lambda x, y: (x, {"a": 1}), "labels of batch 0 are a dict"),
        (lambda x, y: x, "batch 0 is a dict; expected a pair"),
        (lambda x, y: ({}, y), "batch 0 has neither input_ids nor inputs_embeds"),
        (lambda x, y: ({**x, "attention_mask": x["attention_mask"] * 0}, y), "a row of padding alone"),
        (lambda x, y: ({**x, "attention_mask": x["attention_mask"][:, None, None]}, y), "needs .batch, sequence."),
    ],
)
def test_bad_batches(change: Callable[..., Any], words: str) -> None:
    with pytest.raises(FlexModelError, match=words):
        train_probe(FlexModel(models.make("llama")), [change(*pair) for pair in data()], layer=1)


def test_bad_values() -> None:
    fm = FlexModel(models.make("llama"))
    with pytest.raises(FlexModelError, match="there are no batches"):
        train_probe(fm, [], layer=1)
    with pytest.raises(FlexModelError, match="labels are of several kinds"):
        train_probe(fm, [*data(), *data(kind="float")], layer=1)
    with pytest.raises(FlexModelError, match="the label 2 is no class of the training rows; they have 0 to 1"):
        train_probe(fm, data(kind="two"), layer=1, test=data())
    fm.module.model.layers[0].mlp.down_proj.weight.data[3] = float("nan")
    with pytest.raises(FlexModelError, match=r"'@resid_post.0' has values that are not finite in batch 0"):
        train_probe(fm, data(), layer=0)
    flat = FlexModel(models.make("opt"))
    with pytest.raises(FlexModelError, match=r"is no value \(batch, sequence, width\)"):
        train_probe(flat, data(), layer=0, component="mlp_post")
    with pytest.raises(FlexModelError, match=r"reads values \(..., 32\), got \(2, 9\)"):
        train_probe(flat, data(), layer=0)(torch.ones(2, 9))


def _short_on_one_rank() -> str:
    fm = FlexModel(nn.parallel.DistributedDataParallel(models.make("llama")))
    rank = dist.get_rank()
    mine = [({k: v.chunk(2)[rank] for k, v in x.items()}, y.chunk(2)[rank][rank:]) for x, y in data()]
    try:
        train_probe(fm, mine, layer=1)
    except FlexModelError as error:
        return str(error)
    return ""


def test_labels_that_one_rank_lacks() -> None:
    """Every rank raises it."""
    assert all("3 labels for 4 rows" in said for said in run_world(2, _short_on_one_rank))


def test_token_ids_alone_are_inputs() -> None:
    fm = FlexModel(models.make("llama"))
    pairs = [(x["input_ids"], y) for x, y in data()]
    alone = train_probe(fm, pairs, layer=1, test=pairs[:1])
    named = train_probe(fm, [({"input_ids": x}, y) for x, y in pairs], layer=1)
    assert torch.equal(alone.weight, named.weight) and len(alone.predicted) == len(pairs[0][1])
