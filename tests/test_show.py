"""``fm.show``: shapes in the picture are those of the unsharded model, under every engine; the tree in a terminal."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import engines
import models
import pipelines
import pytest
import torch
from oracle import plain_hooks
from test_families import CANNOT, place
from test_pipeline_transformers import load
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.core.report import SiteRow
from flex_model.errors import FlexModelError
from flex_model.show import Outline
from flex_model.show.outline import _value

KINDS = {"in": "forward_pre", "out": "forward"}
Shapes = dict[tuple[str, str, int], tuple[int, ...]]


def shown(outline: Outline) -> tuple[Shapes, dict[str, str]]:
    """What the picture says of every value that has a whole, and why others have none."""
    shapes, refused = {}, {}
    for node in outline.root.walk():
        for value in node.row.values:
            if value.shape is None:
                refused[node.row.name] = value.refusal or " ".join(value.placements)
            else:
                shapes[node.row.name, KINDS[value.side], value.index] = value.shape
    return shapes, refused


def expected(plain: nn.Module, run: Any) -> Shapes:
    with torch.no_grad():
        return {key: tuple(values[0].shape) for key, values in plain_hooks(plain, run, backward=False).items()}


def compared(plain: nn.Module, run: Any, outline: Outline) -> list[Any]:
    """[right places, wrong ones, missing ones, refusals, whole parameters, those of the plain model]"""
    want, (found, refused) = expected(plain, run), shown(outline)
    wrong = {str(k): (want.get(k), s) for k, s in found.items() if want.get(k) != s}
    missing = [str(k) for k in want if k not in found and k[0] not in refused]
    sizes = outline.root.size, sum(p.numel() for p in plain.parameters())
    return [len(found) - len(wrong), wrong, missing, refused, *sizes]


# -- shapes ------------------------------------------------------------------------------------------------------
def _engine(engine: str) -> list[Any]:
    plain, tokens = models.net(), models.tokens()
    placed = engines.place(engine, copy.deepcopy(plain))
    fm = FlexModel(placed.model)
    outline = fm.show(placed.mine(tokens)).outline
    locals_ = {n.row.name: v.local for n in outline.root.walk() for v in n.row.values if v.side == "out"}
    met: dict[str, tuple[int, ...]] = {}

    def note(name: str, value: Any) -> None:
        local = value.to_local() if isinstance(value, DTensor) else value
        met.setdefault(name, tuple(local.shape))

    for name, module in fm._runtime.names.modules.items():
        module.register_forward_hook(lambda m, a, out, name=name: note(name, out))
    with torch.no_grad():
        placed.model(placed.mine(tokens))
    here = {name: (shape, met[name]) for name, shape in locals_.items() if name and met[name] != shape}
    return [*compared(plain, lambda m: m(tokens), outline), here, [a.kind for a in outline.axes]]


@pytest.mark.parametrize("engine", [*engines.TWO_RANKS, *engines.FAIRSCALE_TWO_RANKS, *engines.FOUR_RANKS])
def test_shapes_of_every_value(engine: str) -> None:
    for right, wrong, missing, refused, whole, plain, here, kinds in run_world(
        4 if engine in engines.FOUR_RANKS else 2, _engine, engine
    ):
        print(f"{engine}: {right} shapes as in the plain model")
        assert not wrong and not missing and not refused and not here
        assert whole == plain and kinds


def _megatron(which: str) -> list[Any]:
    import test_megatron as megatron

    spread, (changes, model) = megatron.Spread(tp=2), megatron.MODELS[which]
    sharded, plain = megatron.pair(spread, changes, model)
    ids = megatron.tokens()
    given = ids, megatron.positions(ids), None
    return compared(plain, megatron.alone(spread, lambda m: m(*given)), FlexModel(sharded).show(given).outline)


@pytest.mark.parametrize("which", ["tp", "sp gated bias tied"])
def test_shapes_of_megatron(which: str) -> None:
    pytest.importorskip("megatron.core")
    for right, wrong, missing, refused, whole, plain in run_world(2, _megatron, which):
        print(f"Megatron-core {which}: {right} shapes as in the plain model")
        assert not wrong and not missing and not refused and whole == plain


def _routers(case: str) -> list[Any]:
    import test_megatron_experts as experts

    sizes, changes = experts.CASES[case]
    spread = experts.Spread(**sizes)
    sharded, plain = experts.pair(spread, changes)
    full = experts.tokens()
    mine = spread.mine(full)
    outline = FlexModel(sharded).show((mine, experts.positions(mine), None)).outline
    run = experts.alone(spread, lambda m: m(full, experts.positions(full), None))
    found = compared(plain, run, outline)
    return [
        {k: v for k, v in found[1].items() if "experts" not in k},
        sum("router" in str(k) for k in shown(outline)[0]),
    ]


def test_rows_of_routers_are_flat(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    for wrong, routers in run_world(2, _routers, "dp=2"):
        assert not wrong and routers


def _family(engine: str, family: str, path: Path) -> list[Any]:
    plain = models.make(family)
    placed = place(engine, plain, path)
    batch = models.inputs(family)
    fm = FlexModel(placed.model)
    outline = fm.show({k: placed.mine(v) for k, v in batch.items()}).outline
    return compared(models.make(family), lambda m: m(**batch), outline)


FAMILIES = ("llama", "gpt2", "qwen3_moe", "t5")


@pytest.mark.parametrize(
    ("engine", "family"), [(e, f) for e in ("none", "tp", "fsdp2") for f in FAMILIES if (e, f) not in CANNOT]
)
def test_shapes_of_families(engine: str, family: str, tmp_path: Path) -> None:
    models.make(family).save_pretrained(tmp_path)
    rows = [_family(engine, family, tmp_path)] if engine == "none" else run_world(2, _family, engine, family, tmp_path)
    for right, wrong, missing, refused, whole, plain in rows:
        print(f"{family}/{engine}: {right} shapes as in the plain model; without a whole: {refused}")
        assert not wrong and not missing
        assert all("experts" in name for name in refused), refused
        assert whole == plain


def _three(path: Path) -> list[Any]:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    ids = torch.arange(12).view(2, 6)
    plain = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    split = LlamaForCausalLM.from_pretrained(
        path, attn_implementation="eager", distributed_config=DistributedConfig(tp_size=3)
    )
    fm = FlexModel(split.eval())
    outline = fm.show({"input_ids": ids, "use_cache": False}).outline
    with fm.capture("**") as acts:
        fm(input_ids=ids, use_cache=False)
    captured = {name: tuple(value.shape) for name, value in acts.items()}
    first = {n.row.name: v.shape for n in outline.root.walk() for v in n.row.values if (v.side, v.index) == ("out", 0)}
    apart = {name: (shape, first[name]) for name, shape in captured.items() if first[name] != shape}
    return [*compared(plain, lambda m: m(input_ids=ids, use_cache=False), outline), apart, len(captured)]


def test_three_ranks_as_capture_returns_it(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=66, num_hidden_layers=2)).save_pretrained(tmp_path)
    for right, wrong, missing, refused, whole, plain, apart, count in run_world(3, _three, tmp_path):
        print(f"llama/tp of 3: {right} shapes as in the plain model, {count} as fm.capture returns them")
        assert not wrong and not missing and not refused and not apart and count > 30 and whole == plain


def _stages(family: str, path: Path) -> list[Any]:
    plain, model = load(family, path)
    batch = models.inputs(family)
    picture = FlexModel(model).show(batch)
    stages = {n.row.name: n.row.stages for n in picture.outline.root.walk()}
    return [*compared(plain, lambda m: m(**batch), picture.outline), stages["model.layers.0"], stages["model.layers.1"]]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_pipeline_of_transformers(family: str, tmp_path: Path) -> None:
    models.make(family).save_pretrained(tmp_path)
    for right, wrong, missing, refused, whole, plain, first, second in run_world(2, _stages, family, tmp_path):
        print(f"{family}/pp: {right} shapes as in the plain model")
        assert not wrong and not missing and all("experts" in name for name in refused)
        assert whole == plain and (first, second) == ((0,), (1,))


def _schedule(name: str) -> list[Any]:
    plain, tokens = models.net(), models.tokens()
    pipe = pipelines.Pipe(plain, name)
    schedule, fm = pipe.schedule(), FlexModel(pipe.module)
    picture = fm.show(tokens, forward=lambda batch: pipelines.step(schedule, batch, train=False))
    return [*compared(plain, lambda m: m(tokens), picture.outline), str(picture)]


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_a_pipeline_of_torch(schedule: str) -> None:
    for right, wrong, _, refused, whole, plain, text in run_world(2, _schedule, schedule):
        print(f"{schedule}: {right} shapes as in the plain model\n{text}")
        assert not wrong and not refused and whole == plain


# -- the tree ----------------------------------------------------------------------------------------------------
def test_repeated_blocks_are_folded() -> None:
    fm = FlexModel(models.make("llama"))
    lines = str(fm.show(models.inputs("llama"))).splitlines()
    assert any("layers.0-1 x2" in line and "each" in line for line in lines)
    assert sum("q_proj" in line for line in lines) == 1
    with fm.edit("model.layers.1.mlp", lambda x: x * 2):
        lines = str(fm).splitlines()
    assert sum("q_proj" in line for line in lines) == 2 and not any("x2" in line for line in lines)


def test_a_cache_does_not_unfold() -> None:
    fm = FlexModel(models.make("llama"))
    assert "layers.0-1 x2" in str(fm.show({**models.inputs("llama"), "use_cache": True}))


def test_before_a_forward_there_are_no_shapes() -> None:
    fm = FlexModel(models.net())
    assert "fm.show(inputs) finds all" in str(fm) and "output" not in str(fm).splitlines()[1]
    assert str(fm.show()) == str(fm)
    fm.show(models.tokens())
    assert "output" in str(fm).splitlines()[1]


def test_layouts_that_hooks_have_met_are_told_by_axis() -> None:
    row = SiteRow("up", "Linear", "out", 0, (4, 8), "dp: _S(0, 2), tp: S(1)", "the value is a DTensor")
    assert _value(row).placements == ("_S(0, 2)", "S(1)")


def test_hooks_are_shown_where_they_are() -> None:
    fm = FlexModel(models.net())
    one = HookFunction("layers.0.mlp", editing_function=torch.tanh)
    fm.register_forward_hook(one)
    fm.register_hook(HookFunction("head.weight"))
    fm.update_hook_groups(one, "steering")
    with fm.groups("steering"):
        text = str(fm)
    mlp = next(line for line in text.splitlines() if " mlp" in line and "●" in line)
    assert re.search(r"● forward edit \[steering\]", mlp)
    head = next(line for line in text.splitlines() if "head" in line)
    assert "○ tensor" in head


class Odd(nn.Module):
    """Runs one part twice and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 2)
        self.pair = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pair((self.twice(self.twice(x)), x))


