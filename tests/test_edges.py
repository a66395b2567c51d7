"""Edge attribution: against single edges patched by hand in plain torch, against attribution of whole nodes, and the
same whatever is parallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
from oracle import relative_error
from test_lens import inputs, placed
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, FlexModelError
from flex_model.errors import ComponentError
from flex_model.lens import EdgeAttribution, attribution_patching, edge_attribution

HEADS, SIZE = 4, 8


def metric(logits: Tensor) -> Tensor:
    """Of every position, so that all edges to the logits count."""
    return logits.log_softmax(-1)[..., 5].mean()


class Names(NamedTuple):
    """A family's modules: of the model its layers, what embeds and the last norm; of a layer the others."""

    layers: str
    norm: str
    attention: str
    mixes: str
    ln1: str
    ln2: str


LLAMA = Names(
    "model.layers",
    "model.norm",
    "self_attn",
    "self_attn.o_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
FAMILIES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mixtral": LLAMA,
    "gpt2": Names("transformer.h", "transformer.ln_f", "attn", "attn.c_proj", "ln_1", "ln_2"),
}


def double(family: str) -> Any:
    """In double precision throughout, with weights large enough that edges matter."""
    model: Any = models.make(family)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):  # transformers' compute in single precision
            new = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            new.weight = module.weight
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    if hasattr(model.config, "num_local_experts"):  # grouped products have no double precision
        model.set_experts_implementation("eager")
    model.set_attn_implementation("sdpa")  # eager softmax is in single precision
    return model.double()


