"""``fm.at``: every component of every family is what plain torch hooks and the model's own outputs say, on one process
and on many; edits of heads equal hand-written hooks; what is unknown is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as t
from oracle import relative_error
from test_families import place
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, edits
from flex_model.components import Place
from flex_model.errors import ComponentError, RegistrationError

LAYER = 1
_SIZES = dict(vocab_size=66, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_LLAMA = dict(**_SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)
_MORE: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_LLAMA)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_LLAMA)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**_LLAMA)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**_LLAMA)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_LLAMA)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_LLAMA)),
    "glm4": lambda: t.Glm4ForCausalLM(t.Glm4Config(**_LLAMA)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**_LLAMA)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**_SIZES)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LLAMA, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_SIZES)),
    "gpt_neox_sequential": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_SIZES, use_parallel_residual=False)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(vocab_size=66, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "gpt_neo": lambda: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(vocab_size=66, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=66, hidden_size=32, n_layer=2, n_head=4)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**_LLAMA, residual_multiplier=0.5)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**_SIZES, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4)
    ),
}


def make(family: str) -> nn.Module:
    if family not in _MORE:
        return models.make(family)
    torch.manual_seed(0)
    model = _MORE[family]()
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    return model.eval()


# What each family keeps where. (module below the layer, side): the oracle is written by hand, not by the code tested.
_A, _M = "self_attn", "mlp"
_LLAMA_PARTS = {
    "resid_pre": ("", "in"),
    "resid_mid": ("post_attention_layernorm", "in"),
    "resid_post": ("", "out"),
    "ln1": ("input_layernorm", "out"),
    "ln2": ("post_attention_layernorm", "out"),
    "attn_out": (_A, "out"),
    "mlp_out": (_M, "out"),
    "q": (f"{_A}.q_proj", "out"),
    "k": (f"{_A}.k_proj", "out"),
    "v": (f"{_A}.v_proj", "out"),
    "z": (f"{_A}.o_proj", "in"),
    "mlp_pre": (f"{_M}.gate_proj", "out"),
    "mlp_post": (f"{_M}.down_proj", "in"),
}
_MIXTURE = {k: v for k, v in _LLAMA_PARTS.items() if not k.startswith(("mlp_pre", "mlp_post"))}
_MIXTURE["router"] = (f"{_M}.gate", "out")
_SANDWICH = {
    **_LLAMA_PARTS,
    "resid_mid": ("pre_feedforward_layernorm", "in"),
    "ln2": ("pre_feedforward_layernorm", "out"),
    "attn_out": ("post_attention_layernorm", "out"),
    "mlp_out": ("post_feedforward_layernorm", "out"),
}
_GPT2 = {
    "resid_pre": ("", "in"),
    "resid_mid": ("ln_2", "in"),
    "resid_post": ("", "out"),
    "ln1": ("ln_1", "out"),
    "ln2": ("ln_2", "out"),
    "attn_out": ("attn", "out"),
    "mlp_out": ("mlp", "out"),
    "q": ("attn.c_attn", "out", lambda x: x[..., :32]),
    "k": ("attn.c_attn", "out", lambda x: x[..., 32:64]),
    "v": ("attn.c_attn", "out", lambda x: x[..., 64:]),
    "z": ("attn.c_proj", "in"),
    "mlp_pre": ("mlp.c_fc", "out"),
    "mlp_post": ("mlp.c_proj", "in"),
}
_N = "attention.query_key_value"
_NEOX = {
    "resid_pre": ("", "in"),
    "resid_post": ("", "out"),
    "ln1": ("input_layernorm", "out"),
    "ln2": ("post_attention_layernorm", "out"),
    "attn_out": ("attention", "out"),
    "mlp_out": ("mlp", "out"),
    "q": (_N, "out", lambda x: torch.cat([x[..., 24 * h : 24 * h + 8] for h in range(4)], -1)),
    "k": (_N, "out", lambda x: torch.cat([x[..., 24 * h + 8 : 24 * h + 16] for h in range(4)], -1)),
    "v": (_N, "out", lambda x: torch.cat([x[..., 24 * h + 16 : 24 * h + 24] for h in range(4)], -1)),
    "z": ("attention.dense", "in"),
    "mlp_pre": ("mlp.dense_h_to_4h", "out"),
    "mlp_post": ("mlp.dense_4h_to_h", "in"),
}
_PHI = {
    **{k: v for k, v in _LLAMA_PARTS.items() if k not in ("resid_mid", "ln2")},
    "z": (f"{_A}.dense", "in"),
    "mlp_pre": (f"{_M}.fc1", "out"),
    "mlp_post": (f"{_M}.fc2", "in"),
}
_QKV = f"{_A}.qkv_proj"
_PARTS: dict[str, dict[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), _LLAMA_PARTS),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "qwen2_moe"), _MIXTURE),
    "gpt_oss": {**_MIXTURE, "router": (f"{_M}.router", "out")},
    **dict.fromkeys(("gemma2", "gemma3"), _SANDWICH),
    "olmo2": {
        **{k: v for k, v in _SANDWICH.items() if k not in ("ln1", "ln2")},
        "resid_mid": (_M, "in"),
    },
    "glm4": {
        **{k: v for k, v in _LLAMA_PARTS.items() if k != "mlp_pre"},
        "attn_out": ("post_self_attn_layernorm", "out"),
        "mlp_out": ("post_mlp_layernorm", "out"),
    },
    "cohere": {k: v for k, v in _LLAMA_PARTS.items() if k not in ("resid_mid", "ln2")},
    "phi": _PHI,
    "phi3": {
        **{k: v for k, v in _LLAMA_PARTS.items() if k != "mlp_pre"},
        "q": (_QKV, "out", lambda x: x[..., :32]),
        "k": (_QKV, "out", lambda x: x[..., 32:48]),
        "v": (_QKV, "out", lambda x: x[..., 48:]),
    },
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gpt_neox_sequential": {**_NEOX, "resid_mid": ("post_attention_layernorm", "in")},
    "gptj": {
        **{k: v for k, v in _GPT2.items() if k not in ("resid_mid", "ln2")},
        **{k: (f"attn.{k}_proj", "out") for k in "qkv"},
        "z": ("attn.out_proj", "in"),
        "mlp_pre": ("mlp.fc_in", "out"),
        "mlp_post": ("mlp.fc_out", "in"),
    },
    "gpt_neo": {
        **_GPT2,
        **{k: (f"attn.attention.{k}_proj", "out") for k in "qkv"},
        "z": ("attn.attention.out_proj", "in"),
    },
    "opt": {
        **_LLAMA_PARTS,
        "resid_mid": ("final_layer_norm", "in"),
        "ln1": ("self_attn_layer_norm", "out"),
        "ln2": ("final_layer_norm", "out"),
        "mlp_out": ("fc2", "out"),
        "z": (f"{_A}.out_proj", "in"),
        "mlp_pre": ("fc1", "out"),
        "mlp_post": ("fc2", "in"),
    },
    "bert": {
        "attn_out": ("attention.output.dense", "out"),
        "mlp_out": ("output.dense", "out"),
        "q": ("attention.self.query", "out"),
        "k": ("attention.self.key", "out"),
        "v": ("attention.self.value", "out"),
        "z": ("attention.output.dense", "in"),
        "mlp_pre": ("intermediate.dense", "out"),
        "mlp_post": ("output.dense", "in"),
    },
    "deepseek_v3": {k: v for k, v in _MIXTURE.items() if k not in "qkv"},
}
_OUTSIDE = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "gpt_neo": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "gptj": ("transformer.wte", None, "transformer.ln_f", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings", None, "cls.predictions.decoder"),
    "phi": ("model.embed_tokens", None, "model.final_layernorm", "lm_head"),
    **dict.fromkeys(
        ("gpt_neox", "gpt_neox_sequential"),
        ("gpt_neox.embed_in", None, "gpt_neox.final_layer_norm", "lm_head"),
    ),
}
_STACK = {"gpt2": "transformer.h", "gptj": "transformer.h", "gpt_neo": "transformer.h", "bert": "bert.encoder.layer"}
_STACK |= {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gpt_neox_sequential": "gpt_neox.layers"}


def in_heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (-1, 8))


def by_hand(model: nn.Module, family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every component of layer LAYER and outside, by plain torch hooks."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(key: str, then: Callable[[Tensor], Tensor], value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found[key] = then(value.detach().clone())

    def watch(name: str, side: str, key: str, then: Callable[[Tensor], Tensor]) -> None:
        module = model.get_submodule(name)
        if side == "out":
            handles.append(module.register_forward_hook(lambda m, a, o: keep(key, then, o)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, a: keep(key, then, a)))

    for component, (where, side, *then) in _PARTS[family].items():
        name = ".".join(p for p in (_STACK.get(family, "model.layers"), str(LAYER), where) if p)
        of_heads = in_heads if component in ("q", "k", "v", "z") else (lambda x: x)
        cut = then[0] if then else (lambda x: x)
        watch(name, side, component, lambda x, cut=cut, of_heads=of_heads: of_heads(cut(x)))
    outside = _OUTSIDE.get(family, ("model.embed_tokens", None, "model.norm", "lm_head"))
    for component, name in zip(("embed", "pos_embed", "ln_final", "unembed"), outside, strict=True):
        if name is not None:
            watch(name, "out", component, lambda x: x)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    found["pattern"] = out.attentions[LAYER].detach().clone()
    for handle in handles:
        handle.remove()
    return found


def places(fm: FlexModel, names: Any) -> dict[str, Place]:
    outside = ("embed", "pos_embed", "ln_final", "unembed")
    return {n: fm.at(n) if n in outside else fm.at(n, LAYER) for n in names}


def compare(engine: str, family: str, path: Path) -> tuple[int, list[str]]:
    """(components compared, what was wrong), whole and head by head."""
    plain = make(family)
    full = models.inputs(family)
    want = by_hand(plain, family, full)
    placed = place(engine, plain, path)
    fm = FlexModel(placed.model)
    found = places(fm, want)
    heads = {c: fm.at(c, LAYER, head=1) for c in ("q", "k", "v", "z", "pattern") if c in want}
    several = {c: fm.at(c, LAYER, head=[1, 0]) for c in heads}
    mine = {k: placed.mine(v) for k, v in full.items()}
    with fm.capture(*found.values(), [*heads.values(), *several.values()]) as acts, torch.no_grad():
        fm(**mine)
    bad = []

    def check(label: str, got: Any, wanted: Tensor) -> None:
        if not isinstance(got, Tensor) or relative_error(got, wanted) > 1e-5:
            bad.append(f"{family}/{engine} {label}: {getattr(got, 'shape', got)} for {wanted.shape}")

    for name, wanted in want.items():
        check(name, acts[found[name]], wanted)
        if name in heads:
            dim = 1 if name == "pattern" else 2
            check(f"{name}, a head", acts[heads[name]], wanted.select(dim, 1))
            check(f"{name}, heads", acts[str(several[name])], wanted.index_select(dim, torch.tensor([1, 0])))
    return len(want), bad


def saved(family: str, folder: Path, engine: str) -> Path:
    if engine == "tp":
        make(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", _PARTS)
def test_every_component_is_what_plain_hooks_see(family: str, tmp_path: Path) -> None:
    count, wrong = compare("none", family, tmp_path)
    print(f"{family}: {count} components")
    assert not wrong


@pytest.mark.parametrize("family", [f for f in _PARTS if "resid_pre" in _PARTS[f]])
def test_the_stream_is_the_sum_of_its_parts(family: str) -> None:
    fm = FlexModel(make(family))
    middle = "resid_mid" in _PARTS[family]
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ["resid_mid"] * middle
    with fm.capture(*(fm.at(n) for n in names)) as acts, torch.no_grad():
        fm(**models.inputs(family))
    pre, attn, mlp, post = (acts.stack(fm.at(n)) for n in names[:4])
    mlp = mlp.reshape(post.shape)
    assert relative_error(pre + attn + mlp, post) < 1e-6
    if middle:
        assert relative_error(pre + attn, acts.stack("@resid_mid.*").reshape(post.shape)) < 1e-6
    assert torch.equal(pre[1:], post[:-1])
    assert len(fm._runtime.sums_hold) == 2  # seen in the forward


@pytest.mark.parametrize("family", [f for f in _PARTS if "v" in _PARTS[f] and "pattern" not in _PARTS[f]])
def test_heads_are_the_models_own(family: str) -> None:
    """z is the pattern times v, head by head: the order of heads, and of a fused projection, is right."""
    fm = FlexModel(make(family))
    where = [fm.at(c, 0) for c in ("pattern", "v", "z")]
    with fm.capture(*where) as acts, torch.no_grad():
        fm(**models.inputs(family))
    pattern, v, z = (acts[w] for w in where)
    v = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
    assert relative_error(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z) < 1e-5


ENGINES = [("ddp", f) for f in ("llama", "gpt2", "gemma3", "opt", "qwen3_moe", "bert")]
ENGINES += [("fsdp2", f) for f in ("llama", "gpt2", "gpt_neox", "gemma3", "opt", "olmoe")]
ENGINES += [("tp", f) for f in ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "gpt_neox", "phi", "phi3")]


@pytest.mark.parametrize(("engine", "family"), ENGINES)
def test_components_on_two_ranks(engine: str, family: str, tmp_path: Path) -> None:
    path = saved(family, tmp_path, engine)
    for count, wrong in run_world(2, compare, engine, family, path):
        assert count > 8 and not wrong
