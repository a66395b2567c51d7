"""Induction heads on tiny models: scores and removals by hand in plain torch, and the same whatever is parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from oracle import relative_error
from test_edits import Collectives
from test_lens import placed
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel
from flex_model.errors import ComponentError
from flex_model.lens import Induction, induction_scores, measure, remove_heads, repeated_tokens, top_heads

IDS = repeated_tokens(4, 16, low=1, high=60)
FAMILIES = ("llama", "gpt2", "qwen3", "gemma3", "mixtral", "gpt_oss")


def oracle(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        patterns = model(ids, output_attentions=True).attentions
    return torch.stack([p.diagonal(1 - ids.shape[1] // 2, -2, -1).mean((0, 2)) for p in patterns])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_by_hand(family: str) -> None:
    model = models.make(family)
    found = induction_scores(FlexModel(model), IDS)
    assert found.shape == (2, 4)
    assert relative_error(found, oracle(model, IDS)) < 1e-6


@pytest.mark.parametrize(("family", "projection"), [("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj")])
def test_removed_heads_write_nothing(family: str, projection: str) -> None:
    model = models.make(family)
    layers = model.model.layers if family == "llama" else model.transformer.h  # type: ignore[union-attr]
    with torch.no_grad(), remove_heads(FlexModel(model), [(1, 0), (0, 2), (1, 3), (0, 2)]):
        found = model(IDS).logits
    for layer, heads in ((0, [2]), (1, [0, 3])):

        def without(module: Any, args: tuple[Tensor], heads: list[int] = heads) -> Tensor:
            z = args[0].unflatten(-1, (4, 8)).clone()
            z[..., heads, :] = 0
            return z.flatten(-2)

        layers[layer].get_submodule(projection).register_forward_pre_hook(without)  # type: ignore[union-attr, index]
    with torch.no_grad():
        assert torch.equal(found, model(IDS).logits)


class Moved(Collectives):
    """Elements of all tensors that collectives were given."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.seen)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.seen) > before:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            self.elements += sum(t.numel() for t in leaves if isinstance(t, Tensor))
        return out


def _spread(engine: str, path: str) -> tuple[list[Any], Any, int, int]:
    model, mine = placed(engine, path)
    getattr(model, "module", model).set_attn_implementation("eager")
    fm = FlexModel(model)
    ids = mine({"input_ids": IDS})["input_ids"]
    found = measure(fm, ids, top=2)
    with torch.no_grad(), Moved() as plain:
        fm.full_output(fm(ids, use_cache=False))
    with Moved() as selected:
        assert torch.equal(induction_scores(fm, ids), found.scores)
    with torch.no_grad(), Moved() as patterns, fm.capture(fm.at("pattern")):
        fm.full_output(fm(ids, use_cache=False))
    more = [m.elements - plain.elements for m in (selected, patterns)]
    return [found.scores.tolist(), found.loss_without.second], found.removed, more[0], more[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_the_same_on_two_ranks(engine: str, path: str) -> None:
    alone = measure(FlexModel(models.make("llama")), IDS, top=2)
    for (scores, loss), removed, selected, patterns in run_world(2, _spread, engine, path):
        assert relative_error(torch.tensor(scores), alone.scores) < 1e-5
        assert loss == pytest.approx(alone.loss_without.second, rel=1e-5)
        assert removed == alone.removed
        assert patterns > 2 * 4 * 4 * 32 * 32 / 2  # what a shard of two layers' patterns is
        assert selected < patterns / 100


def test_attention_without_probabilities_is_refused() -> None:
    model: Any = models.make("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ComponentError, match="attn_implementation='eager'"):
        measure(FlexModel(model), IDS)


def test_heads_that_are_none_are_refused() -> None:
    fm = FlexModel(models.make("llama"))
    with pytest.raises(ComponentError, match="'z' has no head 4"), remove_heads(fm, [(0, 1), (1, 4)]):
        pass
    with pytest.raises(ComponentError, match="there is no layer 2"), remove_heads(fm, [(2, 0)]):
        pass


def test_table_and_picture() -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("plotly")
    found: Induction = measure(FlexModel(models.make("llama")), IDS, top=2)
    table = found.to_dataframe()
    assert list(table.columns) == ["layer", "head", "score", "removed"] and len(table) == 8
    gone = {(r.layer, r.head) for r in table[table["removed"]].itertuples()}
    assert gone == set(found.removed) == {h for h, _ in top_heads(found.scores, 2)}
    outlined = {(s.x0 + 0.5, s.y0 + 0.5) for s in found.plot().layout.shapes}
    assert outlined == gone
