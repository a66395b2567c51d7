"""``fm.at``: every component of every family is what plain torch hooks and the model's own outputs say, on one process
and on many; edits of heads equal hand-written hooks; what is unknown is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
import transformers as t
from oracle import relative_error
from test_delivery import Wire
from test_families import place
from test_pipeline_transformers import load
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, edits
from flex_model.components import Place
from flex_model.errors import ComponentError, FlexModelError, RegistrationError

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
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=66, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8
        )
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


@pytest.mark.parametrize("family", [f for f in _PARTS if "q" in _PARTS[f]])
def test_heads_do_what_they_should(family: str) -> None:
    """Without a query or key head its pattern is uniform, without a value head its outputs are zero; no others are."""
    fm = FlexModel(make(family))
    pattern, z = fm.at("pattern", 0), fm.at("z", 0)

    def uniform(value: Tensor) -> list[int]:
        last = value[:, :, -1]  # the last position sees all
        return [h for h in range(4) if bool((last[:, h] - last[:, h, :1]).abs().max() < 1e-7)]

    for component in "qkv":
        shared = 2 if len(fm.at(component, 0).spots[0].select.wanted) == 2 else 1  # type: ignore[union-attr]
        with fm.edit(fm.at(component, 0, head=1), edits.zero()), fm.capture(pattern, z) as acts, torch.no_grad():
            fm(**models.inputs(family))
        outputs: Any = acts[z]
        found = [h for h in range(4) if not outputs[:, :, h].any()] if component == "v" else uniform(acts[pattern])  # type: ignore[arg-type]
        assert found == [h for h in range(4) if h // shared == 1], component


ENGINES = [("ddp", f) for f in ("llama", "gpt2", "gemma3", "opt", "qwen3_moe", "bert")]
ENGINES += [("fsdp2", f) for f in ("llama", "gpt2", "gpt_neox", "gemma3", "opt", "olmoe")]
ENGINES += [("tp", f) for f in ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe", "gpt_neox", "phi", "phi3")]


@pytest.mark.parametrize(("engine", "family"), ENGINES)
def test_components_on_two_ranks(engine: str, family: str, tmp_path: Path) -> None:
    path = saved(family, tmp_path, engine)
    for count, wrong in run_world(2, compare, engine, family, path):
        assert count > 8 and not wrong


# -- edits and gradients ---------------------------------------------------------------------------------------
def mix(x: Tensor) -> Tensor:
    """Over the batch and over all that is given of the heads."""
    return x * 2 + x.mean(0, keepdim=True) - x.flatten(2).mean(-1).view(*x.shape[:2], *[1] * (x.dim() - 2))


def edited_by_hand(family: str, component: str, heads: tuple[int, ...]) -> dict[str, Tensor]:
    """Logits, and gradients of the layer's input and of z, with a hand-written hook on the plain model."""
    model = make(family)
    stack = _STACK.get(family, "model.layers")
    where, side, *cut = _PARTS[family][component]
    found: dict[str, Tensor] = {}

    def change(x: Tensor) -> Tensor:
        width = x.shape[-1]
        at = torch.arange(width).unsqueeze(0) if not cut else cut[0](torch.arange(width).unsqueeze(0))
        channels = at.view(-1, 8)[list(heads)]  # (heads, d_head)
        part = x[..., channels]
        out = x.clone()
        out[..., channels] = mix(part if len(heads) > 1 else part[..., 0, :]).view(part.shape)
        return out

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda g: found.__setitem__(name, g.detach().clone())

    def first_input(m: nn.Module, args: Any) -> Any:
        x = args[0].view_as(args[0])
        x.register_hook(watch("resid_pre"))
        return (x, *args[1:])

    def z_input(m: nn.Module, args: Any) -> Any:
        x = args[0].view_as(args[0])
        x.register_hook(watch("z"))
        return (x,)

    model.get_submodule(f"{stack}.{LAYER}").register_forward_pre_hook(first_input)
    module = model.get_submodule(f"{stack}.{LAYER}.{where}")
    if side == "in":
        module.register_forward_pre_hook(lambda m, a: (change(a[0]),))
    else:
        module.register_forward_hook(lambda m, a, o: change(o))
    mixes = model.get_submodule(f"{stack}.{LAYER}.{_PARTS[family]['z'][0]}")
    mixes.register_forward_pre_hook(z_input)  # a gradient is that of the value which goes on
    out = model(**models.inputs(family))
    parity.square(out).backward()
    found["z"] = in_heads(found["z"])
    found["logits"] = out.logits.detach()
    return found


