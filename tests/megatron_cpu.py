"""Megatron-core on CPU and gloo: the patches that 0.16.1 needs, models with the same weights sharded and whole.

Megatron keeps its groups in module globals. ``Spread`` holds two sets of them, for the sharded model and for the same
model on one rank, so that the oracle runs in the same process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Spread", "config", "gpt", "load_part", "part_of", "patch"]


class _ToCPU(TorchFunctionMode):
    """Tensors that Megatron asks for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _SequenceParallelNorm:
    """torch's norms with the mark that Megatron's own ones put on their parameters; its wrapper of them refuses."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm: Any = (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class _NoStream:
    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _NoStream:
        return self


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes of what is exchanged; Megatron's own leaves those that are on the CPU already as tensors."""
    return tensor.numpy() if isinstance(tensor, Tensor) and as_numpy else tensor


def patch() -> None:
    """Once a process."""
    import megatron.core.fusions.fused_softmax as softmax
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    import megatron.core.transformer.torch_norm as torch_norm

    if torch_norm.WrappedTorchNorm.__new__ is _SequenceParallelNorm.__new__:
        return
    torch_norm.WrappedTorchNorm.__new__ = _SequenceParallelNorm.__new__  # type: ignore[method-assign]
    random.CudaRNGStatesTracker.fork = lambda self, *a, **k: contextlib.nullcontext()  # type: ignore[assignment]
    moe_utils.te_general_gemm = None  # it is asked for where there is no transformer_engine  # type: ignore[attr-defined]
    dispatcher.maybe_move_tensor_to_cpu = _on_cpu  # type: ignore[assignment]
    softmax.get_default_causal_mask = lambda n: torch.ones(n, n).triu(1).bool()  # type: ignore[assignment]
    random._get_cuda_rng_state = lambda *a, **k: torch.zeros(0)  # type: ignore[assignment]
    random._set_cuda_rng_state = lambda *a, **k: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.Stream = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *a: _NoStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda *a: contextlib.nullcontext()  # type: ignore[assignment]
    _ToCPU().__enter__()


class Spread:
    """parallel_state for a model over ``tp`` ranks (and what is left as data ranks), and for one on each rank alone."""

    def __init__(self, *, tp: int = 1, **sizes: Any) -> None:
        patch()
        from megatron.core import parallel_state

        self._module = parallel_state
        alone = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, **sizes)
        self._spread = dict(vars(parallel_state))
        self._alone = {k: alone if isinstance(v, dist.ProcessGroup) else v for k, v in self._spread.items()}
        self.tp = tp
        self.data = parallel_state.get_data_parallel_world_size()
        self.data_rank = parallel_state.get_data_parallel_rank()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Megatron as on one process."""
        vars(self._module).update(self._alone)
        try:
            yield
        finally:
            vars(self._module).update(self._spread)

    def mine(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.data)[self.data_rank]


def config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )
    return TransformerConfig(**{**values, **changes})


def gpt(cfg: Any, *, spec: Any = None, **changes: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    values: dict[str, Any] = dict(
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    spec = spec or get_gpt_layer_local_spec(
        num_experts=cfg.num_moe_experts,
        moe_grouped_gemm=cfg.moe_grouped_gemm,
        qk_layernorm=cfg.qk_layernorm,
        normalization=cfg.normalization,
        multi_latent_attention=cfg.multi_latent_attention,
    )
    return GPTModel(config=cfg, transformer_layer_spec=spec, **{**values, **changes})


def part_of(full: Tensor, parameter: Tensor, rank: int, ranks: int) -> Tensor:
    """What a rank holds of a full parameter, by the marks Megatron puts on it."""
    if full.shape == parameter.shape:
        return full
    if not hasattr(parameter, "partition_dim"):  # an offset for each head, without a mark
        return full.chunk(ranks)[rank]
    dim, blocks = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    return torch.cat([block.chunk(ranks, dim)[rank] for block in full.chunk(blocks, dim)], dim)


@torch.no_grad()
def load_part(sharded: nn.Module, plain: nn.Module, ranks: int) -> None:
    """The plain model's weights in a model that is sharded over ``ranks`` tensor ranks."""
    rank = dist.get_rank() % ranks
    whole = dict(plain.named_parameters())
    for name, parameter in sharded.named_parameters():
        parameter.copy_(part_of(whole[name].detach(), parameter, rank, ranks))
