"""Mixtures of experts: every named module under every way of spreading experts, and rows that are tokens at experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
import torch.distributed as dist
from oracle import own_experts, plain_hooks, relative_error
from test_delivery import Wire
from test_families import RANKS, SIZES, compare, place, run, saved, unwrapped
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import EditError, FlexModelError, LayoutError
from flex_model.routing.assembly import Parts
from flex_model.routing.rows import Rows

ACT = "model.layers.1.mlp.experts.act_fn"
BOTH = ("ep_tp", "ep_fsdp")
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
CASES = [
    *((e, f, "grouped_mm") for f in models.MIXTURES for e in ("ddp", *BOTH)),
    *((e, "qwen3_moe", i) for i in ("eager", "batched_mm") for e in ("none", "fsdp2", "tp", *BOTH)),
    *((e, "qwen3_moe", "grouped_mm") for e in RANKS if e.startswith("ep_") and RANKS[e] == 4),
    ("ep_over_tp_fsdp", "qwen3_moe", "eager"),
    ("ep_over_tp_fsdp", "deepseek_v3", "grouped_mm"),
]


@pytest.mark.parametrize(("engine", "family", "experts"), CASES)
def test_parity(engine: str, family: str, experts: str, tmp_path: Path) -> None:
    path = saved(models.make(family), tmp_path, engine)
    counts = run(engine, compare, family, path, torch.float32, 1e-5, experts)
    print(f"{family}, {experts}/{engine}: {counts[0]}")
    for count in counts:
        assert not count.wrong and not count.refused and count.exact == count.tried


def each(engine: str, function: Callable[..., Any], path: Path, cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Cases of one engine one after the other, in the same processes."""
    return [function(engine, path, *case) for case in cases]