class ByHand:
    """A plain model in which one edge is patched: only one part reads the stream with what another writes otherwise."""

    def __init__(self, family: str) -> None:
        self.model, self.names = double(family), FAMILIES[family]
        self.layers = self.model.get_submodule(self.names.layers)
        self.change = {k: v - self._written(True)[k] for k, v in self._written(False).items()}

    def _written(self, other: bool) -> dict[str, Tensor]:
        """What each source writes."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def on(module: nn.Module, fn: Callable[..., Any], pre: bool = False) -> None:
                register = module.register_forward_pre_hook if pre else module.register_forward_hook
                stack.callback(register(fn).remove)

            on(self.layers[0], lambda m, args: found.update(embed=args[0]), pre=True)
            for i, layer in enumerate(self.layers):
                on(layer.mlp, lambda m, args, out, i=i: found.update({f"m{i}": out}))
                on(layer.get_submodule(self.names.mixes), self._heads(i, found), pre=True)
            with torch.no_grad():
                self.model(**inputs(other))
        return found

    def _heads(self, i: int, found: dict[str, Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            for head in range(HEADS):
                alone = torch.zeros_like(args[0])
                where = slice(head * SIZE, (head + 1) * SIZE)
                alone[..., where] = args[0][..., where]
                found[f"a{i}.h{head}"] = module.forward(alone) - module.forward(torch.zeros_like(alone))

        return keep

    def metric(self, source: str, target: str, step: float) -> float:
        """Of the corrupted run, with a part of the step to the clean run on one edge."""
        with torch.no_grad(), ExitStack() as stack:
            stack.callback(self._patch(target, step * self.change[source]).remove)
            return float(metric(self.model(**inputs(True)).logits))

    def _patch(self, target: str, more: Tensor) -> Any:
        if target == "logits":
            norm = self.model.get_submodule(self.names.norm)
            return norm.register_forward_pre_hook(lambda m, args: (args[0] + more,))
        layer = self.layers[int(target[1])]
        if target[0] == "m":
            norm = layer.get_submodule(self.names.ln2)
            return norm.register_forward_pre_hook(lambda m, args: (args[0] + more,))
        norm, attention = layer.get_submodule(self.names.ln1), layer.get_submodule(self.names.attention)
        projection, start = self._columns(attention, int(target[4]), target[-2])
        seen: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))

        def edit(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            handle.remove()  # before the norm is called again
            other = module.forward(norm(seen[0] + more))
            out = out.clone()
            out[..., start : start + SIZE] = other[..., start : start + SIZE]
            return out

        return projection.register_forward_hook(edit)

    @staticmethod
    def _columns(attention: nn.Module, head: int, which: str) -> tuple[nn.Module, int]:
        if hasattr(attention, "c_attn"):
            return attention.c_attn, ("qkv".index(which) * HEADS + head) * SIZE
        return attention.get_submodule(f"{which}_proj"), head * SIZE


EDGES = [
    *[("embed", "a0.h1<q>"), ("embed", "a0.h0<v>"), ("embed", "m0"), ("embed", "a1.h1<k>"), ("embed", "logits")],
    *[("a0.h2", "m0"), ("a0.h3", "a1.h2<q>"), ("a0.h0", "a1.h1<k>"), ("a0.h1", "a1.h0<v>"), ("a0.h1", "m1")],
    *[("m0", "a1.h3<q>"), ("m0", "a1.h1<v>"), ("m0", "m1"), ("a1.h2", "m1"), ("a1.h0", "logits"), ("m1", "logits")],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_single_edges_patched_by_hand(family: str) -> None:
    """The score is the derivative of the metric along the step, by central differences."""
    found = edge_attribution(FlexModel(double(family)), inputs(), inputs(True), metric)
    hand = ByHand(family)
    step, close = (1e-2, 1e-3) if family == "mixtral" else (1e-3, 1e-5)  # its router computes in single precision
    scale = float(found.scores.abs().max())
    for source, target in EDGES:
        slope = (hand.metric(source, target, step) - hand.metric(source, target, -step)) / (2 * step)
        score = float(found.scores[found.sources.index(source), found.targets.index(target)])
        assert score == pytest.approx(slope, rel=close, abs=close / 100 * scale), (source, target)
        assert score


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_of_a_node_sum_to_its_attribution(family: str) -> None:
    fm = FlexModel(double(family))
    found = edge_attribution(fm, inputs(), inputs(True), metric)
    sums = dict(zip(found.sources, found.scores.sum(1).tolist(), strict=True))
    whole = {"embed": attribution_patching(fm, inputs(), inputs(True), metric).effect[0].sum()}
    for part, letter in (("mlp_out", "m"), ("z", "a")):
        for layer, effect in enumerate(
            attribution_patching(
                fm, inputs(), inputs(True), metric, component=part, over="head" if part == "z" else "position"
            ).effect
        ):
            if part == "z":
                whole |= {f"{letter}{layer}.h{h}": e for h, e in enumerate(effect)}
            else:
                whole[f"{letter}{layer}"] = effect.sum()
    assert sums.keys() == whole.keys()
    for source, effect in whole.items():
        assert sums[source] == pytest.approx(float(effect), rel=1e-9, abs=1e-12), source


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_blocks_sum_what_their_heads_do(family: str) -> None:
    fm = FlexModel(double(family) if family != "gemma3" else models.make(family))
    blocks = edge_attribution(fm, inputs(), inputs(True), metric, parts="block")
    assert blocks.sources == ("embed", "a0", "m0", "a1", "m1") and blocks.targets == (
        *("a0", "m0", "a1", "m1", "logits"),
    )
    if family == "gemma3":  # a norm comes between its heads and the stream
        with pytest.raises(ComponentError, match=r"do not write what its attention does.*use parts='block'"):
            edge_attribution(fm, inputs(), inputs(True), metric)
        last = attribution_patching(fm, inputs(), inputs(True), metric, component="attn_out").effect.sum(1)
        assert relative_error(blocks.scores[[1, 3]].sum(1), last) < 1e-4
        return
    heads = edge_attribution(fm, inputs(), inputs(True), metric)
    for i, source in enumerate(blocks.sources):
        for j, target in enumerate(blocks.targets):
            rows = [k for k, n in enumerate(heads.sources) if n.partition(".")[0] == source]
            columns = [k for k, n in enumerate(heads.targets) if n.partition(".")[0] == target]
            want = float(heads.scores[rows][:, columns].sum())
            assert float(blocks.scores[i, j]) == pytest.approx(want, rel=1e-9, abs=1e-12)
            assert bool(blocks.exists[i, j]) == bool(heads.exists[rows][:, columns].all())


def test_attention_and_mlp_side_by_side() -> None:
    """GPT-NeoX: an MLP does not read the heads of its own layer."""
    import transformers

    sizes = dict(vocab_size=66, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model: Any = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).eval().double()
    fm = FlexModel(model)
    found = edge_attribution(fm, inputs(), inputs(True), metric)
    assert not found.exists[found.sources.index("a0.h0"), found.targets.index("m0")]
    assert found.exists[found.sources.index("a0.h0"), found.targets.index("m1")]
    effect = attribution_patching(fm, inputs(), inputs(True), metric, component="z", over="head").effect
    rows = [found.sources.index(f"a{i // 4}.h{i % 4}") for i in range(8)]
    assert relative_error(found.scores[rows].sum(1), effect.flatten()) < 1e-9


def test_two_forwards_and_the_model_stays_as_it_was() -> None:
    model = double("gpt2")
    before = {n: p.clone() for n, p in model.named_parameters()}
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, args: calls.append(1))
    edge_attribution(FlexModel(model), inputs(), inputs(True), metric)
    handle.remove()
    assert len(calls) == 2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- whatever is parallel --------------------------------------------------------------------------------------
def _spread(engine: str, path: str) -> list[Any]:
    model, mine = placed(engine, path)
    fm = FlexModel(model)
    found = edge_attribution(fm, mine(inputs()), mine(inputs(True)), metric)
    return [found.scores.tolist(), found.sources, found.targets, found.clean, found.corrupted]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_the_same_on_two_ranks(engine: str, path: str) -> None:
    alone = edge_attribution(FlexModel(models.make("llama")), inputs(), inputs(True), metric)
    for scores, sources, targets, clean, corrupted in run_world(2, _spread, engine, path):
        assert (sources, targets) == (alone.sources, alone.targets)
        assert (clean, corrupted) == pytest.approx((alone.clean, alone.corrupted), rel=1e-4)
        assert relative_error(torch.tensor(scores), alone.scores) < 1e-4


# -- results and bad input -------------------------------------------------------------------------------------
def test_table_picture_and_top() -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("plotly")
    found: EdgeAttribution = edge_attribution(FlexModel(models.make("llama")), inputs(), inputs(True), metric)
    assert found.scores.shape == (1 + 2 * (4 + 1), 2 * (4 + 2 + 2 + 1) + 1)
    assert float(found.scores[~found.exists].abs().max()) == 0
    table = found.to_dataframe()
    assert list(table.columns) == ["source", "target", "score"] and len(table) == int(found.exists.sum())
    assert not ((table["source"] == "m0") & (table["target"] == "m0")).any()
    best = table.loc[table["score"].abs().idxmax()]
    assert found.top(3)[0] == (best["source"], best["target"], best["score"])
    sizes = [abs(score) for _, _, score in found.top(10_000)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(table)
    assert list(found.plot().data[0].y) == list(found.sources)


def test_bad_input() -> None:
    fm = FlexModel(models.make("llama"))
    with pytest.raises(FlexModelError, match="parts='neuron' is unknown"):
        edge_attribution(fm, inputs(), inputs(True), metric, parts="neuron")  # type: ignore[arg-type]
    with pytest.raises(FlexModelError, match="need input_ids of one shape"):
        edge_attribution(fm, inputs(), {"input_ids": inputs()["input_ids"][:, :3]}, metric)
    with pytest.raises(ComponentError):  # its norms come after the sums
        edge_attribution(FlexModel(models.make("bert")), inputs(), inputs(True), metric)
