"""Megatron-core's mixtures of experts: the token and the expert of every row inside, from what its dispatchers keep.

Megatron's tokens lie ``[s, b]``; they are counted as everywhere, ``b * S + s`` through the batch, so that a token has
one number on one process and on many. Under expert parallelism ``local_experts.0`` is another expert on every rank:
the value by that name holds the rows of all of them, and their experts tell which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flex_model.engines.megatron_layers import is_a
from flex_model.routing.rows import Gathered, Origin

__all__ = ["Line", "MegatronRows", "row_sources"]

Line = tuple[int, ...]
_DISPATCHERS = ("MoEAllGatherTokenDispatcher", "MoEAlltoAllTokenDispatcher")
# Rows that are nobody's token, or an order that kernels choose.
_FILLINGS = ("fp8", "fp4", "moe_permute_fusion", "moe_pad_expert_input_to_capacity")
_PADDINGS = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")


def row_sources(model: nn.Module, tensor: Line) -> list[MegatronRows]:
    """The mixtures whose rows can be told; ``tensor`` are the ranks along the model's tensor axis."""
    layers: list[Any] = [m for m in model.modules() if is_a(m, "MoELayer")]
    return [MegatronRows(layer, tensor) for layer in layers if _is_known(layer, tensor)]


def _is_known(layer: Any, tensor: Line) -> bool:
    """Whether each rank's experts are whole, and every token is at each of its experts once."""
    dispatcher, config = layer.token_dispatcher, layer.config
    if type(dispatcher).__name__ not in _DISPATCHERS or not is_a(layer.experts, "SequentialMLP"):
        return False
    if any(getattr(config, name, None) for name in (*_FILLINGS, *_PADDINGS)):
        return False
    return dispatcher.tp_size == 1 and (len(tensor) == 1 or config.sequence_parallel)


class _Handle:
    def __init__(self, hook: Any) -> None:
        self.remove = hook.remove


class MegatronRows:
    """One ``MoELayer``, watched: its dispatcher keeps the routing of the batch that its experts run on."""

    def __init__(self, layer: Any, tensor: Line) -> None:
        self.layer = layer
        self._dispatcher = layer.token_dispatcher
        self._inside = {id(m) for m in layer.experts.modules()}
        self._tensor = tensor
        self._peers: Line = ()
        if self._dispatcher.ep_size > 1:
            self._peers = tuple(dist.get_process_group_ranks(self._dispatcher.tp_ep_group))
        # Under sequence parallelism every tensor rank's experts run on its own part of the sequence.
        self.spread = tuple(sorted({*self._peers, *(tensor if len(tensor) > 1 else ())}))
        self._serial = 0
        self._entered = False
        self._all: Gathered | None = None
        self._now: Gathered | None = None

    def holds(self, module: nn.Module) -> bool:
        return id(module) in self._inside

    def rows(self, value: Tensor) -> Gathered | None:
        now = self._now
        if now is None or value.dim() == 0 or value.shape[0] != now.total:
            return None
        if value.dim() == 1 and (not value.is_floating_point() or self.layer.config.add_bias_linear):
            return None  # a count for each expert, or a bias; else the weights of the rows
        return now

    def watch(self) -> Sequence[_Handle]:
        """Look on before all other hooks."""
        layer, experts = self.layer, self.layer.experts
        hooks = [
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave, always_call=True),
            experts.register_forward_pre_hook(self._begin, prepend=True),
            experts.register_forward_hook(self._end, prepend=True),
        ]
        for i, expert in enumerate(experts.local_experts):
            hooks.append(expert.register_forward_pre_hook(lambda *_, i=i: self._turn_to(i), prepend=True))
        return [_Handle(hook) for hook in hooks]

    # -- what runs -----------------------------------------------------------------------------------------------
    def _enter(self, *_: Any) -> None:
        self._entered = True

    def _leave(self, *_: Any) -> None:
        self._entered = False
        self._all = self._now = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._all = self._now = None
        recomputed = torch._C._current_graph_task_id() != -1  # a checkpoint inside the layer runs its code, not itself
        if self._entered or recomputed:
            found = self._read()
            if args and found.total == len(args[0]):
                self._all = self._now = found

    def _end(self, *_: Any) -> None:
        self._now = self._all

    def _turn_to(self, number: int) -> None:
        if self._all is None:
            self._now = None
            return
        expert = self.layer.local_expert_indices[number]
        of = self._all.experts == expert
        tokens = self._all.tokens[of]
        self._now = Gathered(self._all.origin, number, len(tokens), tokens, self._all.experts[of])

    # -- what the dispatcher keeps -------------------------------------------------------------------------------
    def _read(self) -> Gathered:
        self._serial += 1
        if type(self._dispatcher).__name__ == _DISPATCHERS[0]:
            return self._gathered()
        return self._exchanged()

    def _tokens(self) -> tuple[Tensor, int]:
        """The number of each of this rank's tokens ``[s, b]``, flattened, in its batch; and how many that has."""
        length, batch = self._dispatcher.hidden_shape[:2]
        whole = length * len(self._tensor)
        first = length * self._tensor.index(dist.get_rank()) if len(self._tensor) > 1 else 0
        at = torch.arange(first, first + length)
        return (torch.arange(batch) * whole + at.unsqueeze(1)).flatten(), whole * batch

    def _gathered(self) -> Gathered:
        """All ranks' tokens were sent to all; each takes those at its own experts, expert by expert."""
        own, count = self._tokens()
        expert, index = self._dispatcher.local_map.cpu().T.nonzero(as_tuple=True)
        expert = expert + self.layer.local_expert_indices[0]
        if not self._peers:
            return Gathered(Origin(self._serial, count), 0, len(index), own[index], expert)
        ranks = len(self._peers)
        origin = Origin(self._serial, count, own.repeat(ranks), (len(own),) * ranks, self._peers)
        return Gathered(origin, 0, len(index), index, expert)

    def _exchanged(self) -> Gathered:
        """Rows were sent to the ranks of their experts, expert by expert, and sorted again where they came."""
        own, count = self._tokens()
        expert, index = self._dispatcher.routing_map.cpu().T.nonzero(as_tuple=True)
        if not self._peers:
            return Gathered(Origin(self._serial, count), 0, len(index), own[index], expert)
        here = self.layer.local_expert_indices
        sizes = torch.bincount(expert // len(here), minlength=len(self._peers)).tolist()
        origin = Origin(self._serial, count, own[index], tuple(sizes), self._peers)
        if len(here) == 1:
            total = int(sum(self._dispatcher.output_splits))
            return Gathered(origin, 0, total, torch.arange(total), torch.full((total,), here[0]))
        counts = self._dispatcher.num_global_tokens_per_local_expert  # by sender and expert, as they arrive
        counts = torch.as_tensor(counts).cpu().flatten()
        arrived = torch.tensor(here).repeat(len(self._peers)).repeat_interleave(counts)
        order = arrived.argsort(stable=True)
        return Gathered(origin, 0, len(order), order, arrived[order])
