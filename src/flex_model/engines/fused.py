"""Fused projections: where values may lie whose blocks are interleaved over the ranks of a tensor axis."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["fused_beside"]


def fused_beside(root: nn.Module, outputs: Callable[[Tensor], tuple[int, bool] | None]) -> dict[int, set[int]]:
    """{id of a module: output sizes of the fused projections beside it that its value may come from}.

    ``outputs`` tells of a parameter whose output features are sharded their full number and whether they are several
    blocks, each sharded for itself; None for other parameters.
    """
    named = dict(root.named_modules())
    plain: dict[str, set[int]] = {}  # by container: output sizes of its unfused sharded layers
    fused: list[tuple[str, int]] = []
    for name, module in named.items():
        container = name.rpartition(".")[0]
        for parameter in module._parameters.values():
            found = None if parameter is None else outputs(parameter)
            if found is None:
                continue
            size, several = found
            if several:
                fused.append((container, size))
            else:
                plain.setdefault(container, set()).add(size)
    near: dict[int, set[int]] = {}
    for container, size in fused:
        for name, module in named[container].named_modules(prefix=container):
            if not any(size in plain.get(inner, ()) for inner in _between(container, name)):
                near.setdefault(id(module), set()).add(size)
    return near


def _between(container: str, name: str) -> list[str]:
    """The modules from below ``container`` down to ``name``: a layer in one of them is nearer than the container's."""
    parts = name.split(".")
    depth = len(container.split(".")) if container else 0
    return [".".join(parts[:end]) for end in range(depth + 1, len(parts) + 1)]
