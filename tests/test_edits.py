"""Ready-made edits: right by hand, the same however they run and whatever is parallel, and nothing moves for most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import torch_hook, unchanged
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits
from flex_model.errors import EditError, LayoutError, NameNotFoundError
from flex_model.layout.layout import ZigZag

WIDTH, HIDDEN = 8, 16
SITES = {"layers.0": WIDTH, "layers.0.mlp.act": HIDDEN, "emb": WIDTH}
MOVES_NOTHING = (
    "add",
    "add_here",
    "add_last",
    "scale",
    "zero",
    "zero_some",
    "replace",
    "mean",
    "clamp",
    "noise",
    "patch",
)


class Halves(nn.Module):
    """An autoencoder of twice the width: positive and negative parts, of which the small are lost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = {"width": width}
        self.threshold = nn.Parameter(torch.full((width,), 0.3))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([x - self.threshold, -x - self.threshold], -1))

    def decode(self, features: Tensor) -> Tensor:
        plus, minus = features.chunk(2, -1)
        return plus - minus


def halve(features: Tensor) -> Tensor:
    return features * 0.5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def presets(width: int) -> dict[str, tuple[edits.Preset, Callable[[Tensor], Tensor] | None]]:
    """By name: the preset, and the same by hand."""
    vector, rows = drawn(width), drawn(2, width)
    q, _ = torch.linalg.qr(rows.double().T)
    project = (q @ q.T).float()
    held = drawn(5, 6, width)
    columns = torch.tensor([False, True, False, False, True, False])[None, :, None]
    auto = Halves(width)
    return {
        "add": (edits.add(vector, scale=2.0), lambda x: x + 2 * vector),
        "add_unit": (edits.add(vector, normalize=True), lambda x: x + vector / vector.norm()),
        "add_here": (edits.add(vector, positions=[1, -2]), lambda x: torch.where(columns, x + vector, x)),
        "add_last": (edits.add(vector, positions="last"), lambda x: torch.cat([x[:, :-1], x[:, -1:] + vector], 1)),
        "scale": (edits.scale(0.5), lambda x: x * 0.5),
        "zero": (edits.zero(), torch.zeros_like),
        "zero_some": (edits.zero([1, -1]), lambda x: x * torch.tensor([1.0, 0, *[1] * (width - 3), 0])),
        "replace": (edits.replace(3.0, 2, positions=columns[0, :, 0]), lambda x: _put(x, columns)),
        "mean": (edits.mean(held), lambda x: held.mean((0, 1)).expand_as(x) + 0 * x),
        "clamp": (edits.clamp(-0.2, 0.5), lambda x: x.clamp(-0.2, 0.5)),
        "noise": (edits.noise(0.1), None),
        "resample": (edits.resample(), None),
        "resample_from": (edits.resample(held), None),
        "patch": (edits.patch(held[:1]), lambda x: held[:1].expand_as(x) + 0 * x),
        "patch_rows": (edits.patch_rows([0, 1], [2, 3]), lambda x: torch.cat([x[:2], x[:2]])),
        "project_out": (edits.project_out(rows), lambda x: x - x @ project),
        "keep_only": (edits.keep_only(rows), lambda x: x @ project),
        "sae": (edits.sae(auto, halve), lambda x: x - 0.5 * auto.decode(auto.encode(x))),
        "sae_alone": (edits.sae(auto, keep_error=False), lambda x: auto.decode(auto.encode(x))),
        "composed": (
            edits.compose(edits.scale(2.0), edits.add(vector, positions=0), edits.project_out(vector)),
            lambda x: _composed(x, vector),
        ),
    }


def _put(x: Tensor, columns: Tensor) -> Tensor:
    unit = torch.arange(x.shape[-1]) == 2
    return torch.where(columns & unit, 3.0, x)


def _composed(x: Tensor, vector: Tensor) -> Tensor:
    x = torch.cat([2 * x[:, :1] + vector, 2 * x[:, 1:]], 1)
    unit = vector / vector.norm()
    return x - (x @ unit)[..., None] * unit


# -- the same as by hand, everywhere ---------------------------------------------------------------------------
def _step(fm: FlexModel, engine: str, placed: engines.Placed) -> Tensor:
    output = fm(placed.mine(models.tokens()))
    engines.local_loss(engine, output).backward()
    return engines.whole(fm.full_output(output)).detach()


