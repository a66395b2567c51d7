"""The oracle: plain torch hooks on the unsharded model in one process, and the comparison with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Key = tuple[str, str, int]  # (module, hook type, index of the tensor)


def leaves(value: Any) -> list[Tensor]:
    from flex_model.trees import tensors

    return tensors(value)


def plain_hooks(
    model: nn.Module, run: Callable[[nn.Module], Tensor], *, backward: bool = True
) -> dict[Key, list[Tensor]]:
    """Every module's inputs, outputs and their gradients, by torch's own hooks; the last are tensor hooks on aliases.

    torch's full backward hooks see positional tensors only and break in-place models, so that gradients are taken from
    aliases, which is how autograd itself tells one consumer's gradient from another's.
    """
    seen: dict[Key, list[Tensor]] = defaultdict(list)
    handles = []

    def note(key: Key, tensor: Tensor) -> None:
        seen[key].append(tensor.detach().clone())

    def watched(name: str, kind: str, value: Any) -> Any:
        flat, spec = pytree.tree_flatten(value)
        index, out = -1, []
        for x in flat:
            if isinstance(x, Tensor):
                index += 1
                if backward and x.requires_grad and x.is_floating_point():
                    x = x.view_as(x)
                    x.register_hook(lambda g, k=(name, kind, index): note(k, g))
            out.append(x)
        return pytree.tree_unflatten(out, spec)

    for name, module in model.named_modules():

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            for i, t in enumerate(leaves((args, kwargs))):
                note((name, "forward_pre", i), t)
            return watched(name, "full_backward", (args, kwargs)) if torch.is_grad_enabled() else None

        def after(m: nn.Module, args: Any, output: Any, name: str = name) -> Any:
            for i, t in enumerate(leaves(output)):
                note((name, "forward", i), t)
            return watched(name, "full_backward_pre", output) if torch.is_grad_enabled() else None

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    loss = run(model)
    if backward:
        loss.backward()
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def own_experts(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Mixtures of experts run by this loop instead of transformers' code: every (token, expert) once, by expert, then
    by token. Yields {name of the mixture: (tokens, experts)} as they run."""
    ids: dict[str, tuple[Tensor, Tensor]] = {}

    def loop(name: str, m: Any) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            pairs = [(t, e) for e in range(m.num_experts) for t in range(len(index)) if e in index[t].tolist()]
            tokens, experts = (torch.tensor(x) for x in zip(*pairs, strict=True))
            ids[name] = tokens, experts
            gate_up = torch.stack([m.gate_up_proj[e] @ hidden[t] for t, e in pairs])
            gated = m._apply_gate(gate_up)
            out = torch.stack([m.down_proj[e] @ row for (_, e), row in zip(pairs, gated, strict=True)])
            share = torch.stack([weights[t][index[t] == e].sum() for t, e in pairs])
            return torch.zeros_like(hidden).index_add(0, tokens, out * share.unsqueeze(-1))

        return forward

    mixtures = {n: m for n, m in model.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "act_fn")}
    for name, module in mixtures.items():
        module.forward = loop(name, module)  # type: ignore[method-assign]
    try:
        yield ids
    finally:
        for module in mixtures.values():
            del module.forward


def relative_error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = (t.detach().cpu().double() for t in (a, b))
    a, b = torch.nan_to_num(a, posinf=1e9, neginf=-1e9), torch.nan_to_num(b, posinf=1e9, neginf=-1e9)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


@dataclass
class Count:
    """Sites exact of sites tried; what was wrong, and what was refused by name."""

    tried: int = 0
    exact: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, label: str, got: list[Any] | Exception, want: list[Tensor], tolerance: float = 1e-5) -> None:
        self.tried += 1
        if isinstance(got, Exception):
            self.refused.append(f"{label}: {str(got)[:300]}")
            return
        if len(got) != len(want):
            self.wrong.append(f"{label}: {len(got)} calls for {len(want)}")
            return
        worst = max(
            relative_error(g, w) if isinstance(g, Tensor) else float("inf") for g, w in zip(got, want, strict=True)
        )
        if worst <= tolerance:
            self.exact += 1
        else:
            shapes = [
                (tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__, tuple(w.shape))
                for g, w in zip(got, want, strict=True)
            ]
            self.wrong.append(f"{label}: off by {worst:.2g} {shapes[:2]}")

    def __str__(self) -> str:
        return f"{self.exact} exact of {self.tried}, {len(self.refused)} refused, {len(self.wrong)} wrong"
