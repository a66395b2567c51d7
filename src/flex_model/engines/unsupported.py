"""Ways of running a model that hooks cannot follow: each is refused by name, with what to use instead."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flex_model.errors import EngineError

__all__ = ["refuse_transform", "refuse_unsupported"]


def refuse_unsupported(model: nn.Module) -> None:
    """Raises EngineError if something in ``model`` runs its modules where hooks cannot be."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise EngineError(
                f"{name or 'the model'} is an nn.DataParallel, which runs copies of the model in threads, each on a "
                f"part of the batch, and forgets the copies. Wrap its .module, and use DistributedDataParallel for "
                f"several GPUs, or a device_map for one model over several devices.",
                page="data-parallel",
            )


def refuse_transform(hooks: Sequence[str]) -> None:
    """Raises EngineError inside a function transform of torch.func if there are hooks that it would leave empty-handed:
    values there are traced, belong to one sample or carry tangents, and must not outlive the transform."""
    if hooks:
        raise EngineError(
            f"{hooks[0]}: the model runs inside a transform of torch.func (vmap, grad, jvp), whose values cannot be "
            f"captured or exchanged between ranks. Edits on one process work there; capture outside of the transform.",
            page="function-transform",
        )