def _problems(engine: str, site: str, name: str, run: Any) -> list[str]:
    preset, by_hand = presets(SITES[site])[name]
    assert by_hand is not None
    plain = models.net()
    plain.get_submodule(site).register_forward_hook(lambda m, a, o: by_hand(o))
    want = plain(models.tokens())
    engines.loss(want).backward()
    placed = engines.Placed(models.net()) if engine == "none" else engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    fm.register_forward_hook(HookFunction(site, editing_function=preset, run=run, capture=False))
    parameters = dict(fm.named_parameters())
    got = _step(fm, engine, placed)
    bad = parity.wrong_gradients(fm, plain, parameters)
    error = relative_error(got, want)
    return bad + ([f"output off by {error:.2g}"] if error > 1e-5 else [])


def _all(engine: str) -> tuple[int, list[str]]:
    bad, tried = [], 0
    for site, width in SITES.items():
        for name in (n for n, (_, by_hand) in presets(width).items() if by_hand is not None):
            runs = (None, "every_rank", "one_rank", "sharded") if site == "layers.0.mlp.act" else (None,)
            for run in runs:
                if run == "sharded" and name == "patch_rows":
                    continue  # it takes rows apart, which may lie anywhere
                tried += 1
                found = _problems(engine, site, name, run)
                bad += [f"{site} {name} {run}: {found[:3]}"] if found else []
    return tried, bad


def test_one_process() -> None:
    tried, bad = _all("none")
    print(f"presets, one process: {tried - len(bad)} exact of {tried}")
    assert not bad


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_two_ranks(engine: str) -> None:
    for tried, bad in run_world(2, _all, engine, timeout=280):
        print(f"presets, {engine}: {tried - len(bad)} exact of {tried}")
        assert not bad


def _of_gradients(engine: str) -> list[str]:
    """Presets on the gradients of a parameter and of an input."""
    parameter, site = "layers.0.mlp.up.weight", "layers.1"
    plain, full = models.net(), models.tokens()
    plain.get_parameter(parameter).register_hook(lambda g: g * 0.5)
    plain.get_submodule(site).register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(-1e-3, 1e-3),))
    engines.loss(plain(full)).backward()
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    fm.register_hook(HookFunction(parameter, editing_function=edits.scale(0.5)))
    fm.register_full_backward_hook(HookFunction(site, editing_function=edits.clamp(-1e-3, 1e-3)))
    parameters = dict(fm.named_parameters())
    _step(fm, engine, placed)
    return parity.wrong_gradients(fm, plain, parameters)


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "tp", "sp"])
def test_of_gradients(engine: str) -> None:
    assert run_world(2, _of_gradients, engine) == [[]] * 2


def _random(engine: str) -> dict[str, Any]:
    placed = engines.Placed(models.net()) if engine == "none" else engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    out = {}
    for site, width in SITES.items():
        for name in ("noise", "resample", "resample_from"):
            with torch.no_grad(), fm.edit(site, presets(width)[name][0]), fm.capture("layers.1") as acts:
                fm._runtime.calls = 0  # the draw depends on the call
                fm(placed.mine(models.tokens()))
            out[f"{site} {name}"] = acts["layers.1"].tolist()
    return out


@pytest.mark.parametrize("engine", ["ddp", "tp", "sp"])
def test_what_is_drawn_is_the_same_on_one_process(engine: str) -> None:
    want = _random("none")
    for got in run_world(2, _random, engine):
        assert got.keys() == want.keys()
        assert [k for k in want if relative_error(torch.tensor(got[k]), torch.tensor(want[k])) > 1e-5] == []


# -- what moves ------------------------------------------------------------------------------------------------
class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and "wait" not in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _moved(engine: str) -> dict[str, int]:
    """Collectives above those of the model and of one edit that does nothing."""
    placed = engines.place(engine, models.net())
    mine = placed.mine(models.tokens())
    fm = FlexModel(placed.model)
    out = {}

    def counted(edit: Any) -> int:
        with torch.no_grad(), fm.edit(site, edit, run="sharded"):
            fm(mine)  # layouts are found
            with Collectives() as collectives:
                fm(mine)
        return len(collectives.seen)

    for site, width in SITES.items():
        base = counted(lambda x: x)
        for name in MOVES_NOTHING:
            out[f"{site} {name}"] = counted(presets(width)[name][0]) - base
    return out


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_edits_of_elements_move_nothing(engine: str) -> None:
    for moved in run_world(2, _moved, engine):
        assert max(moved.values()) <= 0