def edited(engine: str, family: str, component: str, heads: Any, run: str, path: Path) -> list[str]:
    placed = place(engine, make(family), path)
    fm = FlexModel(placed.model)
    mine = {k: placed.mine(v) for k, v in models.inputs(family).items()}
    layer, z, one = fm.at("resid_pre", LAYER), fm.at("z", LAYER), fm.at("z", LAYER, head=1)
    with fm.capture(layer, z, one, grad=True) as acts, fm.edit(fm.at(component, LAYER, head=heads), mix, run=run):
        out = fm(**mine)
        parity.square(out).backward()
    every = tuple(range(4 if component in "qz" else 2)) if heads is None else heads
    want = edited_by_hand(family, component, (every,) if isinstance(every, int) else every)
    got = {
        "logits": fm.full_output(out).logits.detach(),
        "resid_pre": acts.grad(layer),
        "z": acts.grad(z),
        "z, a head": acts.grad(one),
    }
    want["z, a head"] = want["z"][:, :, 1]
    return [f"{k}: {relative_error(got[k], want[k])}" for k in got if relative_error(got[k], want[k]) > 1e-5]


EDITS = [
    ("none", "llama", "z", 3, "every_rank"),
    ("none", "gpt2", "q", 2, "every_rank"),
    ("none", "gpt2", "v", (0, 3), "every_rank"),
    ("none", "gpt_neox", "k", 1, "every_rank"),
    ("none", "gpt_neox", "v", (1, 2), "every_rank"),
    ("none", "phi3", "k", 1, "every_rank"),
    ("tp", "llama", "z", 3, "every_rank"),
    ("tp", "llama", "z", 3, "one_rank"),
    ("tp", "llama", "z", (2, 1), "every_rank"),
    ("tp", "llama", "k", 1, "every_rank"),
    ("tp", "llama", "v", None, "one_rank"),
    ("tp", "gpt_neox", "q", (3, 0), "every_rank"),
    ("fsdp2", "llama", "z", 3, "every_rank"),
    ("fsdp2", "gpt2", "k", (0, 3), "one_rank"),
    ("ddp", "llama", "v", 1, "every_rank"),
    ("ddp", "gpt2", "q", 2, "every_rank"),
]


