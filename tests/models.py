"""Small random models of many architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _configs() -> dict[str, Any]:
    import transformers as t

    common = dict(vocab_size=66, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    llama = dict(**common, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    moe = dict(**llama, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**llama)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**llama, sliding_window=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=66, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=2)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**moe)),
        "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**llama, num_experts=4, num_experts_per_tok=2)),
        "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **{**llama, "num_key_value_heads": 4, "head_dim": 8},
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                n_shared_experts=1,
                first_k_dense_replace=1,
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            )
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**llama, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**common, intermediate_size=48)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=66,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
    }


MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "mixtral", "qwen3_moe", "bert", "t5")


def make(family: str) -> nn.Module:
    """A tiny random model, the same on every rank; eager attention, no dropout."""
    torch.manual_seed(0)
    model = _configs()[family]()
    model.config._attn_implementation = "eager"
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    return model.eval()


def inputs(family: str, batch: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (batch, length), generator=generator)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        out["decoder_input_ids"] = torch.randint(1, 60, (batch, length - 1), generator=generator)
    return out


class MLP(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """Embedding, blocks, norm, head: the plain torch model that every torch engine can take."""

    def __init__(self, vocabulary: int = 32, width: int = 8, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def net(**sizes: int) -> Net:
    torch.manual_seed(0)
    return Net(**sizes)


def tokens(batch: int = 4, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(1))
