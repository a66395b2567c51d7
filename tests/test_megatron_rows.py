"""Rows that are tokens at Megatron-core's experts: against the model on one process, by expert and token."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import Count, plain_hooks, relative_error
from parity import TYPES, as_key
from test_megatron import loss, positions, tokens, wrapped
from test_megatron_experts import CASES, pair
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import FlexModelError
from flex_model.routing.assembly import Parts
from flex_model.routing.rows import Rows

EXPERTS = "decoder.layers.{}.mlp.experts"
HALVES = {"tp": 2, "expert_tensor_parallel_size": 1}
SP = {"sequence_parallel": True, "expert_tensor_parallel_size": 1}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
EP = {"expert_model_parallel_size": 2}
# Also what test_megatron_experts has not: the other dispatcher, one expert a rank, and both axes.
MORE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{
        n: (2, *CASES[n]) for n in ("dp=2", "dp=2, ep=2", "dp=2, ep=2, all to all", "sp=2, ep=2", "sp=2, whole experts")
    },
    "dp=2, all to all": (2, {"tp": 1}, ALL_TO_ALL),
    "sp=2, whole experts, all to all": (2, HALVES, {**SP, **ALL_TO_ALL}),
    "sp=2, ep=2, all to all": (2, {**HALVES, **EP}, {**SP, **EP, **ALL_TO_ALL}),
    "one process": (1, {"tp": 1}, {}),
    "one process, all to all": (1, {"tp": 1}, ALL_TO_ALL),
    "dp=2, sp=2, ep=2": (4, {**HALVES, **EP}, {**SP, **EP}),
    "dp=2, sp=2, ep=4, all to all": (
        4,
        {**HALVES, "expert_model_parallel_size": 4},
        {**SP, **ALL_TO_ALL, "expert_model_parallel_size": 4},
    ),
    "dp=2, sp=2, ep=4": (
        4,
        {**HALVES, "expert_model_parallel_size": 4},
        {**SP, "expert_model_parallel_size": 4},
    ),
}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
MORE |= {
    "dp=2, ep=2, Megatron DDP": (2, {"tp": 1, **EP}, EP),
    "dp=2, recomputed": (2, {"tp": 1}, RECOMPUTED),
    "dp=2, ep=2, all to all, recomputed": (2, {"tp": 1, **EP}, {**EP, **ALL_TO_ALL, **RECOMPUTED}),
}
Ids = dict[int, dict[int, Tensor]]  # {layer: {expert: its tokens, in the order of its rows}}


def routed(plain: nn.Module, spread: Spread, full: Tensor) -> Ids:
    """By the routers of the plain model, whose rows are [s, b]; tokens are counted b * S + s."""
    seen: dict[int, Tensor] = {}
    routers = {n: plain.get_submodule(f"decoder.layers.{n}.mlp.router") for n in (0, 1)}
    handles = [r.register_forward_hook(lambda m, a, o, n=n: seen.update({n: o[1]})) for n, r in routers.items()]
    with spread.alone(), torch.no_grad():
        plain(full, positions(full), None)
    for handle in handles:
        handle.remove()
    batch, length = full.shape
    at = torch.arange(batch * length).view(batch, length).T.flatten()
    return {n: {e: at[chosen[:, e].bool()] for e in range(4)} for n, chosen in seen.items()}


def wanted(seen: dict[Any, list[Tensor]], ids: Ids, name: str, kind: str, index: int, experts: list[int]) -> Rows:
    """What the plain model's experts that go by one name have, one after the other."""
    layer = int(name.split(".")[2])
    if ".local_experts." not in name:
        pieces, order = seen[name, kind, index], range(4)
    else:
        head, _, rest = name.partition(".local_experts.")
        rest = rest.partition(".")[1] + rest.partition(".")[2]
        pieces = [seen[f"{head}.local_experts.{e}{rest}", kind, index][0] for e in experts]
        order = experts  # type: ignore[assignment]
    where = [ids[layer][e] for e in order]
    return Rows.sorted(
        torch.cat(pieces),
        torch.cat(where),
        torch.cat([torch.full((len(w),), e) for e, w in zip(order, where, strict=True)]),
    )


