"""A model under context parallelism whose attention is written by hand: keys and values are gathered over ``cp``, and
the causal mask goes by positions, so that it runs wherever collectives do."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model.layout.layout import my_part
from flex_model.layout.sequence import Order

BATCH, LENGTH = 4, 8
# their names from torch 2.13 on, and before
gathered = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
gathered_autograd = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.group: dist.ProcessGroup | None = None  # None: the whole sequence is here

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        keys, values, theirs = self.k(x), self.v(x), positions
        if self.group is not None:
            keys = gathered_autograd(keys.contiguous(), 1, self.group)
            values = gathered_autograd(values.contiguous(), 1, self.group)
            theirs = gathered(positions.contiguous(), 1, self.group)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), keys, values))
        seen = positions[:, None, :, None] >= theirs[:, None, None, :]
        weights = (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf")).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width), models.MLP(width, 16)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), positions)
        return x + self.mlp(self.norm2(x))


class Causal(nn.Module):
    """``name`` of the second argument aside, a small decoder."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.emb, self.table = nn.Embedding(32, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 32, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.emb(ids) + self.table(positions)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x)


class Unnamed(Causal):
    """The same, with positions under a name that does not say what they are."""

    def forward(self, ids: Tensor, where: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, where)


def plain(kind: type[Causal] = Causal) -> Causal:
    torch.manual_seed(0)
    return kind()


def full_inputs() -> tuple[Tensor, Tensor]:
    return models.tokens(BATCH, LENGTH), torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()


@dataclass
class Placed:
    model: nn.Module
    mesh: DeviceMesh
    order: Order

    def mine(self, full: Tensor) -> Tensor:
        """This rank's rows and tokens."""
        names = self.mesh.mesh_dim_names or ()
        if "dp" in names:
            full = full.chunk(self.mesh["dp"].size())[self.mesh["dp"].get_local_rank()]
        cp = self.mesh["cp"]
        part = full.shape[1] // cp.size()
        return my_part(full, self.order(1), [part] * cp.size(), cp.get_local_rank()).contiguous()


def place(names: tuple[str, ...], order: Order, model: nn.Module | None = None, *, wrapped: bool = True) -> Placed:
    """Two ranks an axis; DDP over all axes but ``tp``."""
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
    model = copy.deepcopy(plain() if model is None else model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.group = mesh["cp"].get_group()
    if "tp" in names:
        mlp = {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
        head = {"head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, mesh["tp"], {**mlp, **head})
        if wrapped:
            model = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["cp"])
    elif wrapped:
        model = nn.parallel.DistributedDataParallel(model)
    return Placed(model, mesh, order)


class Sdpa(nn.Module):
    """Attention by torch's own function, which ``context_parallel`` replaces."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.causal = heads, False
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


def with_sdpa(*, causal: bool) -> Unnamed:
    """A model that torch's context parallelism can run; its positions are told by no name."""
    torch.manual_seed(0)
    model = Unnamed()
    for layer in model.layers:
        layer.attention = Sdpa(8)
        layer.attention.causal = causal
    return model
