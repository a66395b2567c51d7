"""Models of fairscale's layers: the test net with its layers exchanged, and a small LLaMA as such code is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import fairscale.nn.model_parallel.initialize as fs_init
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from flex_model import DummyModule

CUTS = {  # dim of each parameter that a rank has a part of
    ColumnParallelLinear: {"weight": 0, "bias": 0},
    RowParallelLinear: {"weight": 1},
    ParallelEmbedding: {"weight": 1},
    VocabParallelEmbedding: {"weight": 0},
}


def start(tp: int = 2) -> None:
    """fairscale's groups, once a world."""
    if not fs_init.model_parallel_is_initialized():
        with redirect_stdout(None):
            fs_init.initialize_model_parallel(tp)


def part(full: Tensor, dim: int) -> Tensor:
    return full.chunk(fs_init.get_model_parallel_world_size(), dim)[fs_init.get_model_parallel_rank()]


@torch.no_grad()
def fill(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``model``'s parameters are this rank's parts of the plain one's, and know along which dim they were cut."""
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                full = plain.get_submodule(name).get_parameter(attribute)
                dim = CUTS.get(type(module), {}).get(attribute)
                parameter.copy_(full if dim is None else part(full, dim))
                parameter.cut = None if dim is None else (dim, fs_init.get_model_parallel_group())
    return model


# -- the test net ------------------------------------------------------------------------------------------------
Make = Callable[[nn.Linear], nn.Module]


def column(gather: bool) -> Make:
    return lambda x: ColumnParallelLinear(x.in_features, x.out_features, x.bias is not None, gather_output=gather)


def row(parallel: bool) -> Make:
    return lambda x: RowParallelLinear(x.in_features, x.out_features, x.bias is not None, input_is_parallel=parallel)


KINDS: dict[str, dict[str, Any]] = {
    "fairscale": {"emb": VocabParallelEmbedding, "up": column(False), "down": row(True), "head": column(True)},
    "fairscale_gathered": {"emb": ParallelEmbedding, "up": column(True), "down": row(False), "head": column(True)},
    "fairscale_local_head": {
        "emb": VocabParallelEmbedding,
        "up": column(False),
        "down": row(True),
        "head": column(False),
    },
}


def exchanged(plain: nn.Module, kind: str) -> nn.Module:
    """The plain net with fairscale's layers in the places of torch's."""
    model = copy.deepcopy(plain)
    for name, module in list(model.named_modules()):
        make = KINDS[kind].get(name.rpartition(".")[2])
        if make is not None:
            new = make(module) if isinstance(module, nn.Linear) else make(module.num_embeddings, module.embedding_dim)
            model.set_submodule(name, new)
    return fill(model, plain)


# -- a LLaMA -----------------------------------------------------------------------------------------------------
class Sizes(NamedTuple):
    dim: int = 16
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 24
    vocabulary: int = 32
    layers: int = 2
    length: int = 16
    batch: int = 16
    cached: bool = False


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def angles(head: int, length: int) -> Tensor:
    """Rotations by position as complex numbers, (length, head / 2)."""
    speeds = 10000.0 ** (-torch.arange(0, head, 2).float() / head)
    return torch.polar(torch.ones(length, head // 2), torch.outer(torch.arange(length).float(), speeds))


def rotated(x: Tensor, by: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * by[None, :, None, :]).flatten(3).type_as(x)


class Attention(nn.Module):
    """Each rank has some of the heads, and counts only those."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        ranks = fs_init.get_model_parallel_world_size()
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        self.n_local_heads = sizes.heads // ranks
        self.n_local_kv_heads = self.kv_heads // ranks
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = sizes.dim // sizes.heads
        out, kv = sizes.heads * self.head_dim, self.kv_heads * self.head_dim
        self.wq = ColumnParallelLinear(sizes.dim, out, bias=False, gather_output=False)
        self.wk = ColumnParallelLinear(sizes.dim, kv, bias=False, gather_output=False)
        self.wv = ColumnParallelLinear(sizes.dim, kv, bias=False, gather_output=False)
        self.wo = RowParallelLinear(out, sizes.dim, bias=False, input_is_parallel=True)
        self.scores = DummyModule()
        self.cached = sizes.cached
        if sizes.cached:
            shape = (sizes.batch, sizes.length, self.n_local_kv_heads, self.head_dim)
            self.cache_k = torch.zeros(shape)
            self.cache_v = torch.zeros((sizes.batch, sizes.length, self.n_local_kv_heads, self.head_dim)).float()

    def forward(self, x: Tensor, start: int, turn: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q = rotated(self.wq(x).view(b, s, self.n_local_heads, self.head_dim), turn)
        k = rotated(self.wk(x).view(b, s, self.n_local_kv_heads, self.head_dim), turn)
        v = self.wv(x).view(b, s, self.n_local_kv_heads, self.head_dim)
        if self.cached:
            self.cache_k, self.cache_v = self.cache_k.to(q), self.cache_v.to(q)
            self.cache_k[:b, start : start + s] = k
            self.cache_v[:b, start : start + s] = v
            k, v = self.cache_k[:b, : start + s], self.cache_v[:b, : start + s]
        k, v = (t.repeat_interleave(self.n_rep, dim=2).transpose(1, 2) for t in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) / self.head_dim**0.5
        scores = self.scores((scores if mask is None else scores + mask).softmax(-1))  # (B, heads / tp, S, S)
        return self.wo((scores @ v).transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden, bias=False, gather_output=False)
        self.w2 = RowParallelLinear(hidden, dim, bias=False, input_is_parallel=True)
        self.w3 = ColumnParallelLinear(dim, hidden, bias=False, gather_output=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.feed_forward = FeedForward(sizes.dim, sizes.hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(sizes.dim), RMSNorm(sizes.dim)

    def forward(self, x: Tensor, start: int, turn: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), start, turn, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = ParallelEmbedding(sizes.vocabulary, sizes.dim)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.dim)
        self.output = ColumnParallelLinear(sizes.dim, sizes.vocabulary, bias=False)
        self.turns = angles(sizes.dim // sizes.heads, sizes.length)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        s = tokens.shape[1]
        x, turn, mask = self.tok_embeddings(tokens), self.turns[start : start + s], None
        if s > 1:
            mask = torch.full((s, s), float("-inf"), device=tokens.device).triu(1).type_as(x)
        for layer in self.layers:
            x = layer(x, start, turn, mask)
        return self.output(self.norm(x))


def unsharded(model: nn.Module) -> nn.Module:
    """The same architecture of torch's own layers, with new weights that are the same on every rank."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            plain.set_submodule(name, nn.Linear(module.in_features, module.out_features, module.bias is not None))
        elif isinstance(module, (ParallelEmbedding, VocabParallelEmbedding)):
            plain.set_submodule(name, nn.Embedding(module.num_embeddings, module.embedding_dim))
        elif isinstance(module, Attention):
            module.n_local_heads, module.n_local_kv_heads = module.heads, module.kv_heads
            for cache in ("cache_k", "cache_v") if module.cached else ():
                shape = list(getattr(module, cache).shape)
                setattr(module, cache, torch.zeros(*shape[:2], module.kv_heads, module.head_dim))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return plain


def llama(**sizes: Any) -> tuple[nn.Module, nn.Module]:
    """(of fairscale's layers, plain)."""
    start()
    model = Transformer(Sizes(**sizes))
    plain = unsharded(model)
    return fill(model, plain), plain


def with_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=fs_init.get_data_parallel_group())


def reduce_gradients(model: nn.Module) -> None:
    """What a training loop of fairscale's without DDP does itself."""
    for parameter in model.parameters():
        if parameter.grad is not None and fs_init.get_data_parallel_world_size() > 1:
            dist.all_reduce(parameter.grad, group=fs_init.get_data_parallel_group())
            parameter.grad /= fs_init.get_data_parallel_world_size()


def batch_part(full: Tensor) -> Tensor:
    return full.chunk(fs_init.get_data_parallel_world_size())[fs_init.get_data_parallel_rank()]
