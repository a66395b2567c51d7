"""Rows that are tokens at Megatron-core's experts: against the model on one process, by expert and token."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from megatron_cpu import Spread
from oracle import Count, plain_hooks, relative_error
from parity import TYPES, as_key
from test_megatron import loss, positions, tokens
from test_megatron_experts import CASES, pair
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import EditError, FlexModelError
from flex_model.routing.assembly import Parts
from flex_model.routing.rows import Rows

EXPERTS = "decoder.layers.{}.mlp.experts"
HALVES = {"tp": 2, "expert_tensor_parallel_size": 1}
SP = {"sequence_parallel": True, "expert_tensor_parallel_size": 1}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
EP = {"expert_model_parallel_size": 2}
# Also what test_megatron_experts has not: the other dispatcher, one expert a rank, and both axes.
MORE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{n: (2, *CASES[n]) for n in ("dp=2", "dp=2, ep=2", "dp=2, ep=2, all to all", "sp=2, ep=2", "sp=2, whole experts")},
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
        torch.cat(pieces), torch.cat(where), torch.cat([torch.full((len(w),), e) for e, w in zip(order, where, strict=True)])
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
    fm = FlexModel(sharded)
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