# -- without gradients, and with experts that nobody asks for --------------------------------------------------------
def one_sided(model: nn.Module) -> None:
    """Every token chooses experts 0 and 1, which under expert parallelism are the first rank's."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))


def uneven(engine: str, path: Path, experts: str, backward: bool) -> Any:
    """Three samples and one, on routers that leave half of the experts without a token."""
    plain = models.make("deepseek_v3")
    placed = place(engine, plain, path)
    for model in (plain, unwrapped(placed.model)):
        one_sided(model)
        model.set_experts_implementation(experts)
    full = models.inputs("deepseek_v3")
    batch = slice(None) if placed.parts == 1 else slice(0, 3) if placed.index == 0 else slice(3, 4)
    mine = {k: v[batch] for k, v in full.items()}

    def plain_loss(model: nn.Module) -> Tensor:
        logits = model(**full).logits
        parts = [logits] if placed.parts == 1 else [logits[:3], logits[3:]]
        return sum(parity.square(p) for p in parts) / len(parts)  # type: ignore[return-value]

    types = parity.TYPES if backward else ("forward", "forward_pre")
    with torch.set_grad_enabled(backward):
        return parity.compare(
            placed.model, plain, lambda m: parity.square(m(**mine)), plain_loss, types=types, rows=True
        )


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("engine", ["ddp", *BOTH])
def test_ranks_without_tokens(engine: str, experts: str, tmp_path: Path) -> None:
    path = saved(models.make("deepseek_v3"), tmp_path, engine)
    for counts in run(engine, each, uneven, path, [(experts, True), (experts, False)]):
        for count, words in zip(counts, ("", ", no gradients"), strict=True):  # type: ignore[call-overload]
            print(f"deepseek_v3, one-sided, {experts}/{engine}{words}: {count}")
            assert not count.wrong
            assert all(
                "repeat themselves" in r and "experts.act_fn" not in r for r in count.refused
            )  # all tokens choose alike


# -- edits -----------------------------------------------------------------------------------------------------------
def scaled(x: Tensor, experts: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + experts.to(x.dtype).unsqueeze(-1))


def trained() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(16, 16)


def edited_oracle(full: dict[str, Tensor]) -> tuple[Tensor, nn.Module, nn.Linear]:
    plain, layer = models.make("qwen3_moe"), trained()
    with own_experts(plain) as ids:
        module = plain.get_submodule(ACT)
        module.register_forward_hook(lambda m, a, out: layer(scaled(out, ids[ACT.removesuffix(".act_fn")][1])))
        logits = plain(**full).logits
        parity.square(logits).backward()
    return logits.detach(), plain, layer


def edited(engine: str, path: Path, experts: str, checkpoint: bool = False) -> list[str]:
    full = models.inputs("qwen3_moe")
    want, plain, want_layer = edited_oracle(full)
    placed = place(engine, models.make("qwen3_moe"), path)
    model = unwrapped(placed.model)
    model.set_experts_implementation(experts)
    if checkpoint:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fm = FlexModel(placed.model)
    fm.register_trainable_module("layer", trained())

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any, call: Any) -> Tensor:
        return modules["layer"](scaled(x, call.experts))

    fm.register_forward_hook(HookFunction(ACT, editing_function=edit, capture=False))
    parameters = dict(fm.named_parameters())
    parameters = {n.removeprefix("module."): p for n, p in parameters.items()}
    output = fm(**{k: placed.mine(v) for k, v in full.items()}, use_cache=False)
    parity.square(output).backward()
    error = relative_error(fm.full_output(output).logits, want)
    bad = [f"logits: off by {error:.2g}"] * (error > 1e-5)
    bad += parity.wrong_gradients(fm, plain, {n: p for n, p in model.named_parameters()})
    for name, value in want_layer.named_parameters():
        grad = fm.trainable_modules["layer"].get_parameter(name).grad
        grad = grad.to_local() if hasattr(grad, "to_local") else grad
        error = relative_error(grad, value.grad)
        bad += [f"layer.{name}: off by {error:.2g}"] * (error > 1e-5)
    return bad


@pytest.mark.parametrize("engine", ["none", "ddp", "tp", *BOTH])
def test_edits_see_their_own_rows(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    results: Any = run(engine, each, edited, path, [(experts,) for experts in IMPLEMENTATIONS])
    for experts, *problems in zip(IMPLEMENTATIONS, *results, strict=True):
        print(f"edit of rows at experts, {experts}/{engine}: {sum(not p for p in problems)} exact of {len(problems)}")
        assert not any(problems)


@pytest.mark.parametrize("engine", ["ep_over_tp_fsdp", "ep_over_half_fsdp"])
def test_edits_on_four_ranks(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    assert run(engine, edited, path, "grouped_mm") == [[]] * 4


@pytest.mark.parametrize("engine", ["ddp", "ep_tp"])
def test_edits_under_checkpointing(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    assert run(engine, edited, path, "grouped_mm", True) == [[]] * 2


def gradient_edited(engine: str, path: Path) -> list[str]:
    full = models.inputs("qwen3_moe")
    plain = models.make("qwen3_moe")
    module = plain.get_submodule(ACT)
    module.register_full_backward_pre_hook(lambda m, g: (torch.tanh(1e6 * g[0]) * 1e-4,))
    parity.square(plain(**full)).backward()
    placed = place(engine, models.make("qwen3_moe"), path)
    fm = FlexModel(placed.model)
    fm.register_full_backward_pre_hook(HookFunction(ACT, editing_function=lambda g: torch.tanh(1e6 * g) * 1e-4))
    parity.square(fm(**{k: placed.mine(v) for k, v in full.items()}, use_cache=False)).backward()
    return parity.wrong_gradients(fm, plain, dict(unwrapped(placed.model).named_parameters()))


@pytest.mark.parametrize("engine", ["ddp", *BOTH])
def test_edited_gradients(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    assert run(engine, gradient_edited, path) == [[]] * 2


# -- parameters ------------------------------------------------------------------------------------------------------
def parameter_gradients(engine: str, path: Path) -> list[str]:
    full = models.inputs("qwen3_moe")
    plain = models.make("qwen3_moe")
    parity.square(plain(**full)).backward()
    placed = place(engine, models.make("qwen3_moe"), path)
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(placed.model, output, deliver="all")
    for name, _ in plain.named_parameters():
        fm.register_hook(HookFunction(name))
    parity.square(fm(**{k: placed.mine(v) for k, v in full.items()}, use_cache=False)).backward()
    bad = parity.wrong_gradients(fm, plain, dict(unwrapped(placed.model).named_parameters()))
    for name, parameter in plain.named_parameters():
        error = relative_error(output[name][0], parameter.grad) if name in output else float("nan")
        bad += [f"hook on {name}: off by {error:.2g}"] * (not error <= 1e-5)
    return bad


@pytest.mark.parametrize("engine", [e for e in SIZES if e.startswith("ep_")])
def test_parameter_gradients(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    problems = run(engine, parameter_gradients, path)
    print(f"qwen3_moe, hooks on parameters/{engine}: {sum(not p for p in problems)} exact of {len(problems)}")
    assert not any(problems)


# -- what a user sees ------------------------------------------------------------------------------------------------
def seen(engine: str, path: Path, deliver: str) -> dict[str, Any]:
    placed = place(engine, models.make("qwen3_moe"), path)
    fm = FlexModel(placed.model)
    mine = {k: placed.mine(v) for k, v in models.inputs("qwen3_moe").items()}
    with fm.capture(ACT, deliver=deliver) as acts, torch.no_grad():
        fm(**mine)
    try:
        value, rows = acts[ACT], acts.rows(ACT)
    except FlexModelError as error:
        return {"error": str(error)}
    acts.save(path / f"{engine}{dist.get_rank() if engine != 'none' else 0}.safetensors")
    if isinstance(value, Parts):
        value = {k: [x.tolist() for x in getattr(value, k)] for k in ("tensors", "tokens", "experts")} | {
            "coordinates": value.coordinates
        }
    return {
        "value": value,
        "rows": rows.values.tolist(),
        "tokens": rows.tokens.tolist(),
        "experts": rows.experts.tolist(),
    }


def test_rows_are_the_same_on_one_process_and_on_many(tmp_path: Path) -> None:
    saved(models.make("qwen3_moe"), tmp_path, "ep_tp")
    alone = seen("none", tmp_path, "all")
    assert isinstance(alone["value"], Tensor)
    for engine, placed in (("ddp", "dp"), ("ep_tp", "tp"), ("ep_fsdp", "fsdp")):
        for many in run(engine, seen, tmp_path, "all"):
            assert relative_error(torch.tensor(many["rows"]), torch.tensor(alone["rows"])) < 1e-5
            assert many["tokens"] == alone["tokens"] and many["experts"] == alone["experts"]
            parts = many["value"]
            assert parts["coordinates"] == ({placed: 0}, {placed: 1})
            assert [len(t) for t in parts["tokens"]] == [len(t) for t in parts["tensors"]]
            if engine.startswith("ep"):
                assert [set(e) for e in parts["experts"]] == [{0, 1}, {2, 3}]
            else:
                assert [{t // 12 for t in ts} for ts in parts["tokens"]] == [{0}, {1}]  # two samples of six tokens


def test_parts_go_where_they_are_delivered(tmp_path: Path) -> None:
    saved(models.make("qwen3_moe"), tmp_path, "ep_tp")
    first, second = run("ep_fsdp", seen, tmp_path, "main")
    assert len(first["value"]["tensors"]) == 2 and "sent it to rank 0" in second["error"]
    first, second = run("ep_fsdp", seen, tmp_path, "local")
    for rank, own in enumerate((first, second)):
        assert own["value"]["coordinates"] == ({"fsdp": rank},) and len(own["value"]["tensors"]) == 1
        assert set(own["value"]["experts"][0]) == {2 * rank, 2 * rank + 1}


def refused(engine: str, path: Path, keywords: dict[str, Any]) -> str:
    placed = place(engine, models.make("qwen3_moe"), path)
    unwrapped(placed.model).set_experts_implementation("eager")
    fm = FlexModel(placed.model)
    mine = {k: placed.mine(v) for k, v in models.inputs("qwen3_moe").items()}
    try:
        if "run" in keywords:
            with fm.edit(ACT, lambda x: x * 2, **keywords):
                fm(**mine)
        else:
            with fm.capture(ACT, **keywords) as acts:
                fm(**mine)
            acts[ACT]
    except (EditError, LayoutError) as error:
        return str(error)
    return "passed"


ROWS = "its rows are tokens at experts"


WITH_PARTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"run": "one_rank"}, ROWS),
    ({"run": "sharded"}, ROWS),
    ({"detach": False}, ROWS),
    ({"select": slice(0, 2)}, ROWS),
    ({"select": (slice(None), slice(0, 4))}, "passed"),
)


@pytest.mark.parametrize("engine", ["ddp", *BOTH])
def test_what_parts_cannot_have(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    results: Any = run(engine, each, refused, path, [(keywords,) for keywords, _ in WITH_PARTS])
    for texts in results:
        for text, (keywords, words) in zip(texts, WITH_PARTS, strict=True):
            assert words in text, keywords


def unknown(engine: str) -> list[str]:
    """An implementation of the user's own: rows come from a product, so that nobody can tell which they are."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def own(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        flat, order = index.flatten().sort()
        choose = torch.nn.functional.one_hot(order // index.shape[-1], len(hidden)).to(hidden.dtype)
        gate_up = torch.stack([self.gate_up_proj[e] @ row for e, row in zip(flat, choose @ hidden, strict=True)])
        rows = self._apply_gate(gate_up)
        out = torch.stack([self.down_proj[e] @ row for e, row in zip(flat, rows, strict=True)])
        return choose.T @ (out * weights.flatten()[order].unsqueeze(-1))

    ALL_EXPERTS_FUNCTIONS.register("own", own)
    placed = place(engine, models.make("qwen3_moe"), Path())
    unwrapped(placed.model).set_experts_implementation("own")
    fm = FlexModel(placed.model)
    with fm.capture(ACT, "model.layers.1.mlp") as acts:
        fm(**{k: placed.mine(v) for k, v in models.inputs("qwen3_moe").items()})
    with pytest.raises(LayoutError) as error:
        acts[ACT]
    return [str(error.value), str(tuple(acts["model.layers.1.mlp"].shape))]


def test_an_unknown_implementation_is_refused_by_name() -> None:
    for text, shape in run_world(2, unknown, "ddp"):
        assert ACT in text and "do not follow the order of the batch" in text and shape == "(4, 6, 32)"


def wire(engine: str, path: Path, name: str) -> tuple[int, list[str]]:
    placed = place(engine, models.make("qwen3_moe"), path)
    fm = FlexModel(placed.model)
    mine = {k: placed.mine(v) for k, v in models.inputs("qwen3_moe").items()}
    with fm.capture(name, deliver="main"), torch.no_grad():
        fm(**mine)
    with Wire() as counted, fm.capture(name, deliver="main"), torch.no_grad():
        fm(**mine)
    return counted.sent, counted.calls


@pytest.mark.parametrize(
    ("engine", "name"), [("ep_tp", ACT), ("ep_fsdp", ACT), ("ep_tp", "model.layers.1.mlp.experts")]
)
def test_what_moves(engine: str, name: str, tmp_path: Path) -> None:
    """The other rank's rows once, two integers a row and who sent what; what is replicated moves not at all."""
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    alone = seen("none", tmp_path, "all")["experts"]
    first, second = run(engine, wire, path, name)
    rows = sum(e >= 2 for e in alone) if name == ACT else 0
    print(f"{name}/{engine}: {second[0]} bytes sent for {rows} rows, calls {second[1]}")
    assert first[0] == 0
    if name != ACT:
        assert second == (0, [])
        return
    sent = 24 if engine == "ep_fsdp" else 0  # the tokens that went to experts elsewhere, as they were sent
    assert second[0] == rows * 16 * 4 + 8 * (2 * rows + sent + 2 + 2 * 2 * bool(sent))
    assert second[1].count("send") == 1


def twice(engine: str, path: Path) -> list[Any]:
    """Two forwards in a block, of sequences that differ in length from rank to rank, with gradients."""
    plain = models.make("qwen3_moe")
    placed = place(engine, plain, path)
    module = unwrapped(placed.model).get_submodule(ACT.removesuffix(".act_fn"))
    before = dict(module.__dict__), [dict(vars(c.cell_contents)) for c in _ways_of(module)]
    lengths, found = (4, 6), []
    fm = FlexModel(placed.model)
    own = [{k: v[2 * i : 2 * i + 2, :n] for k, v in models.inputs("qwen3_moe").items()} for i, n in enumerate(lengths)]
    with fm.capture(ACT, grad=True) as acts:
        for _ in range(2):
            parity.square(fm(**own[placed.index], use_cache=False)).backward()
    after = dict(module.__dict__), [dict(vars(c.cell_contents)) for c in _ways_of(module)]
    found.append(before == after)
    with own_experts(plain) as ids:
        want, tokens, experts, first = [], [], [], 0
        for batch in own:
            seen = plain_hooks(plain, lambda m, b=batch: parity.square(m(**b)) / 2)
            want.append((seen[ACT, "forward", 0][0], seen[ACT, "full_backward_pre", 0][0]))
            tokens.append(ids[ACT.removesuffix(".act_fn")][0] + first)
            experts.append(ids[ACT.removesuffix(".act_fn")][1])
            first += batch["input_ids"].numel()
    oracle = [Rows.sorted(torch.cat([w[i] for w in want]), torch.cat(tokens), torch.cat(experts)) for i in (0, 1)]
    for call in (0, 1):
        for rows, right in zip((acts.rows(ACT, call=call), acts.rows(ACT, call=call, grad=True)), oracle, strict=True):
            found += [torch.equal(rows.tokens, right.tokens), torch.equal(rows.experts, right.experts)]
            found.append(relative_error(rows.values, right.values) < 1e-5)
    return found


def _ways_of(module: nn.Module) -> list[Any]:
    """What is behind the forward that expert parallelism has put on a module."""
    cells = getattr(module.__dict__.get("forward"), "__closure__", None) or ()
    return [c for c in cells if hasattr(c.cell_contents, "experts_forward")]


@pytest.mark.parametrize("engine", ["ddp", "ep_fsdp"])
def test_calls_and_gradients_and_sequences_of_unequal_length(engine: str, tmp_path: Path) -> None:
    path = saved(models.make("qwen3_moe"), tmp_path, engine)
    for found in run(engine, twice, path):
        assert len(found) == 13 and all(found)


def generated(engine: str, path: Path) -> list[Any]:
    placed = place(engine, models.make("qwen3_moe"), path)
    full = models.inputs("qwen3_moe")
    fm = FlexModel(placed.model)
    with fm.capture(ACT) as acts, torch.no_grad():
        cache = None
        for step in range(3):
            mine = {k: placed.mine(v[:, : 4 + step]) for k, v in full.items()}
            mine["input_ids"] = mine["input_ids"] if cache is None else mine["input_ids"][:, -1:]
            cache = fm(**mine, past_key_values=cache, use_cache=True).past_key_values
    rows = [acts.rows(ACT, call=i) for i in range(3)]
    return [[r.values.tolist(), r.tokens.tolist(), r.experts.tolist()] for r in rows]


@pytest.mark.parametrize("engine", ["ddp", *BOTH])
def test_decoding(engine: str, tmp_path: Path) -> None:
    saved(models.make("qwen3_moe"), tmp_path, "ep_tp")
    alone: Any = generated("none", tmp_path)
    for many in run(engine, generated, tmp_path):
        for (values, *ids), (want, *right) in zip(many, alone, strict=True):  # type: ignore[call-overload]
            assert relative_error(torch.tensor(values), torch.tensor(want)) < 1e-5 and ids == right


def test_values_with_their_graph_are_told_on_one_process() -> None:
    fm = FlexModel(models.make("qwen3_moe"))
    with fm.capture(ACT, detach=False) as acts:
        out = fm(**models.inputs("qwen3_moe"))
    rows = acts.rows(ACT)
    grad = torch.autograd.grad(parity.square(out), acts[ACT])[0]
    assert (
        rows.values.requires_grad
        and len(rows) == len(grad) == 48
        and rows.experts.tolist() == sorted(rows.experts.tolist())
    )
