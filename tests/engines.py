"""How each engine is put on the plain test model, and the part of the batch that a rank gets under it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from models import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

warnings.filterwarnings("ignore", message=".*FSDP.*")

TWO_RANKS = (
    "ddp",
    "fsdp1",
    "fsdp1_orig",
    "fsdp2",
    "tp",
    "tp_local_head",
    "tp_dtensors",
    "loss_parallel",
    "sp",
)
FOUR_RANKS = ("hsdp", "2d_tp", "2d_sp", "ddp_tp")
FAIRSCALE_TWO_RANKS = ("fairscale", "fairscale_gathered", "fairscale_local_head")
FAIRSCALE_FOUR_RANKS = ("fairscale_ddp", "fairscale_gathered_ddp")
ALL = (*TWO_RANKS, *FOUR_RANKS, *FAIRSCALE_TWO_RANKS, *FAIRSCALE_FOUR_RANKS)
device = "cpu"  # of the models, the meshes and the batches; ``gpus`` sets another


def plan(style: str) -> dict[str, Any]:
    embedding = {"emb": RowwiseParallel(input_layouts=Replicate())}
    mlp = {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
    whole_head = {"head": ColwiseParallel(output_layouts=Replicate())}
    plans: dict[str, dict[str, Any]] = {
        "tp": {**embedding, **mlp, **whole_head},
        "tp_local_head": {**embedding, **mlp, "head": ColwiseParallel()},
        "tp_dtensors": {
            **embedding,
            "layers.*.mlp.up": ColwiseParallel(use_local_output=False),
            "layers.*.mlp.down": RowwiseParallel(),
            **whole_head,
        },
        "loss_parallel": {**embedding, **mlp, "head": ColwiseParallel(use_local_output=False)},
        "sp": {
            "emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "layers.*.norm": SequenceParallel(),
            "layers.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "layers.*.mlp.up": ColwiseParallel(),
            "layers.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    }
    return plans[style]


@dataclass
class Placed:
    """A model under an engine; this rank has part ``index`` of ``parts`` of the batch."""

    model: nn.Module
    parts: int = 1
    index: int = 0

    def mine(self, full: Tensor) -> Tensor:
        return full.chunk(self.parts)[self.index]


def place(engine: str, model: nn.Module) -> Placed:
    world, rank = dist.get_world_size(), dist.get_rank()
    if engine.startswith("fairscale"):
        return _of_fairscale(engine, model)
    if engine == "ddp":
        return Placed(nn.parallel.DistributedDataParallel(model), world, rank)
    if engine == "fsdp1":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device(device), use_orig_params=False)
        return Placed(wrapped, world, rank)
    if engine == "fsdp1_orig":
        policy = ModuleWrapPolicy({Block})
        wrapped = FullyShardedDataParallel(
            model, device_id=torch.device(device), use_orig_params=True, auto_wrap_policy=policy
        )
        return Placed(wrapped, world, rank)
    if engine in ("fsdp2", "hsdp"):
        shape, names = ((world,), ("fsdp",)) if engine == "fsdp2" else ((world // 2, 2), ("dp_replicate", "fsdp"))
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        return Placed(_fully_sharded(model, mesh), world, rank)
    if engine == "hsdp_tp":
        mesh = init_device_mesh(device, (world // 4, 2, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        parallelize_module(model, mesh["tp"], plan("tp"))
        return Placed(_fully_sharded(model, mesh["dp_replicate", "fsdp"]), world // 2, rank // 2)
    if engine.startswith("2d_") or engine == "ddp_tp":
        mesh = init_device_mesh(device, (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan(engine.removeprefix("2d_").removeprefix("ddp_")))
        index = mesh["dp"].get_local_rank()
        if engine == "ddp_tp":
            wrapped = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["dp"])
            return Placed(wrapped, world // 2, index)
        return Placed(_fully_sharded(model, mesh["dp"]), world // 2, index)
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, plan(engine))
    return Placed(model)


def _of_fairscale(engine: str, model: nn.Module) -> Placed:
    import fairscale_models

    fairscale_models.start()
    groups = fairscale_models.fs_init
    model = fairscale_models.exchanged(model, engine.removesuffix("_ddp"))
    if engine.endswith("_ddp"):
        model = fairscale_models.with_ddp(model)
    return Placed(model, groups.get_data_parallel_world_size(), groups.get_data_parallel_rank())


def _fully_sharded(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in dict.fromkeys(model.layers):  # type: ignore[union-attr,arg-type]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_loss(engine: str, output: Tensor) -> Tensor:
    """Mean square of this rank's logits, all of them where the head leaves them sharded."""
    if engine == "fairscale_local_head":
        from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region

        output = gather_from_model_parallel_region(output)
    if engine == "tp_local_head":
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        output = DTensor.from_local(output, mesh, [Shard(-1)], run_check=False)
    return whole(output).float().pow(2).mean()


def loss(output: Tensor) -> Tensor:
    return output.float().pow(2).mean()


def fully_sharded_hf(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