@pytest.mark.parametrize(("engine", "family", "component", "heads", "run"), EDITS)
def test_edits_of_heads(
    engine: str, family: str, component: str, heads: Any, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(family, tmp_path, engine)
    args = engine, family, component, heads, run, path
    for wrong in [edited(*args)] if engine == "none" else run_world(2, edited, *args):
        assert not wrong


def sharded(path: Path) -> tuple[float, list[str]]:
    """A point-wise edit of all heads on the ranks' own shards, and one that zeroes two of them."""
    placed = place("tp", make("llama"), path)
    fm = FlexModel(placed.model)
    inputs = models.inputs("llama")
    where = fm.at("z", LAYER)
    seen: list[str] = []

    def twice(x: Tensor) -> Tensor:
        seen.append(f"{tuple(x.shape)} {type(x).__name__}")
        return x * 2

    with torch.no_grad(), fm.edit(where, twice, run="sharded"):
        doubled = fm.full_output(fm(**inputs)).logits
    with torch.no_grad(), fm.edit(where, edits.scale(2.0)):
        wanted = fm.full_output(fm(**inputs)).logits
    with torch.no_grad(), fm.edit(where, edits.zero([0, 3], dim=-2), run="sharded"):
        without = fm.full_output(fm(**inputs)).logits
    with torch.no_grad(), fm.edit(fm.at("z", LAYER, head=[0, 3]), edits.zero()):
        same = fm.full_output(fm(**inputs)).logits
    with pytest.raises(RegistrationError, match="run='sharded'"), fm.edit(fm.at("z", 1, head=3), twice, run="sharded"):
        pass
    return max(relative_error(doubled, wanted), relative_error(without, same)), seen


def test_sharded_edits_of_all_heads(tmp_path: Path) -> None:
    for error, seen in run_world(2, sharded, saved("llama", tmp_path, "tp")):
        assert error < 1e-6
        assert seen == ["(4, 6, 4, 8) DTensor"]


def moved(path: Path) -> list[int]:
    """Bytes that this rank sends for z: all heads, one of its own, one of the other's; and what is kept where it is."""
    placed = place("tp", make("llama"), path)
    fm = FlexModel(placed.model)
    inputs = models.inputs("llama")
    sent = []
    for head in (None, 0, 3, (3, 0, 2)):
        where = fm.at("z", LAYER, head=head)
        for _ in range(2):  # layouts are found in the first
            with Wire() as wire, fm.capture(where, deliver="main") as acts, torch.no_grad():
                fm(**inputs)
        del acts
        sent.append(wire.sent)
    with fm.capture(fm.at("z", LAYER), deliver="local") as acts, torch.no_grad():
        fm(**inputs)
    assert acts["@z.1"].to_local().shape == (4, 6, 2, 8) and acts["@z.1"].shape == (4, 6, 4, 8)  # type: ignore[union-attr]
    return sent


def test_only_the_wanted_heads_move(tmp_path: Path) -> None:
    one = 4 * 6 * 8 * 4  # (B, S, d_head) in float32
    main, other = run_world(2, moved, saved("llama", tmp_path, "tp"))
    assert main == [0, 0, 0, 0]
    assert other == [2 * one, 0, one, 2 * one]


# -- what is refused -------------------------------------------------------------------------------------------
REFUSED = [
    ("llama", ("hook_z",), {}, "is no component"),
    ("llama", ("z", 7), {}, "there is no layer 7; the model has 2"),
    ("llama", ("z", -3), {}, "there is no layer -3"),
    ("llama", ("z", []), {}, "names no layer"),
    ("llama", ("z", True), {}, "there is no layer True"),
    ("llama", ("z", 0.5), {}, "there is no layer 0.5"),
    ("llama", ("z", "0"), {}, "there is no layer '0'"),
    ("llama", ("z", 0), {"head": 1.0}, "no head 1.0"),
    ("bart", ("z", 0), {}, "several stacks of layers, 'model.decoder.layers', 'model.encoder.layers'"),
    ("llama", ("embed", 0), {}, "is in no layer"),
    ("llama", ("pos_embed",), {}, "positions are rotary"),
    ("llama", ("k", 0), {"head": 3}, "it has 2 key-value heads, each for 2 of the 4 query heads"),
    ("llama", ("z", 0), {"head": 4}, "no head 4: it has 4 heads"),
    ("llama", ("z", 0), {"head": -1}, "no head -1"),
    ("llama", ("z", 0), {"head": []}, "no such choice"),
    ("llama", ("z", 0), {"head": [1, 1]}, "no such choice"),
    ("llama", ("resid_pre", 0), {"head": 1}, "has no heads"),
    ("llama", ("router", 0), {}, "has no 'router'"),
    ("phi", ("resid_mid", 0), {}, "both take the layer's input"),
    ("cohere", ("ln2", 0), {}, "has no 'ln2'"),
    ("olmo2", ("ln1", 0), {}, "has no 'ln1'"),
    ("mixtral", ("mlp_post", 0), {}, "mixture of experts; capture 'model.layers.0.mlp.experts.act_fn'"),
    ("bert", ("resid_post", 0), {}, "no residual stream"),
    ("bert", ("ln_final",), {}, "no module called norm"),
    ("bloom", ("q", 0), {}, "order of queries, keys and values .* is not known"),
    ("deepseek_v3", ("k", 0), {}, "no projection there"),
    ("phi3", ("mlp_pre", 0), {}, "has no 'mlp_pre'"),
    ("t5", ("z", 0), {}, "T5ForConditionalGeneration is not known well enough .* no list of modules"),
]


@pytest.mark.parametrize(("family", "args", "keywords", "message"), REFUSED)
def test_refused_by_name(family: str, args: Any, keywords: Any, message: str) -> None:
    fm = FlexModel(make(family))
    with pytest.raises(ComponentError, match=message):
        fm.at(*args, **keywords)


@pytest.mark.parametrize("family", ["bloom", "granite"])
def test_sums_that_do_not_hold(family: str) -> None:
    """BLOOM's attention adds the stream itself; Granite scales what it adds."""
    fm = FlexModel(make(family))
    where = fm.at("attn_out", 0)
    with fm.capture(where, fm.at("z", 0)) as acts, torch.no_grad():
        fm(**models.inputs(family))
    assert acts["@z.0"].shape == (4, 6, 4, 8)  # type: ignore[union-attr]
    with pytest.raises(ComponentError, match="attn_out is not resid_mid"):
        acts[where]
    with pytest.raises(ComponentError, match="has another structure"), torch.no_grad(), fm.edit(where, edits.zero()):
        fm(**models.inputs(family))


def test_attention_probabilities_need_eager() -> None:
    model = make("llama")
    model.set_attn_implementation("sdpa")
    fm = FlexModel(model)
    with pytest.raises(ComponentError, match="attn_implementation='eager'"):
        fm.at("pattern", 0)
    model.set_attn_implementation("eager")
    assert fm.at("pattern", 0).spots[0].unpack_idx == 1


def test_a_model_of_ones_own() -> None:
    with pytest.raises(ComponentError, match="Net is not known well enough"):
        FlexModel(models.net()).at("resid_post", 0)


def test_contradictions() -> None:
    fm = FlexModel(make("llama"))
    z, mid = fm.at("z", 0), fm.at("resid_mid", 0)
    for keywords in ({"hook_type": "full_backward_pre"}, {"unpack_idx": 1}):
        with pytest.raises(RegistrationError, match="@z"), fm.capture(z, **keywords):
            pass
        with pytest.raises(RegistrationError, match="@z"), fm.edit(z, edits.zero(), **keywords):
            pass
    with pytest.raises(RegistrationError, match="goes on past this module"), fm.edit(mid, edits.zero()):
        pass
    for keywords in ({"grad": True}, {"detach": False}):
        with pytest.raises(RegistrationError, match="no gradient of its own"), fm.capture(mid, **keywords):
            pass
    assert not fm._runtime.bounds


# -- how places are used ---------------------------------------------------------------------------------------
def test_places_go_where_patterns_go() -> None:
    model = make("llama")
    fm = FlexModel(model)
    inputs = models.inputs("llama")
    every, last = fm.at("resid_post"), fm.at("resid_post", -1)
    with fm.capture([every, "lm_head"], "model.layers.*.mlp", fm.at("q", range(2), head=[2, 0])) as acts:
        logits = fm(**inputs).logits
    assert list(acts)[:3] == ["@resid_post.0", "@resid_post.1", "lm_head"]
    assert acts.stack(every).shape == (2, 4, 6, 32)
    assert torch.equal(acts.stack("@resid_post.*"), acts.stack(every))
    assert torch.equal(acts[last], acts["@resid_post.1"])  # type: ignore[arg-type]
    assert acts["@q.0.2+0"].shape == (4, 6, 2, 8)  # type: ignore[union-attr]
    assert torch.equal(acts["lm_head"], logits.detach())  # type: ignore[arg-type]
    assert last in acts and fm.at("z", 0) not in acts
    numpy = torch.arange(2).numpy()
    assert fm.at("z", numpy, head=numpy[1]) == fm.at("z", [0, 1], head=1)
    with pytest.raises(ComponentError, match="stands for 2 values"):
        acts[every]


def selected(engine: str, path: Path) -> list[str]:
    """The last position of all heads, of one and of some: captured, edited, and its gradient."""
    placed = place(engine, make("llama"), path)
    fm = FlexModel(placed.model)
    mine = {k: placed.mine(v) for k, v in models.inputs("llama").items()}
    want = by_hand(make("llama"), "llama", models.inputs("llama"))["z"]
    last, bad = (slice(None), -1), []
    for head, chosen in ((None, want), (3, want[:, :, 3]), ((3, 0), want[:, :, [3, 0]])):
        where = fm.at("z", LAYER, head=head)
        with fm.capture(where, select=last, grad=True) as acts:
            parity.square(fm(**mine)).backward()
        with fm.capture(where, grad=True) as plain:
            parity.square(fm(**mine)).backward()
        pairs = {"value": (acts[where], chosen[:, -1]), "gradient": (acts.grad(where), plain.grad(where)[:, -1])}  # type: ignore[index]
        bad += [f"{head} {k}" for k, (got, wanted) in pairs.items() if relative_error(got, wanted) > 1e-5]  # type: ignore[arg-type]
        with fm.edit(where, edits.zero(), select=last), fm.capture(fm.at("attn_out", LAYER)) as now, torch.no_grad():
            fm(**mine)
        cut = want.clone()
        cut[:, -1, list(range(4)) if head is None else head] = 0
        model = make("llama").get_submodule(f"model.layers.{LAYER}.self_attn.o_proj")
        with torch.no_grad():
            wanted = model(cut.flatten(2))
        bad += [f"{head} edit"] * (relative_error(now[f"@attn_out.{LAYER}"], wanted) > 1e-5)  # type: ignore[arg-type]
    return bad


@pytest.mark.parametrize("engine", ["none", "tp", "fsdp2"])
def test_select_of_heads(engine: str, tmp_path: Path) -> None:
    path = saved("llama", tmp_path, engine)
    for bad in [selected(engine, path)] if engine == "none" else run_world(2, selected, engine, path):
        assert not bad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "mixtral"])
