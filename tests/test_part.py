"""Edits of a rank's own part: what goes beside it is cut alike, what would only seem to fit is refused."""

from __future__ import annotations

from typing import Any

import engines
import models
import parity
import pytest
import torch
from oracle import relative_error
from test_memory import Grid
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils.checkpoint import checkpoint
from worlds import run_world

from flex_model import FlexModel, edits
from flex_model.errors import EditError
from flex_model.layout.layout import Layout, ZigZag
from flex_model.routing.part import NeedsTheWhole, Part

EDITS = {
    "add": edits.add(torch.randn(8)),
    "add, normalized": edits.add(torch.randn(6, 1), scale=2.0, normalize=True),
    "add to all": edits.add(torch.randn(4, 6, 8)),
    "scale": edits.scale(3.0),
    "zero": edits.zero(),
    "zero some": edits.zero([0, 5, -1]),
    "zero of another dim": edits.zero([1, -2], dim=1),
    "replace": edits.replace(torch.randn(6, 8), [2, 3], dim=-2),
    "replace by a number": edits.replace(2.0, 7),
    "mean": edits.mean(torch.randn(5, 8)),
    "clamp": edits.clamp(-0.1, 0.1),
    "composed": edits.compose(edits.scale(0.5), edits.add(torch.randn(8)), edits.zero([6])),
}


def parts(layout: Layout, whole: Tensor, sizes: tuple[int, int] = (2, 2)) -> list[tuple[Tensor, Part | None, Any]]:
    """Of all four ranks: what it holds, and which part that is."""
    found = []
    for rank in range(sizes[0] * sizes[1]):
        mesh: Any = Grid(*sizes)
        mesh.coordinate = mesh.coordinate_of(rank)
        mine = whole
        for axis, placement in enumerate(layout.placements):
            if isinstance(placement, Shard):
                mine = mine.chunk(sizes[axis], placement.dim)[mesh.coordinate[axis]]
        found.append((mine, Part.of(mine, layout, mesh), mesh.coordinate))
    return found


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(2), Replicate()),
        (Shard(1), Shard(2)),
        (Shard(2), Shard(2)),
        (Replicate(), Shard(1)),
        (Shard(0), Shard(2)),
    ],
)
def test_parts_of_an_edit_are_edits_of_the_parts(name: str, placements: tuple[Any, ...]) -> None:
    whole, layout = torch.randn(4, 6, 8), Layout(placements, "said", ragged=(False, False))
    edit = EDITS[name]
    for (mine, part, at), (want, _, _) in zip(parts(layout, whole), parts(layout, edit(whole)), strict=True):
        assert part is not None and edit.by_parts
        assert torch.equal(edit.on_part(mine, part), want), (name, at)


def test_what_is_the_same_for_all_rows_needs_no_sizes() -> None:
    whole, layout = torch.randn(4, 6, 8), Layout((Shard(0), Shard(2)), "said", ragged=(True, False))
    for name, edit in EDITS.items():
        for (mine, part, at), (want, _, _) in zip(parts(layout, whole), parts(layout, edit(whole)), strict=True):
            assert part is not None
            if name == "add to all":
                with pytest.raises(NeedsTheWhole):
                    edit.on_part(mine, part)
            else:
                assert torch.equal(edit.on_part(mine, part), want), (name, at)


def test_what_would_fit_a_part_only_is_refused() -> None:
    layout = Layout((Shard(2), Replicate()), "said", ragged=(False, False))
    for mine, part, _ in parts(layout, torch.randn(4, 6, 8)):
        assert part is not None
        with pytest.raises(EditError, match=r"shape \(4,\) does not fit beside a value that has 8 places in dim -1"):
            edits.add(torch.randn(4)).on_part(mine, part)
        with pytest.raises(EditError, match=r"index \[8\] is not within the 8 places"):
            edits.zero([8]).on_part(mine, part)


@pytest.mark.parametrize("placement", [Partial(), ZigZag(1)])
def test_what_is_no_rectangle_has_no_part(placement: Any) -> None:
    layout = Layout((placement, Replicate()), "said", ragged=(False, False))
    assert all(part is None for _, part, _ in parts(layout, torch.randn(4, 6, 8)))


def test_what_may_fail_on_one_rank_alone_is_not_alike() -> None:
    class Held:
        def value(self) -> Tensor:
            return torch.ones(8)

    learned = torch.ones(8, requires_grad=True)
    for edit in (
        edits.add(Held()),
        edits.add(learned),
        edits.add(torch.ones(8), positions=[7]),
        edits.noise(),
        edits.module("probe"),
        edits.compose(edits.scale(1.0), edits.add(learned)),
    ):
        assert not edit.alike and not edit.by_parts, edit
    assert edits.patch(torch.ones(4, 6, 8)).alike and not edits.patch(torch.ones(4, 6, 8)).by_parts


# -- in a model ------------------------------------------------------------------------------------------------------
class Recomputed(nn.Module):
    """What it does last saves a value for the backward, so that the recomputation ends inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.Linear(4, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda x: self.last(self.up(x)), x, use_reentrant=False)
        return out


def _recomputed() -> list[str]:
    """The edit is the last to save: torch ends the recomputation by an exception from within it."""
    mesh, bad = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), []
    for edit in (edits.clamp(-0.5, 0.5), edits.compose(edits.scale(2.0), edits.clamp(-0.5, 0.5))):
        torch.manual_seed(0)
        model, plain = Recomputed(), Recomputed()
        plain.load_state_dict(model.state_dict())
        plain.last.register_forward_hook(lambda m, a, out, e=edit: e(out))
        fm, x = FlexModel(model, mesh=mesh), torch.randn(3, 4)
        with fm.edit("last", edit, run="sharded"):
            fm(x).pow(2).sum().backward()
        plain(x).pow(2).sum().backward()
        if not torch.equal(model.up.weight.grad, plain.up.weight.grad):
            bad.append(repr(edit))
    return bad


def test_a_recomputation_may_end_inside_an_edit() -> None:
    assert run_world(2, _recomputed) == [[], []]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_gradients_through_edited_parts_are_the_oracles(engine: str) -> None:
    for errors in run_world(2, _gradients, engine):
        assert max(errors.values()) < 1e-5, errors


def _gradients(engine: str) -> dict[str, float]:
    """Of a value and of all parameters, with an edit of the value and one of a gradient."""
    v, w, full = torch.randn(16), torch.randn(8), models.tokens()
    steer, cut = edits.add(v, scale=0.3), edits.compose(edits.scale(2.0), edits.zero([1, 5]))
    placed, plain = engines.place(engine, models.net()), models.net()
    fm = FlexModel(placed.model)
    parameters, some = dict(fm.named_parameters()), edits.replace(w, [0, 3])
    of_gradient = fm.edit("layers.1", cut, hook_type="full_backward_pre")
    with fm.edit("layers.0.mlp.act", steer), fm.edit("layers.0", some), of_gradient:
        engines.local_loss(engine, fm(placed.mine(full))).backward()
    plain.layers[0].mlp.act.register_forward_hook(lambda m, a, out: steer(out))
    plain.layers[0].register_forward_hook(lambda m, a, out: some(out))
    plain.layers[1].register_full_backward_pre_hook(lambda m, g: (cut(g[0]),))
    engines.loss(plain(full)).backward()
    got = parity.full_gradients(fm, parameters)
    return {n: relative_error(got[n], p.grad) for n, p in plain.named_parameters() if p.grad is not None}
