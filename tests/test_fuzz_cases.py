"""What fuzzing has found wrong once, by name: each case is the smallest that showed it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import engines
import fuzz_models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import installed
from fuzz_case import Case, Hook, Round
from fuzz_models import Scene
from fuzz_run import Outcome, run_case, share_groups
from fuzz_world import World
from worlds import run_world

from flex_model import FlexModel, Site

DDP = Scene(engine="ddp", batches=(2, 1))
FSDP = Scene(engine="fsdp2", batches=(1, 2))
TP = Scene(engine="tp", batches=(2,))
EVAL, TRAIN = Round(backward=""), Round()
LAST = ("index", ("...", -1))
FIRST_ROWS = ("index", ("slice", None, 2))

RIGHT = {
    "the selection of a gradient": Case(DDP, (Hook("layers.0.mlp", "full_backward", select=LAST),)),
    "the selection of a gradient on one process": Case(
        Scene(batches=(3,)), (Hook("layers.0.mlp", "full_backward_pre", "register", select=FIRST_ROWS),)
    ),
    "the selection of a sharded gradient": Case(TP, (Hook("layers.0.mlp.act", "full_backward", select=LAST),)),
    "the selection of a parameter's gradient": Case(
        FSDP, (Hook("head.weight", "tensor", select=LAST), Hook("norm.weight", "tensor", "register", select=FIRST_ROWS))
    ),
    "the gradient stays where it is": Case(DDP, (Hook("layers.0", "full_backward", deliver="local"),)),
    "the gradient of a value stays where it is": Case(FSDP, (Hook("layers.0", grad=True, deliver="local"),)),
    "random numbers in another order of memory": Case(
        Scene(engine="ddp", batches=(2, 1), value=("tuple", ("x",), ("turned",))),
        (Hook("layers.0", via="edit", idx=1, edit="random"),),
    ),
    "random numbers in another order of memory on one process": Case(
        Scene(value=("tuple", ("x",), ("turned",))), (Hook("layers.0", via="edit", idx=1, edit="random"),)
    ),
    "a forward hook after one on a gradient that never came": Case(
        Scene(engine="sp", batches=(1,), length=2),
        (Hook("", "full_backward", rounds=(0, 0)), Hook("", "forward_pre", rounds=(1, 1))),
        (TRAIN, TRAIN),
    ),
    "a parameter that DDP has taken out of its module": Case(
        Scene(engine="ddp_tp", batches=(2, 3), length=1, floats=True),
        (
            Hook("layers.0.mlp.down.weight", "tensor", "register", edit="double"),
            Hook("norm.bias", "tensor", rounds=(1, 1)),
        ),
        (TRAIN, TRAIN, TRAIN),
    ),
    "a shape over two data axes": Case(
        Scene(engine="hsdp", batches=(1, 2, 3, 1)),
        (Hook("layers.0", deliver="local"), Hook("norm", via="edit", edit="tanh", run="sharded")),
    ),
    "a parameter's gradient, edited in place": Case(FSDP, (Hook("head.weight", "tensor", "edit", edit="mul_"),)),
    "part of a parameter's gradient, edited": Case(
        FSDP, (Hook("head.weight", "tensor", "edit", edit="double", select=FIRST_ROWS),)
    ),
    "a parameter's gradient by the call": Case(
        FSDP, (Hook("head.weight", "tensor", "edit", edit="odd calls"),), (TRAIN, TRAIN)
    ),
    "random numbers for a parameter's gradient": Case(FSDP, (Hook("head.weight", "tensor", "edit", edit="random"),)),
    "a parameter's gradient on one rank": Case(
        FSDP, (Hook("head.weight", "tensor", "register", edit="norm", run="one_rank"),)
    ),
    "one whole number of a column": Case(
        Scene(engine="ddp", batches=(1, 1), length=2),
        (Hook("emb", "forward_pre", select=("index", ("...", 1))),),
    ),
    "an edit of part of a copy": Case(
        DDP, (Hook("layers.0", via="edit", edit="double", select=("function", "turned over")),)
    ),
    "an edit of part of a copy on one process": Case(
        Scene(), (Hook("layers.0", via="edit", edit="double", select=("function", "turned over")),)
    ),
    "another form beside a new hook": Case(
        FSDP, (Hook("layers.0", via="edit", edit="double"), Hook("norm", "forward_pre", rounds=(1, 1))), (EVAL, TRAIN)
    ),
    "another form beside a new hook, on shards": Case(
        TP, (Hook("layers.0.mlp.act"), Hook("layers.0.mlp.up", rounds=(1, 1))), (EVAL, TRAIN)
    ),
    "trained before what it was evaluated with has arrived": Case(
        DDP, (Hook("head", via="register"),), (EVAL, TRAIN, TRAIN)
    ),
    "a selection that takes all there is": Case(
        TP, (Hook("layers.0.mlp.act", select=("index", ("...", ("list", 0, 1, 2, 3, 4, 5, 6, -1)))),)
    ),
    "a selection of as many rows as some rank has": Case(
        Scene(engine="ddp", batches=(1, 3)),
        (Hook("layers.0", select=("function", "first rows")), Hook("norm", select=("index", ("list", 0, 1, 2)))),
    ),
    "gradients after calls without": Case(DDP, (Hook("layers.0", "full_backward", "register"),), (EVAL, TRAIN)),
    "gradients after calls without, on shards": Case(
        TP, (Hook("layers.0.mlp.up", "full_backward_pre", "register"),), (EVAL, TRAIN)
    ),
    "a recomputation that ends within an edit": Case(
        Scene(engine="ddp", batches=(1, 1), recompute="plain"), (Hook("layers.0.mlp.down", via="edit", edit="tanh"),)
    ),
    "a recomputation that ends where one rank edits": Case(
        Scene(engine="ddp", batches=(1, 2), recompute="plain"),
        (Hook("layers.0.mlp.down", via="edit", edit="tanh", run="one_rank"),),
    ),
    "a recomputation that ends where one rank trains": Case(
        Scene(engine="tp", batches=(2,), recompute="plain"),
        (Hook("layers.0.mlp.act", via="edit", edit="trainable", run="one_rank"),),
    ),
    "a recomputation that ends within a selection": Case(
        Scene(engine="ddp", batches=(1, 1), recompute="plain"),
        (Hook("layers.0.mlp.down", via="edit", edit="shift", select=("index", (-1, ("slice", None), ("list", 3)))),),
    ),
    "hooks that were off run not in a recomputation": Case(
        Scene(recompute="plain"),
        (Hook("layers.0.mlp", "forward_pre", "register", edit="double"), Hook("head", via="edit", edit="tanh")),
        (Round(groups=("all",), complement=True, in_call=True),),
    ),
    "hooks that were on run again in a recomputation": Case(
        Scene(engine="tp", recompute="plain", batches=(2,)),
        (Hook("layers.0.mlp.up", via="register", edit="flip", groups=("probes",)), Hook("norm", via="register")),
        (Round(groups=("probes",), in_call=True), Round(groups=("probes",), complement=True, in_call=True)),
    ),
}
REFUSED = {
    "a selection across shards that stays where it is": (
        Case(DDP, (Hook("layers.0", select=FIRST_ROWS, deliver="local"),)),
        "LayoutError",
        "select= takes part of a dim that is sharded",
    ),
    "summands of uneven rows that stay where they are": (
        Case(
            Scene(engine="2d_tp", batches=(1, 3), width=8, hidden=16, vocabulary=8, length=1, floats=True),
            (Hook("layers.0.mlp.up", "forward_pre", deliver="local", grad=True),),
        ),
        "LayoutError",
        "summands of its rows",
    ),
    "a mean over shards that DTensor takes for others": (
        Case(FSDP, (Hook("layers.0", via="edit", edit="all mean", run="sharded"),)),
        "EditError",
        "sizes that DTensor does not count with",
    ),
    "a cumulative sum along shards, counted from the end": (
        Case(TP, (Hook("layers.0.mlp.act", via="edit", edit="cumsum", run="sharded"),)),
        "EditError",
        "is wrong on shards",
    ),
    "random numbers on shards": (
        Case(DDP, (Hook("layers.0", via="edit", edit="random", run="sharded"),)),
        "EditError",
        "draws random numbers",
    ),
}


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    worlds = {n: World(n, run_case) for n in (1, 2, 4)}
    yield worlds
    for world in worlds.values():
        world.close()


def _outcomes(case: Case, worlds: dict[int, World]) -> list[Outcome]:
    world = worlds[{"solo": 1, "hsdp": 4, "ddp_tp": 4, "2d_tp": 4}.get(case.scene.engine, 2)]
    outcomes = world.ask(case)
    if any(o.broken for o in outcomes):
        world.close()
    return outcomes


def _main_alone() -> str:
    fm = FlexModel(engines.place("ddp", fuzz_models.make(DDP)).model)
    with fm.capture("layers.0", hook_type="forward_pre", unpack_idx="all", deliver="main") as acts:
        fm(fuzz_models.inputs(DDP, 0)[0])
    with pytest.raises(KeyError) as caught:
        acts[Site("layers.1", "forward_pre", 0)] if dist.get_rank() == 0 else acts[Site("layers.0", "forward_pre", 1)]
    return str(caught.value)


def test_of_several_tensors_it_is_said_where_they_went() -> None:
    first, second = run_world(2, _main_alone)
    assert "was not asked for" in first and "sent it to rank 0" in second


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, worlds: dict[int, World]) -> None:
    for outcome in _outcomes(RIGHT[name], worlds):
        assert not outcome.problems and not outcome.refused and outcome.values


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, worlds: dict[int, World]) -> None:
    case, kind, words = REFUSED[name]
    for outcome in _outcomes(case, worlds):
        assert not outcome.problems
        assert [r for r in outcome.refused if kind in r and words in r]


def _left_before_the_backward(engine: str) -> list[str]:
    """The block of an edit ends before the backward, in which checkpointed modules run again."""
    share_groups()
    scene = Scene(engine=engine, recompute="plain", batches=(2,) if engine == "tp" else (1, 1))
    ids, _ = fuzz_models.inputs(scene, 0)
    plain = fuzz_models.make(Scene(batches=scene.batches))
    plain.get_submodule("layers.0.mlp.up").register_forward_hook(lambda m, a, out: torch.tanh(out))
    engines.loss(plain(ids)).backward()
    placed = engines.place(engine, copy.deepcopy(fuzz_models.make(scene)))
    fm = FlexModel(placed.model)
    parameters = dict(fm.named_parameters())
    before = installed(fm.module)
    with fm.edit("layers.0.mlp.up", torch.tanh):
        loss = engines.local_loss(engine, fm(placed.mine(ids)))
    loss.backward()
    assert installed(fm.module) == before
    return parity.wrong_gradients(fm, plain, parameters)


@pytest.mark.parametrize("engine", ["ddp", "tp"])
def test_an_edit_runs_again_after_its_block(engine: str) -> None:
    assert run_world(2, _left_before_the_backward, engine) == [[], []]