def _compared(case: str) -> tuple[Count, int]:
    """All values inside experts, forward and backward, and how many came as parts."""
    _, sizes, changes = MORE[case]
    spread = Spread(**sizes)
    sharded, plain = pair(spread, changes)
    full = tokens()
    mine = spread.mine(full)
    ids = routed(plain, spread, full)

    def plain_loss(model: nn.Module) -> Tensor:
        with spread.alone():
            return loss(model(full, positions(full), None))

    with spread.alone():
        seen = plain_hooks(plain, plain_loss)
    fm = FlexModel(wrapped(sharded, "Megatron DDP" if "DDP" in case else "none"))
    names = [n for n in fm.wrapped_module_names if ".mlp.experts" in n and not n.endswith(".local_experts")]
    with ExitStack() as stack:
        acts = {t: stack.enter_context(fm.capture(names, hook_type=t, unpack_idx="all", deliver="all")) for t in TYPES}
        loss(fm(mine, positions(mine), None)).backward()
    count, parts = Count(), 0
    held = 4 // sizes.get("expert_model_parallel_size", 1)
    for name, kind, index in [k for k in seen if k[0] in names and k[1] in TYPES]:
        at = {"full_backward_pre": "forward", "full_backward": "forward_pre"}.get(kind, kind)
        key = as_key(name, kind, index, sum(1 for n, k, _ in seen if (n, k) == (name, at)))
        number = int(name.partition(".local_experts.")[2].partition(".")[0] or 0)
        label = f"{name}.{kind}[{index}]"
        if not seen[name, kind, index][0].is_floating_point():
            assert index == 1 and name.endswith(".experts"), label  # how many rows each expert has: no rows
            continue
        want = wanted(seen, ids, name, kind, index, list(range(number, 4, held)))
        try:
            got = acts[kind].rows(key)
            (value,) = acts[kind].calls(key)
        except (FlexModelError, KeyError) as error:
            count.add(label, error, [want.values])
            continue
        parts += isinstance(value, Parts)
        same = torch.equal(got.tokens, want.tokens) and torch.equal(got.experts, want.experts)
        count.add(label, [got.values if same else got.tokens], [want.values])
    return count, parts


@pytest.mark.parametrize("case", MORE)
def test_every_value_inside(case: str) -> None:
    ranks = MORE[case][0]
    for count, parts in run_world(ranks, _compared, case):
        print(f"Megatron-core rows at experts, {case}: {count}")
        print(count.wrong[:4], count.refused[:4])
        assert not count.wrong and not count.refused and count.exact == count.tried >= 40
        assert parts == (count.tried if ranks > 1 else 0)


# -- edits -----------------------------------------------------------------------------------------------------------
def trained() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(32, 32)


def scaled(x: Tensor, experts: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + experts.to(x.dtype).unsqueeze(-1))


def _edited(case: str) -> list[str]:
    """Every expert's output through a trainable layer, by the number of the expert, with gradients."""
    _, sizes, changes = MORE[case]
    spread = Spread(**sizes)
    sharded, plain = pair(spread, changes)
    full = tokens()
    mine = spread.mine(full)
    want_layer, want_grads = trained(), []
    for n, e in ((n, e) for n in (0, 1) for e in range(4)):
        module = plain.get_submodule(f"{EXPERTS.format(n)}.local_experts.{e}.linear_fc2")
        module.register_forward_hook(lambda m, a, o, e=e: (want_layer(scaled(o[0], torch.full((len(o[0]),), e))), o[1]))
    plain.get_submodule("decoder.layers.0").register_full_backward_hook(lambda m, i, o: want_grads.append(o[0]))
    with spread.alone():
        want = plain(full, positions(full), None)
        loss(want).backward()

    fm = FlexModel(sharded)
    fm.register_trainable_module("layer", trained())

    def edit(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any, call: Any) -> Tensor:
        return modules["layer"](scaled(x, call.experts))  # type: ignore[no-any-return]

    for name in [n for n in fm.wrapped_module_names if ".local_experts." in n and n.endswith("linear_fc2")]:
        fm.register_forward_hook(HookFunction(name, editing_function=edit, capture=False))
    with fm.capture("decoder.layers.0", hook_type="full_backward_pre") as acts:
        output = fm(mine, positions(mine), None)
        loss(output).backward()
    pairs = {
        "logits": (fm.full_output(output), want),
        "gradient before": (acts["decoder.layers.0"], want_grads[0]),
        **{n: (fm.trainable_modules["layer"].get_parameter(n).grad, p.grad) for n, p in want_layer.named_parameters()},
    }
    errors = {n: relative_error(a, b) for n, (a, b) in pairs.items()}  # type: ignore[arg-type]
    return [f"{n}: off by {e:.2g}" for n, e in errors.items() if not e <= 1e-5]


@pytest.mark.parametrize("case", [c for c in MORE if MORE[c][0] <= 2 and "DDP" not in c] + ["dp=2, sp=2, ep=4"])
def test_edits_see_their_own_rows(case: str) -> None:
    problems = run_world(MORE[case][0], _edited, case)
    print(f"Megatron-core edits of rows at experts, {case}: {sum(not p for p in problems)} exact of {len(problems)}")
    assert not any(problems), problems