def _said(engine: str) -> dict[str, int]:
    """Collectives of a model that is steered, over those of the model without hooks."""
    placed, full, v = engines.place(engine, models.net()), models.tokens(), torch.randn(WIDTH)
    fm, mine, out = FlexModel(placed.model), placed.mine(full), {}

    def counted() -> int:
        fm(mine)  # layouts are found
        with Collectives() as collectives:
            fm(mine)
        return len(collectives.seen)

    with torch.no_grad():
        plain = counted()
        for site, width in SITES.items():
            two = edits.compose(edits.scale(2.0), edits.clamp(-1, 1))
            steers = {"add": edits.add(torch.randn(width)), "two": two}
            for name, edit in steers.items():
                with fm.edit(site, edit):
                    out[f"{site}, {name}"] = counted() - plain
        with fm.edit("layers.0", edits.add(v)), fm.edit("layers.1", lambda x: x, run="sharded"):
            out["a function"] = counted() - plain
        with fm.edit("layers.0", edits.add(v, positions=0)):
            out["positions"] = counted() - plain
    return out


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_steering_says_nothing(engine: str) -> None:
    """What fails on all ranks or on none is not asked after; what may fail on one rank is told to all of them."""
    for said in run_world(2, _said, engine):
        assert said.pop("a function") > 0 and said.pop("positions") > 0
        assert set(said.values()) == {0}


def _misfit(engine: str) -> None:
    placed = engines.Placed(models.net()) if engine == "none" else engines.place(engine, models.net())
    fm, mine = FlexModel(placed.model), placed.mine(models.tokens())
    wrong = edits.add(torch.randn(WIDTH + 1))
    with torch.no_grad(), fm.edit("layers.0", wrong), pytest.raises((RuntimeError, EditError), match="size of tensor"):
        fm(mine)
    with torch.no_grad(), fm.capture("layers.1") as acts:
        fm(mine)
    assert acts["layers.1"].shape[-1] == WIDTH


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "tp", "sp"])
def test_steering_that_does_not_fit_fails_on_all_ranks_alike(engine: str) -> None:
    _ = _misfit(engine) if engine == "none" else run_world(2, _misfit, engine)


def _steered_after_uneven() -> str:
    """Rank 1 has captured in a forward that rank 0 has not run; then both are steered in lockstep."""
    placed, full = engines.place("ddp", models.net()), models.tokens()
    fm, mine = FlexModel(placed.model, {}), placed.mine(full)
    fm.register_forward_hook(HookFunction("layers.0"))
    fm.eval()
    with torch.no_grad():
        for _ in range(placed.index + 1):
            fm(mine)
    fm.train()
    with fm.groups("all", complement=True), fm.edit("layers.1", edits.scale(1.0)):
        with pytest.raises(LayoutError, match="ran on some ranks and not on others") as told:
            fm(mine)
        fm(mine)
    return str(told.value)


def test_what_waits_is_asked_after_under_steering_too() -> None:
    first, second = run_world(2, _steered_after_uneven)
    assert first == second


