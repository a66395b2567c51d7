"""One rank of a world that is not there: torch's ``fake`` process group answers every collective at once.

Shapes, counts and bytes are those of a real world; values are not. What a collective would bring from others is this
rank's own.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

AXES = ("dp_replicate", "fsdp", "cp", "ep", "tp")


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Layer(nn.Module):
    """A linear layer that multiplies with its own shard, without DTensor's dispatch around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return nn.functional.linear(x, weight.to_local() if isinstance(weight, DTensor) else weight)


class Deep(nn.Module):
    """A table without batch and sequence, an embedding, and ``layers`` layers by turns colwise and rowwise.

    The sum over ranks after a rowwise layer is left out: in a world that is not there it would add nothing.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(16, width)
        self.table = Layer(width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.emb(ids)
        self.table(torch.linspace(0, 1, 5 * x.shape[-1]).view(5, -1))
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + down(up(x))
        return x


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] = AXES) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def spread(model: Deep, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel over the last axis; batches on the first two, the sequence on ``cp``, replicas on ``ep``."""
    for i, layer in enumerate([*model.layers, model.table]):
        whole = layer.weight.detach()
        layer.weight = nn.Parameter(distribute_tensor(whole, mesh[AXES[-1]], [Shard(i % 2)], src_data_rank=None))
    return model


def inputs(mesh: DeviceMesh, batch: int = 2, length: int = 3) -> tuple[Tensor, Tensor]:
    """This rank's tokens and their positions: contiguous pieces over ``cp``."""
    here = mesh["cp"].get_local_rank() * length
    return torch.randint(0, 16, (batch, length)), torch.arange(here, here + length).expand(batch, length)


@dataclass
class Moved:
    """Collectives that this rank took part in, and the bytes of the buffers it gave to them."""

    count: int = 0
    bytes: int = 0


class CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = Moved()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.moved.count += 1
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved.bytes += sum(prod(t.shape) * t.dtype.itemsize for t in tensors)
        return func(*args, **(kwargs or {}))


class CountKernels(TorchDispatchMode):
    """How often each operator is asked of torch on meta tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and all(t.is_meta for t in tensors):
            self.asked[func] = self.asked.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def python_memory() -> Iterator[list[int]]:
    """The most that Python objects made in the block took together."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