def test_sums_hold_in_half_precision(family: str, dtype: torch.dtype) -> None:
    fm = FlexModel(make(family).to(dtype))
    with fm.capture(fm.at("resid_post")) as acts, torch.no_grad():
        fm(**models.inputs(family))
    assert len(acts) == 2 and not acts.refused


@pytest.mark.parametrize("reentrant", [True, False])
def test_heads_under_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointed in (True, False):
        model: Any = make("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fm = FlexModel(model)
        where = fm.at("z", 1, head=2), fm.at("resid_post", 0)
        with fm.capture(*where, grad=True) as acts, fm.edit(fm.at("z", 0, head=1), edits.scale(3.0)):
            parity.square(fm(**models.inputs("llama"))).backward()
        assert not acts.refused and len(fm._runtime.sums_hold) == 1
        found.append([acts[where[0]], *map(acts.grad, where)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_select_of_a_place_without_heads() -> None:
    fm = FlexModel(make("llama"))
    where = fm.at("resid_post", 0)
    with fm.capture(where, select=(slice(None), -1)) as acts, torch.no_grad():
        fm(**models.inputs("llama"))
    assert acts[where].shape == (4, 32)  # type: ignore[union-attr]


def test_decoding_with_a_head_removed() -> None:
    model = make("llama")
    fm, ids = FlexModel(model), models.inputs("llama")["input_ids"]

    def without(m: nn.Module, args: Any) -> Any:
        x = args[0].clone()
        x[..., 24:32] = 0
        return (x,)

    options = dict(max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(without)  # type: ignore[union-attr]
    want = model.generate(ids, **options)  # type: ignore[operator]
    handle.remove()
    where = fm.at("z", 1, head=3)
    with fm.edit(where, edits.zero()), fm.capture(fm.at("pattern", 1, head=0)) as acts:
        assert torch.equal(fm.generate(ids, **options), want)
    assert [tuple(p.shape) for p in acts.calls("@pattern.1.0")] == [(4, 6, 6), (4, 1, 7), (4, 1, 8), (4, 1, 9)]


def test_a_graph_of_heads() -> None:
    fm = FlexModel(make("llama"))
    where = fm.at("z", 1, head=3)
    with fm.capture(where, detach=False) as acts:
        loss = parity.square(fm(**models.inputs("llama")))
        (gradient,) = torch.autograd.grad(loss, acts[where])
    with fm.capture(where, grad=True) as again:
        parity.square(fm(**models.inputs("llama"))).backward()
    assert gradient.shape == (4, 6, 8)
    assert relative_error(gradient, again.grad(where)) < 1e-6


def test_a_mixture_leaves_out_layers_without_a_router() -> None:
    fm = FlexModel(make("deepseek_v3"))
    assert fm.at("router").keys == ("@router.1",)
    assert fm.at("mlp_post").keys == ("@mlp_post.0",)


def test_hooks_leave_with_the_block() -> None:
    model = make("llama")
    fm = FlexModel(model)
    with fm.capture(fm.at("resid_post", 0)):
        pass  # nothing has run, so that nothing was seen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not fm._runtime.sums_hold


def on_stages(family: str, path: Path) -> list[str]:
    """Layer 1 is on the second stage; both ranks have all values."""
    plain, model = load(family, path)
    inputs = models.inputs(family)
    want = by_hand(plain, family, inputs)
    fm = FlexModel(model)
    found = places(fm, want)
    where = fm.at("z", LAYER, head=1)
    with torch.no_grad(), fm.capture(*found.values(), where) as acts:
        fm(**inputs)
    bad = [n for n in want if relative_error(acts[found[n]], want[n]) > 1e-5]  # type: ignore[arg-type]
    if relative_error(acts[where], want["z"][:, :, 1]) > 1e-5:  # type: ignore[arg-type]
        bad.append("a head")
    with torch.no_grad(), fm.edit(where, edits.zero()), fm.capture(fm.at("unembed")) as after:
        fm(**inputs)
    mixes = plain.get_submodule("model.layers.1.self_attn.o_proj")
    mixes.register_forward_pre_hook(lambda m, a: (torch.cat([a[0][..., :8], 0 * a[0][..., 8:16], a[0][..., 16:]], -1),))
    with torch.no_grad():
        logits = plain(**inputs).logits
    return bad + ["an edit"] * (relative_error(after["@unembed"], logits) > 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_components_of_other_stages(family: str, tmp_path: Path) -> None:
    for wrong in run_world(2, on_stages, family, saved(family, tmp_path, "tp")):
        assert not wrong


def test_components_on_four_ranks(tmp_path: Path) -> None:
    path = saved("llama", tmp_path, "tp")
    for count, wrong in run_world(4, compare, "tp_fsdp", "llama", path):
        assert count > 8 and not wrong
    for problems in run_world(4, edited, "tp_fsdp", "llama", "z", (3, 1), "every_rank", path):
        assert not problems


def test_edits_of_heads_in_check_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEX_MODEL_CHECK", "1")
    fm = FlexModel(make("llama"))
    with fm.edit(fm.at("v", 0, head=1), edits.scale(2.0)), torch.no_grad():
        fm(**models.inputs("llama"))
    half = fm.edit(fm.at("v", 0, head=1), lambda x: x[..., :4])
    with pytest.raises(FlexModelError, match="4, 6, 8"), torch.no_grad(), half:
        fm(**models.inputs("llama"))