def _selected(engine: str) -> float:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    with torch.no_grad(), fm.edit("layers.0", edits.zero(), select=(slice(None), -1)), fm.capture("layers.1") as acts:
        fm(placed.mine(models.tokens()))
    plain = models.net()
    plain.layers[0].register_forward_hook(lambda m, a, o: torch.cat([o[:, :-1], 0 * o[:, -1:]], 1))
    plain.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    seen: list[Tensor] = []
    with torch.no_grad():
        plain(models.tokens())
    return relative_error(acts["layers.1"], seen[0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_of_a_selection(engine: str) -> None:
    assert max(run_world(2, _selected, engine)) < 1e-5


def test_the_default_is_sharded_where_that_is_exact() -> None:
    made = presets(WIDTH)
    assert {n for n in made if HookFunction("x", editing_function=made[n][0]).run != "sharded"} == {
        "resample",
        "resample_from",
        "patch_rows",
    }
    assert HookFunction("x", editing_function=made["add"][0], run="one_rank").run == "one_rank"
    assert HookFunction("x", editing_function=made["noise"][0]).random
    assert HookFunction("x", editing_function=lambda x: x).run == "every_rank"


# -- where and when --------------------------------------------------------------------------------------------
def _generated(edit: Any, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """What a layer gave before and after the edit, in each of four calls of ``generate``."""
    model = models.make("llama")
    inputs = models.inputs("llama")
    if mask is not None:
        inputs["attention_mask"] = mask
    fm = FlexModel(model)
    with _around(fm, edit) as (before, after), torch.no_grad():
        fm.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return before.calls("model.layers.0"), after.calls("model.layers.1")


@contextmanager
def _around(fm: FlexModel, edit: Any) -> Iterator[tuple[Any, Any]]:
    """What the first layer gives before and after an edit of it."""
    with ExitStack() as stack:
        before = stack.enter_context(fm.capture("model.layers.0"))
        stack.enter_context(fm.edit("model.layers.0", edit))
        yield before, stack.enter_context(fm.capture("model.layers.1", hook_type="forward_pre"))


def _changed(edit: Any, mask: Tensor | None = None) -> list[list[list[int]]]:
    """By call and row: the columns that the edit has changed."""
    return [
        [torch.nonzero((a != b).any(-1)[row]).flatten().tolist() for row in range(2)]
        for a, b in zip(*_generated(edit, mask), strict=True)
    ]


VECTOR = torch.ones(32)


def test_positions_and_phases() -> None:
    same = lambda *columns: [[list(c)] * 2 for c in columns]  # noqa: E731
    assert _changed(edits.add(VECTOR)) == same(range(6), [0], [0], [0])
    assert _changed(edits.add(VECTOR, when="prefill")) == same(range(6), [], [], [])
    assert _changed(edits.add(VECTOR, when="decode")) == same([], [0], [0], [0])
    assert _changed(edits.add(VECTOR, positions="last")) == same([5], [0], [0], [0])
    assert _changed(edits.add(VECTOR, positions=[2, 7])) == same([2], [], [0], [])  # 7 is the second new token
    assert _changed(edits.add(VECTOR, positions=-1, when="prefill")) == same([5], [], [], [])


def test_last_is_no_padding() -> None:
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, :2] = 0  # on the left
    assert [rows[0] for rows in _changed(edits.add(VECTOR, positions="last"), mask)] == [[5], [0], [0], [0]]
    model, inputs = models.make("llama"), models.inputs("llama")
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0  # on the right
    fm = FlexModel(model)
    with _around(fm, edits.zero(positions="last")) as (a, b), torch.no_grad():
        fm(inputs["input_ids"], mask)  # by place
    changed = (a["model.layers.0"] != b["model.layers.1"]).any(-1)
    assert changed.nonzero().tolist() == [[0, 3], [1, 5], [2, 5], [3, 5]]


def _padded(engine: str) -> list[list[int]]:
    model, inputs = models.make("llama"), models.inputs("llama")
    inputs["attention_mask"][0, 4:] = inputs["attention_mask"][3, 2:] = 0
    placed = engines.place(engine, model)
    mine = {k: placed.mine(v) for k, v in inputs.items()}
    fm = FlexModel(placed.model)
    with _around(fm, edits.zero(positions="last")) as (a, b), torch.no_grad():
        fm(**mine)
    return (a["model.layers.0"] != b["model.layers.1"]).any(-1).nonzero().tolist()


def test_last_under_data_parallelism() -> None:
    assert run_world(2, _padded, "ddp") == [[[0, 3], [1, 5], [2, 5], [3, 1]]] * 2


# -- from captured values --------------------------------------------------------------------------------------
def _refs(engine: str) -> list[tuple[float, int]]:
    """A run with one site's values from another run, which stayed on its ranks: how far its output is from the same by
    hand, and the collectives above those of an edit that does nothing."""
    placed, plain = engines.place(engine, models.net()), models.net()
    a, b = models.tokens(), models.tokens().flip(1)
    fm = FlexModel(placed.model)
    found = []
    for site in ("layers.1", "layers.1.mlp.act"):
        kept: list[Tensor] = []
        with torch.no_grad():
            with torch_hook(plain, site, "forward", kept.append):
                plain(b)
            with torch_hook(plain, site, "forward", lambda o, kept=kept: kept[0]):
                want = plain(a)
            with fm.capture(site, deliver="local") as acts:
                fm(placed.mine(b))
            counts = []
            for edit in (lambda x: x, edits.patch(acts.ref(site))):
                with fm.edit(site, edit, run="sharded"):
                    fm(placed.mine(a))  # layouts are found
                    with Collectives() as collectives:
                        output = fm(placed.mine(a))
                counts.append(len(collectives.seen))
        got = engines.whole(fm.full_output(output))
        found.append((relative_error(got, want), counts[1] - counts[0]))
    return found


@pytest.mark.parametrize("engine", ["ddp", "tp", "sp"])
def test_patching_from_values_that_stayed_where_they_are(engine: str) -> None:
    for found in run_world(2, _refs, engine):
        assert [moved for _, moved in found] == [0, 0] and max(error for error, _ in found) < 1e-5


def test_values_in_another_dtype_are_cast() -> None:
    fm = FlexModel(models.net().to(torch.bfloat16))
    with torch.no_grad(), fm.edit("layers.0", edits.add(torch.ones(8, dtype=torch.float64))):
        assert fm(models.tokens()).dtype == torch.bfloat16


# -- trainable -------------------------------------------------------------------------------------------------
def test_a_low_rank_edit_trains() -> None:
    fm = FlexModel(models.net())
    fm.register_trainable_module("steer", edits.LowRank(8, rank=2))
    plain = models.net()(models.tokens())
    with fm.edit("layers.0", edits.module("steer")):
        assert torch.equal(fm(models.tokens()), plain)  # it begins as nothing
        optimizer = torch.optim.SGD(fm.trainable_modules.parameters(), lr=0.5)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = fm(models.tokens()).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    assert losses[-1] < losses[0]


# -- saved and loaded ------------------------------------------------------------------------------------------
def test_json_and_back() -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 6, WIDTH)
    for name, (preset, _) in presets(WIDTH).items():
        tensors: dict[str, Tensor] = {}
        told = json.loads(json.dumps(edits.to_json(preset, tensors)))
        again = edits.from_json(told, tensors)
        assert repr(again) == repr(preset), name
        torch.manual_seed(0)
        want = preset(x)
        torch.manual_seed(0)
        assert torch.equal(again(x), want), name


@pytest.mark.parametrize("what", [lambda x: x, object(), nn.Linear(2, 2)], ids=["lambda", "object", "module"])
def test_what_cannot_be_saved_is_refused(what: Any) -> None:
    with pytest.raises(EditError, match="cannot be saved"):
        edits.to_json(what, {})


@pytest.mark.parametrize(
    "told",
    [
        {"module": "subprocess:Popen", "config": {"dict": {"args": "true"}}, "weights": {}},
        {"function": "nowhere:nothing"},
        {"preset": "unheard_of", "arguments": {}},
        {"pickle": "gASV"},
    ],
)
def test_what_is_no_saved_edit_is_refused(told: Any) -> None:
    with pytest.raises(EditError):
        edits.from_json(told, {})


# -- bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: edits.add(VECTOR, positions="first"), "positions='first' is unknown"),
        (lambda: edits.add(VECTOR, when="never"), "when='never' is unknown"),
        (lambda: edits.zero([9])(torch.ones(2, 3)), r"index \[9\] is not within the 3 places of dim -1"),
        (lambda: edits.patch(torch.ones(3, 3))(torch.ones(2, 5)), "the values to patch in have the shape"),
        (lambda: edits.project_out(torch.zeros(3)), "all directions are zero"),
        (lambda: edits.project_out(torch.ones(3))(torch.ones(2, 5)), "directions have 3 elements"),
        (lambda: edits.sae(nn.Linear(2, 2)), "a module with encode and decode, got Linear"),
        (lambda: edits.compose(lambda x: x), "takes presets"),
        (lambda: edits.compose(), "got nothing"),
        (lambda: edits.resample()(torch.ones(1, 2)), "at least two rows"),
        (lambda: edits.patch_rows(0, 5)(torch.ones(2, 2)), "no row 5 in a batch of 2"),
        (lambda: edits.add(VECTOR, positions=0)(torch.ones(32)), "needs a value"),
        (lambda: edits.scale(2.0, positions=torch.ones(4, dtype=torch.bool))(torch.ones(1, 3, 2)), "the mask of pos"),
    ],
)
def test_bad_input(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(EditError, match=says):
        make()


def test_zero_has_no_nan() -> None:
    assert torch.equal(edits.zero([0])(torch.tensor([[float("nan"), 1.0]])), torch.tensor([[0.0, 1.0]]))


# -- hooks in a folder -----------------------------------------------------------------------------------------
def _hooked() -> FlexModel:
    fm = FlexModel(models.net(), {})
    fm.register_forward_hook(HookFunction("layers.0", editing_function=edits.add(drawn(8), positions="last")))
    fm.register_forward_hook(
        HookFunction("layers.1", editing_function=halve, select=(slice(None), -1), axes=("tp",), capture=False)
    )
    layout = {"tp": Shard(1), "dp": Partial("avg"), "cp": ZigZag(1), "ep": Replicate()}
    fm.register_full_backward_pre_hook(HookFunction("head", expected_shape=(None, 6, None), layout=layout))
    fm.register_hook(HookFunction("head.weight"))
    fm.create_hook_group("acts", ".act")
    return fm


def test_hooks_in_a_folder(tmp_path: Path) -> None:
    fm = _hooked()
    fm.save_hooks(tmp_path / "kept")
    other = FlexModel(models.net(), {})
    handles = other.load_hooks(tmp_path / "kept")
    assert other.hooks() == fm.hooks()
    outputs = []
    for one in (fm, other):
        out = one(models.tokens())
        out.pow(2).mean().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    assert fm.output_ptr.keys() == other.output_ptr.keys()
    assert all(torch.equal(fm.output_ptr[k][0], other.output_ptr[k][0]) for k in fm.output_ptr)
    mine, theirs = (next(h for h in m._runtime.bounds if h.name == "head").hook for m in (fm, other))
    assert mine.layout == theirs.layout and mine.expected_shape == theirs.expected_shape
    for handle in handles:
        handle.remove()
    assert other.hooks() == []


def test_a_name_made_a_pattern_by_hand(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    fm.register_forward_hook(HookFunction("layers.0.mlp"))
    told = (fm.save_hooks(tmp_path) / "hooks.json").read_text()
    (tmp_path / "hooks.json").write_text(told.replace("layers.0.mlp", "layers.*.mlp"))
    other = FlexModel(models.net())
    other.load_hooks(tmp_path)
    assert [h.name for h in other.hooks()] == ["layers.0.mlp", "layers.1.mlp"]


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    fm.register_forward_hook(HookFunction("layers.0", editing_function=lambda x: x * 2))
    with pytest.raises(EditError, match=r"layers.0 \(forward\): .*<lambda> cannot be imported"):
        fm.save_hooks(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_hooks_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    fm.register_forward_hook(HookFunction("layers.0"))
    fm.register_forward_hook(HookFunction("layers.1"))
    fm.save_hooks(tmp_path)
    short = FlexModel(models.net(layers=1))
    with unchanged(short), pytest.raises(NameNotFoundError):
        short.load_hooks(tmp_path)
    with unchanged(short), pytest.raises(EditError, match="holds no saved hooks"):
        short.load_hooks(tmp_path / "nowhere")


def _kept(folder: str) -> bool:
    placed = engines.place("tp", models.net())
    fm = FlexModel(placed.model)
    fm.register_forward_hook(HookFunction("layers.0.mlp.act", editing_function=edits.add(drawn(16))))
    fm.save_hooks(folder)
    dist.barrier()
    want = fm(models.tokens())
    fm.restore()
    other = FlexModel(placed.model)
    other.load_hooks(folder)
    return torch.equal(other(models.tokens()), want)


def test_hooks_of_several_ranks(tmp_path: Path) -> None:
    assert run_world(2, _kept, str(tmp_path / "kept")) == [True] * 2
