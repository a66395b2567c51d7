"""``plan``, ``sites`` and ``hooks``: what hooks cost, what can be hooked, what is hooked. Never collective."""

from __future__ import annotations

from typing import Any

import engines
import models
import torch
from worlds import run_world

from flex_model import FlexModel, HookFunction


def _plan() -> list[Any]:
    fm = FlexModel(engines.place("tp", models.net()).model)
    for name in ("layers.0.mlp.act", "layers.0.norm"):
        fm.register_forward_hook(HookFunction(name))
    fm.register_forward_hook(HookFunction("layers.1.mlp.act", editing_function=torch.tanh, capture=False))
    fm.register_forward_hook(HookFunction("layers.1.mlp.up", editing_function=torch.tanh, run="sharded"))
    before = {row.layout for row in fm.plan()}
    fm(models.tokens())
    rows = {row.name: (row.layout, row.collective, row.elements) for row in fm.plan()}
    evidence = {row.name: row.evidence for row in fm.sites() if row.side == "out" and row.evidence}
    return [before, rows, evidence["layers.0.mlp.act"]]


def test_plan_and_sites() -> None:
    whole = 4 * 6 * 16
    for before, rows, evidence in run_world(2, _plan):
        assert before == {"not yet known"}
        assert rows["layers.0.mlp.act"] == ("tp: S(2)", "gather to main", whole // 2)
        assert rows["layers.0.norm"] == ("tp: R", "none", 0)
        assert rows["layers.1.mlp.act"] == ("tp: S(2)", "all-gather", whole)
        assert rows["layers.1.mlp.up"][1:] == ("none", 0)
        assert evidence == "tp: twin"


def test_hooks_and_groups() -> None:
    fm = FlexModel(models.net())
    one = HookFunction("layers.0")
    fm.register_forward_hook(one)
    fm.create_hook_group("mlps", "mlp.act", editing_function=lambda x: x * 2)
    fm.update_hook_groups(one, "first")
    fm(models.tokens(), groups="mlps")
    rows = [(r.name, r.hook_type, r.groups, r.enabled, r.fired, r.edits) for r in fm.hooks()]
    assert rows == [
        ("layers.0", "forward", ("all", "first"), True, 0, False),
        ("layers.0.mlp.act", "forward", ("all", "mlps"), True, 1, True),
        ("layers.1.mlp.act", "forward", ("all", "mlps"), True, 1, True),
    ]
    assert {r.name for r in fm.sites()} == set(fm.wrapped_module_names) - {"layers"}  # a ModuleList