# -- what the plain model cannot show: rows against the tokens that went in ------------------------------------------
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
CAPACITY = {"moe_expert_capacity_factor": 0.5}
ODD: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "unequal lengths": ({"tp": 1}, {}, (4, 6)),
    "unequal lengths, all to all": ({"tp": 1}, ALL_TO_ALL, (6, 3)),
    "unequal lengths, ep=2, all to all": ({"tp": 1, **EP}, {**EP, **ALL_TO_ALL}, (4, 6)),
    "dropped tokens, all to all": ({"tp": 1}, {**ALL_TO_ALL, **CAPACITY}, (6, 6)),
    "dropped tokens, ep=2, all to all": ({"tp": 1, **EP}, {**EP, **ALL_TO_ALL, **CAPACITY}, (6, 6)),
    "a rank without tokens": ({"tp": 1, **EP}, {**EP, **BIASED}, (6, 6)),
    "a rank without tokens, all to all": ({"tp": 1, **EP}, {**EP, **ALL_TO_ALL, **BIASED}, (6, 6)),
}


def _told(case: str, grad: bool) -> list[Any]:
    """Whether each row of the experts' inputs is the token that it is said to be, and all that were sent are there."""
    sizes, changes, lengths = ODD[case]
    spread = Spread(**sizes)
    sharded, _ = pair(spread, changes)
    layer: Any = sharded.get_submodule("decoder.layers.0.mlp")
    if "moe_router_enable_expert_bias" in changes:
        for n in (0, 1):
            sharded.get_submodule(f"decoder.layers.{n}.mlp.router").expert_bias.copy_(torch.tensor([9.0, 9, -9, -9]))
    mine = (tokens(2, lengths[dist.get_rank()]) + 7 * dist.get_rank()) % 64
    own: list[Tensor] = []
    fm = FlexModel(sharded)
    names = [n for n in fm.wrapped_module_names if n.startswith(EXPERTS.format(0)) and n.endswith("linear_fc1")]
    found: list[Any] = []
    for _ in range(2):
        handles = [
            layer.register_forward_pre_hook(lambda m, a: own.append(a[0].transpose(0, 1).flatten(0, 1).detach())),
            layer.router.register_forward_hook(
                lambda m, a, o: own.append(o[1].view(*a[0].shape[:2], -1).transpose(0, 1).flatten(0, 1))
            ),
        ]
        with fm.capture(names, hook_type="forward_pre", grad=grad) as acts, torch.set_grad_enabled(grad):
            output = fm(mine, positions(mine), None)
            if grad:
                loss(output).backward()
        for handle in handles:
            handle.remove()
        every: list[Any] = [None, None]
        dist.all_gather_object(every, own[-2:])
        hidden, chosen = (torch.cat([one[i] for one in every]) for i in (0, 1))
        rows = [acts.rows(n) for n in names]
        pairs = sorted((t, e) for r in rows for t, e in zip(r.tokens.tolist(), r.experts.tolist(), strict=True))
        found.append(pairs == [tuple(p) for p in chosen.nonzero().tolist()])
        found += [torch.equal(r.values, hidden[r.tokens]) for r in rows]
        if grad:
            found += [torch.equal(acts.rows(n, grad=True).tokens, r.tokens) for n, r in zip(names, rows, strict=True)]
    return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ODD)
def test_rows_are_the_tokens_they_are_said_to_be(case: str, grad: bool) -> None:
    for found in run_world(2, _told, case, grad):
        assert len(found) > 4 and all(found), found


# -- what stays refused ----------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts over data ranks": ({"tp": 1, "expert_tensor_parallel_size": 2}, {"expert_tensor_parallel_size": 2}),
    "filled up to capacity": (
        {"tp": 1, **EP},
        {**EP, **ALL_TO_ALL, **CAPACITY, "moe_pad_expert_input_to_capacity": True},
    ),
    "the same tokens on all tensor ranks": ({**HALVES, **EP}, {**EP, "expert_tensor_parallel_size": 1}),
}


def _refused(case: str) -> list[str]:
    sizes, changes = REFUSED[case]
    spread = Spread(**sizes)
    sharded, _ = pair(spread, changes)
    sharded.eval()
    mine = spread.mine(tokens())
    name = f"{EXPERTS.format(0)}.local_experts.0.linear_fc1"
    fm, out = FlexModel(sharded), []
    with fm.capture(name) as acts:
        fm(mine, positions(mine), None)
    try:
        out.append(str(type(acts[name])))
    except FlexModelError as error:
        out.append(str(error))
    try:
        with fm.edit(name, lambda x: x * 2):
            fm(mine, positions(mine), None)
        out.append("passed")
    except FlexModelError as error:
        out.append(str(error))
    return out


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_refused(case: str) -> None:
    for texts in run_world(2, _refused, case):
        assert all("its rows are tokens at experts" in t for t in texts), texts
