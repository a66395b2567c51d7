"""PEFT's adapters and 8-bit weights: the plain model's names, values, edits and gradients under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import models
import parity
import pytest
import torch
import torch.distributed as dist
from conftest import torch_hook
from oracle import Count, relative_error
from test_edits_gradients import mix
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import NameNotFoundError, RegistrationError

peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "gate_proj"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "colwise": {"target_modules": ["q_proj", "gate_proj"]},
    "two": {},
    "both": {},
    "merged": {},
    "disabled": {"modules_to_save": ["lm_head"]},
}


def adapted(kind: str, base: nn.Module | None = None) -> nn.Module:
    """A tiny Llama with adapters, whose weights are random and not zero."""
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(options | CONFIGS[kind]))
    model = peft.get_peft_model(models.make("llama") if base is None else base, config)
    if kind in ("two", "both"):
        model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", **(options | {"r": 2})))
        model.base_model.set_adapter("second" if kind == "two" else ["default", "second"])
    if kind == "merged":
        model.merge_adapter()
        model.requires_grad_(False)
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
        model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1)
    return model.eval()


def inner(model: nn.Module) -> nn.Module:
    """The Llama in it, whose names are the plain ones."""
    return model.get_base_model()  # type: ignore[operator, no-any-return]


# -- names ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CONFIGS)
def test_names_are_the_plain_models(kind: str) -> None:
    model, plain = adapted(kind), models.make("llama")
    fm = FlexModel(model)
    assert fm.wrapped_module_names == [n for n, _ in inner(model).named_modules()]
    names = fm._runtime.names
    for name, module in model.named_modules():  # PEFT's own spelling
        assert names.clean(name) in fm.wrapped_module_names
        assert names.modules[names.clean(name)] is module or "model" in name.split(".")[-1] or not name
    for name, _ in plain.named_modules():
        assert name in fm.wrapped_module_names or kind == "tokens"
    merged = {"model.layers.0.self_attn.q_proj.weight"} if kind == "merged" else set()
    for name, parameter in plain.named_parameters():
        assert torch.equal(fm.get_module_parameter(name), parameter) or kind == "merged"
        assert torch.equal(fm.get_module_parameter(f"base_model.model.{name}"), fm.get_module_parameter(name))
    assert not merged or not torch.equal(fm.get_module_parameter(*merged), plain.get_parameter(*merged))


def test_keys_of_the_state_are_the_plain_models() -> None:
    model, plain = adapted("modules_to_save"), models.make("llama")
    fm, before = FlexModel(model), {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in fm.state_dict().items()}
    assert not plain.load_state_dict(state, strict=False).missing_keys
    assert set(state) - set(plain.state_dict()) == {n for n in state if "lora_" in n or "modules_to_save" in n}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fm.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    listed = dict(fm.named_parameters())
    assert "model.layers.0.mlp.down_proj.weight" in listed and "lm_head.modules_to_save.default.weight" in listed


def test_patterns() -> None:
    fm = FlexModel(adapted("lora"), {})
    batch = models.inputs("llama")
    with fm.capture("base_model.model.model.layers.*.mlp", "**.q_proj", "**.lora_A.*", "lm_head", "") as acts:
        out = fm(**batch)
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert set(acts) == {""} | {"lm_head"} | {
        f"{x}.{n}"
        for x in layers
        for n in ("mlp", "self_attn.q_proj", "self_attn.q_proj.lora_A.default", "mlp.down_proj.lora_A.default")
    }
    assert torch.equal(acts["lm_head"], out.logits) and torch.equal(acts[""], out.logits)
    with pytest.raises(RegistrationError, match=r"lora_A.*ModuleDict has no forward"):
        fm.register_forward_hook(HookFunction("model.layers.0.self_attn.q_proj.lora_A"))
    with pytest.raises(RegistrationError, match="does not require a gradient"):
        fm.register_hook(HookFunction("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(NameNotFoundError, match=r"original_module\.gate_proj|modules_to_save\.default\.gate_proj"):
        copied = peft.get_peft_model(
            models.make("llama"),
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["mlp"]),
        )
        FlexModel(copied)._runtime.names.clean("model.layers.0.mlp.gate_proj")


def test_unloaded_and_injected() -> None:
    """What PEFT leaves when it merges and goes, and what transformers' own ``add_adapter`` makes."""
    plain = adapted("lora").merge_and_unload()
    assert FlexModel(plain).wrapped_module_names == [n for n, _ in models.make("llama").named_modules()]
    model = models.make("llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    fm = FlexModel(model)
    assert "model.layers.0.self_attn.q_proj.base_layer" in fm.wrapped_module_names
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(fm.get_module_parameter(name), models.make("llama").get_parameter(name))


def test_prompt_tuning() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(models.make("llama"), config).eval()
    fm, seen = FlexModel(model), []
    assert set(fm.wrapped_module_names) >= {n for n, _ in models.make("llama").named_modules()}
    torch_hook(inner(model), "model.layers.0", "forward", lambda x: seen.append(x.clone()))
    with fm.capture("model.layers.0", "prompt_encoder.default") as acts:
        fm(**models.inputs("llama"))
    assert torch.equal(acts["model.layers.0"], seen[0]) and seen[0].shape[1] == 9
    assert acts["prompt_encoder.default"].shape[-1] == 32


def test_generate() -> None:
    fm, ids = FlexModel(adapted("lora")), models.inputs("llama")["input_ids"]
    want: list[Tensor] = []
    model = adapted("lora")
    inner(model).lm_head.register_forward_hook(lambda m, a, o: want.append(o))
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **options)
    with fm.capture("lm_head", "") as acts:
        assert torch.equal(fm.generate(input_ids=ids, **options), expected)
    for name in ("lm_head", ""):
        assert all(torch.equal(a, b) for a, b in zip(acts.calls(name), want, strict=True))