def test_what_runs_twice_and_never() -> None:
    fm = FlexModel(Odd())
    picture = fm.show(torch.ones(3, 4))
    lines = {line.split()[1]: line for line in str(picture).splitlines() if "─" in line}
    assert "runs 2 times" in lines["twice"] and "did not run" in lines["never"] and "and 1 more" in lines["pair"]
    assert "does not use it" in next(n for n in picture.outline.root.walk() if n.label == "never").unfired
    assert not [h for h in fm.hooks()] and fm.module.twice._forward_hooks == {}


def test_training_goes_on_as_before() -> None:
    fm = FlexModel(models.net()).train()
    before = torch.get_rng_state()
    fm.show(models.tokens())
    assert fm.module.training and all(m.training for m in fm.module.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_hooks_are_off_meanwhile() -> None:
    output: dict[str, Any] = {}
    fm = FlexModel(models.net(), output)
    fm.register_forward_hook(HookFunction("layers.0", editing_function=lambda x: x * 2))
    with fm.capture("head") as acts:
        fm.show(models.tokens())
        assert not output and [h.fired for h in fm.hooks()] == [0, 0]
        fm(models.tokens())
    assert acts["head"].shape == (4, 6, 32) and len(output["layers.0"]) == 1


def test_a_picture_is_saved(tmp_path: Path) -> None:
    picture = FlexModel(models.net()).show(models.tokens())
    assert picture.save(tmp_path / "net.txt").read_text(encoding="utf-8") == f"{picture}\n"
    assert "<svg" in picture.save(tmp_path / "net.svg").read_text(encoding="utf-8")
    assert len(picture.tree(0).splitlines()) == 3
    with pytest.raises(FlexModelError, match="expected a path that ends in"):
        picture.save(tmp_path / "net.jpeg")
