"""Copies of values as they are met: no later write can change them, and from a GPU they leave beside the model.

A value on a GPU that is wanted on the host is cloned where it is, at the speed of that memory, and the clone goes to
pinned memory on a stream of its own, while the model runs on; a small one goes at once, which is sooner done. Nothing
waits for it before somebody is given the value. A shard whose full tensor will be here is copied to its place in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import place_of
from flex_model.routing.memory import LARGE, Memory

__all__ = ["Copies"]

_SMALL = 2**18  # bytes that have left sooner than another stream is told of them
_ROOM = 2 * 2**30  # bytes of clones on a GPU that may be on their way at a time


class Copies:
    """The copies that one model's hooks make, and their ends."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: dict[torch.device, int] = {}  # bytes of clones since the model last waited for them
        self._used: set[torch.cuda.Stream] = set()  # since ``wait``

    def take(self, tensor: Tensor, device: torch.device | None, *, owned: bool = False) -> Tensor:
        """A copy of ``tensor`` on ``device``, or where it is; on the host it can be read after ``wait``.

        ``owned``: nobody else has this memory, so that it need not be copied where it stays.
        """
        if tensor.is_inference():  # a copy made outside of inference mode is an ordinary tensor
            with torch.inference_mode(False):
                return self._take(tensor.clone(), device, owned=True)
        return self._take(tensor.detach(), device, owned=owned)

    def _take(self, tensor: Tensor, device: torch.device | None, *, owned: bool) -> Tensor:
        if device is None or tensor.device == device or tensor.device.type == device.type != "cuda":
            return tensor if owned else self._clone(tensor)
        if not tensor.is_cuda or device.type != "cpu" or tensor.numel() == 0:
            return tensor.to(device, copy=True)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        now = torch.cuda.current_stream(tensor.device)
        if tensor.nbytes <= _SMALL:
            self._used.add(now)
            return out.copy_(tensor, non_blocking=True)
        kept = tensor.contiguous() if owned else tensor.clone(memory_format=torch.contiguous_format)
        beside = self._beside(tensor.device)
        beside.wait_stream(now)
        self._used.add(beside)
        with torch.cuda.stream(beside):
            out.copy_(kept, non_blocking=True)
        kept.record_stream(beside)  # its memory is free once the copy is made
        size = self._leaving.get(tensor.device, 0) + kept.nbytes
        if size > _ROOM:  # the model has to wait, on the device alone
            now.wait_stream(beside)
            size = 0
        self._leaving[tensor.device] = size
        return out

    def _clone(self, tensor: Tensor) -> Tensor:
        if tensor.numel() * tensor.itemsize < LARGE or torch.compiler.is_compiling() or not _is_ordinary(tensor):
            return tensor.clone()  # the compiler cannot follow memory that comes back by itself
        return self._memory.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def take_to_place(self, tensor: Tensor, layout: Layout, mesh: ModelMesh) -> tuple[Tensor, Tensor] | None:
        """A copy of this rank's shard, and the full tensor that it is a view of; None where the full tensor's size is
        not known yet, or it would lie on an accelerator before anybody needs it there."""
        if not layout.moving_axes or any(layout.ragged) or not layout.has_places:
            return None
        if torch.compiler.is_compiling() or not _is_ordinary(tensor):
            return None
        shape = list(tensor.shape)
        for axis, placement in enumerate(layout.placements):
            if (dim := shard_dim(placement)) is not None:
                shape[dim] *= mesh.axes[axis].size
        full = self._memory.empty(shape, tensor.dtype)
        place = place_of(full, layout, mesh, mesh.me)
        place.copy_(tensor.detach())
        return place, full

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def bring(self, tensor: Tensor, device: torch.device | None) -> Tensor:
        """``tensor`` itself if it is on ``device``, else a copy that is; on the host it can be read after ``wait``."""
        return tensor if device is None or tensor.device == device else self.take(tensor, device)

    def fence(self) -> Callable[[], None]:
        """Of the copies taken so far: what waits until they are made, while the model goes on."""
        events = []
        for stream in self._used:
            event = torch.cuda.Event()
            event.record(stream)
            events.append(event)
        self._used.clear()

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def wait(self) -> None:
        """Until all copies are made."""
        for stream in self._used:
            stream.synchronize()
        self._used.clear()
        self._leaving.clear()


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether it is numbers one beside the other in memory of the host."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and tensor.device.type == "cpu"