# -- values, gradients and edits -----------------------------------------------------------------------------------
RANKS = {"none": 1, "ddp": 2, "fsdp1_orig": 2, "fsdp2": 2, "tp": 2}


def place(engine: str, kind: str, path: Path) -> engines.Placed:
    world, rank = (dist.get_world_size(), dist.get_rank()) if engine != "none" else (1, 0)
    if engine == "tp":
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=2)
        base = type(models.make("llama")).from_pretrained(path, distributed_config=config, attn_implementation="eager")
        base.config.use_cache = False
        return engines.Placed(with_the_plain_adapters(adapted(kind, base), kind))
    model = adapted(kind)
    if engine == "ddp":
        return engines.Placed(nn.parallel.DistributedDataParallel(model), world, rank)
    if engine == "fsdp1_orig":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device(engines.device), use_orig_params=True)
        return engines.Placed(wrapped, world, rank)
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        for layer in inner(model).model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return engines.Placed(model, world, rank)


def with_the_plain_adapters(model: nn.Module, kind: str) -> nn.Module:
    """The values of one process's adapters: each rank of a tensor-parallel model draws its own part at random."""
    from torch.distributed.tensor import distribute_tensor

    values = dict(adapted(kind).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                new = values[name]
                if isinstance(parameter, DTensor):
                    new = distribute_tensor(new, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(new)
    return model


def compare(engine: str, kind: str, path: Path) -> Count:
    placed, plain, full = place(engine, kind, path), inner(adapted(kind)), models.inputs("llama")
    mine = {k: placed.mine(v) for k, v in full.items()}
    learns = any(p.requires_grad for p in plain.parameters()) and (engine, kind) != ("tp", "lora")  # see CANNOT
    types = parity.TYPES if learns else parity.TYPES[:2]
    with torch.set_grad_enabled(learns):
        return parity.compare(
            placed.model, plain, lambda m: parity.square(m(**mine)), lambda m: parity.square(m(**full)), types=types
        )


def run(engine: str, function: Any, *args: object) -> list[Any]:
    return [function(engine, *args)] if engine == "none" else run_world(RANKS[engine], function, engine, *args)


def saved(engine: str, path: Path) -> Path:
    if engine == "tp":
        models.make("llama").save_pretrained(path)
    return path


CASES = [
    *(("none", k) for k in CONFIGS),
    *((e, k) for e in ("ddp", "fsdp2") for k in ("lora", "modules_to_save", "two", "tokens")),
    ("fsdp1_orig", "lora"),
    ("fsdp2", "dora"),
    ("tp", "colwise"),
    ("tp", "lora"),
]

# What PEFT 0.21 cannot run itself, and why.
CANNOT = "gradients under transformers' tensor parallelism: the lora_A of a rowwise layer takes its local width for all"


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_parity(engine: str, kind: str, tmp_path: Path) -> None:
    counts = run(engine, compare, kind, saved(engine, tmp_path))
    print(f"peft {kind}/{engine}: {counts[0]}")
    for count in counts:
        assert not count.wrong and not count.refused and count.tried > 70


def _fails_by_itself(path: Path) -> None:
    place("tp", "lora", path).model(**models.inputs("llama"))


def test_what_peft_cannot_run(tmp_path: Path) -> None:
    print(f"peft lora/tp: not run, {CANNOT}")
    with pytest.raises(AssertionError, match="RuntimeError: shape"):
        run_world(2, _fails_by_itself, saved("tp", tmp_path))


EDITED = ("self_attn.q_proj", "self_attn.q_proj.base_layer", "self_attn.q_proj.lora_A.default", "mlp.gate_proj", "mlp")


def _edited(engine: str, kind: str, path: Path) -> tuple[int, list[str]]:
    """Edits that mix; the gradients of adapters behind them, met by ``register_hook`` too."""
    bad = []
    for site in (f"model.layers.1.{s}" for s in EDITED):
        placed, plain, full = place(engine, kind, path), inner(adapted(kind)), models.inputs("llama")
        mine = {k: placed.mine(v) for k, v in full.items()}
        trained = [n for n, p in plain.named_parameters() if p.requires_grad]
        torch_hook(plain, site, "forward", mix)
        parity.square(plain(**full)).backward()
        fm = FlexModel(placed.model, deliver="all")
        for name in trained:
            fm.register_hook(HookFunction(name))
        with fm.edit(site, mix):
            parity.square(fm(**mine)).backward()
        for name in trained:
            got, want = fm.output_ptr.get(name, []), plain.get_parameter(name).grad
            if len(got) != 1 or want is None or relative_error(got[0], want) > 1e-5:
                error = relative_error(got[0], want) if got and want is not None else float("nan")
                bad.append(f"{site}: the gradient of {name}, {len(got)} {error:.2g}")
        frozen = [n for n, p in fm.named_parameters() if p.grad is not None and n not in trained]
        bad += [f"{site}: {n} has a gradient" for n in frozen]
    return len(EDITED), bad


@pytest.mark.parametrize(
    ("engine", "kind"),
    [(e, "lora") for e in RANKS if e != "tp"]
    + [("tp", "colwise")]
    + [("ddp", "modules_to_save"), ("fsdp2", "modules_to_save")],
)
def test_edits_and_gradients_of_adapters(engine: str, kind: str, tmp_path: Path) -> None:
    for tried, bad in run(engine, _edited, kind, saved(engine, tmp_path)):
        print(f"peft {kind}, edits/{engine}: {tried - len(bad)} exact of {tried}")
        assert not bad
