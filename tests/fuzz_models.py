"""What is fuzzed: small nets whose modules pass random trees of tensors, described by data that can be drawn and sent.

A tree is a spec: ``("x",)``-like leaves by kind, and containers of specs. Everything here is this test's own, the walk
over trees included: it is the oracle of ``flex_model.trees``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)

Spec = tuple[Any, ...]
EPS = 0.1  # rows that are nearly constant are not blown up, with the rounding that differs between CPUs


@dataclass
class Bundle:
    value: Any
    rest: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


# {kind: (the tensor made of the main one (B, S, W), how the next module uses it, the dim of the batch)}
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Any], int | None]] = {
    "x": (lambda x: x, lambda t, x: t, 0),
    "half": (lambda x: x * 0.5, lambda t, x: t, 0),
    "row": (lambda x: x.sum(-1), lambda t, x: t.unsqueeze(-1), 0),
    "signs": (lambda x: (x > 0).long() * 2 + 1, lambda t, x: t.to(x.dtype), 0),
    "mask": (lambda x: x > 0.1, lambda t, x: torch.where(t, x * 0.5, x), 0),
    "turned": (lambda x: x.transpose(0, 1), lambda t, x: t.transpose(0, 1), 1),
    "flat": (lambda x: x.flatten(0, 1), lambda t, x: t.view(x.shape), 0),
    "vector": (lambda x: torch.arange(1, x.shape[-1] + 1).to(x.dtype), lambda t, x: t * 0.1, None),
    "column": (lambda x: x.mean((1, 2), keepdim=True) * 2, lambda t, x: t, 0),
    "sum": (lambda x: x.detach().sum(0), lambda t, x: 0.0, None),  # over the batch: it has no whole under data axes
}


def pack(spec: Spec, x: Tensor) -> Any:
    head, *rest = spec
    if head == "const":
        return rest[0]
    if head == "tuple":
        return tuple(pack(s, x) for s in rest)
    if head == "list":
        return [pack(s, x) for s in rest]
    if head == "dict":
        return {k: pack(s, x) for k, s in rest}
    if head == "data":
        return Bundle(*(pack(s, x) for s in rest))
    if head == "pair":
        return Pair(*(pack(s, x) for s in rest))
    return KINDS[head][0](x)


def kinds(spec: Spec) -> list[str]:
    """The kinds of the leaves, in flattening order."""
    head, *rest = spec
    if head == "const":
        return []
    if head == "dict":
        rest = [s for _, s in rest]
    if head in ("dict", "tuple", "list", "data", "pair"):
        return [k for s in rest for k in kinds(s)]
    return [head]


def leaves(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """(path, tensor) in flattening order."""
    if isinstance(value, Tensor):
        return [(path, value)]
    return [pair for key, v in _items(value) for pair in leaves(v, f"{path}.{key}" if path else str(key))]


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def replaced(value: Any, new: list[Tensor]) -> Any:
    """``value`` with its tensors replaced, in flattening order; ``new`` is used up."""
    if isinstance(value, Tensor):
        return new.pop(0)
    items = [(k, replaced(v, new)) for k, v in _items(value)]
    if isinstance(value, dict):
        return dict(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(v for _, v in items))
    if isinstance(value, (tuple, list)):
        return type(value)(v for _, v in items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **dict(items))
    return value


@dataclass(frozen=True)
class Scene:
    """A net, and what it runs under. ``batches``: samples by data rank."""

    engine: str = "solo"
    width: int = 4
    hidden: int = 8
    vocabulary: int = 16
    layers: int = 1
    repeat: int = 1  # how often the layers run in a forward
    value: Spec = ("x",)
    named: Spec | None = None
    output: Spec | None = None
    floats: bool = False  # the input is a float tensor that needs a gradient, not token ids
    recompute: str = ""  # "", "plain" or "reentrant"
    dtype: str = "float64"
    batches: tuple[int, ...] = (2,)
    length: int = 3
    shift: bool = False  # a second input, in a dict, that needs a gradient


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Takes a tree, gives a tree of the same kind; uses every tensor in it."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.norm = nn.LayerNorm(scene.width, eps=EPS)
        self.mlp = MLP(scene.width, scene.hidden)

    def forward(self, value: Any, number: int = 0, *, named: Any = None) -> Any:
        spec = self.scene.named
        found = list(zip(kinds(self.scene.value), (t for _, t in leaves(value)), strict=True))
        if spec is not None:
            found += zip(kinds(spec), (t for _, t in leaves(named)), strict=True)
        main = next(i for i, (kind, _) in enumerate(found) if kind == "x")
        x = found[main][1]
        out = x + self.mlp(self.norm(x))
        for i, (kind, tensor) in enumerate(found):
            if i != main:
                out = out + 0.1 * number * KINDS[kind][1](tensor, x)
        return pack(self.scene.value, out)


class Net(nn.Module):
    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        if not scene.floats:
            self.emb = nn.Embedding(scene.vocabulary, scene.width)
        self.layers = nn.ModuleList(Block(scene) for _ in range(scene.layers))
        self.norm = nn.LayerNorm(scene.width, eps=EPS)
        self.head = nn.Linear(scene.width, scene.vocabulary, bias=False)

    def forward(self, ids: Tensor, more: Any = None) -> Any:
        scene = self.scene
        x = ids if scene.floats else self.emb(ids)
        if more is not None:
            x = x + more["shift"]
        value = pack(scene.value, x)
        for _ in range(scene.repeat):
            for layer in self.layers:
                named = None if scene.named is None else pack(scene.named, main_of(scene, value))
                value = self._run(layer, value, named)
        hidden = self.norm(main_of(scene, value))
        logits = self.head(hidden)
        return logits if scene.output is None else Bundle(logits, pack(scene.output, hidden))

    def _run(self, layer: nn.Module, value: Any, named: Any) -> Any:
        keywords = {} if named is None else {"named": named}
        if not self.scene.recompute or not torch.is_grad_enabled():
            return layer(value, 3, **keywords)
        if self.scene.recompute == "reentrant":
            return checkpoint(layer, value, 3, use_reentrant=True)
        return checkpoint(layer, value, 3, use_reentrant=False, **keywords)


def main_of(scene: Scene, value: Any) -> Tensor:
    return leaves(value)[kinds(scene.value).index("x")][1]


ARGUMENTS = {  # the names of positional arguments, by class
    "Net": ("ids", "more"),
    "Block": ("value", "number"),
    "MLP": ("x",),
}


def input_leaves(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    names = ARGUMENTS.get(type(module).__name__, ("input",))
    return [p for n, a in zip(names, args, strict=False) for p in leaves(a, n)] + leaves(kwargs)


def make(scene: Scene) -> Net:
    """The plain net, the same on every rank."""
    torch.manual_seed(0)
    net = Net(scene).to(getattr(torch, scene.dtype))
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype) * 0.3)
    return net


def inputs(scene: Scene, call: int) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The whole batch of one call."""
    generator = torch.Generator().manual_seed(100 + call)
    batch, dtype = sum(scene.batches), getattr(torch, scene.dtype)
    if scene.floats:
        shape = (batch, scene.length, scene.width)
        ids = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        ids = torch.randint(0, scene.vocabulary, (batch, scene.length), generator=generator)
    if not scene.shift:
        return ids, None
    return ids, {"shift": torch.randn((batch, 1, scene.width), generator=generator, dtype=torch.float64).to(dtype)}


def loss(output: Any) -> Tensor:
    total = leaves(output)[0][1].new_zeros(())
    for i, (_, tensor) in enumerate(leaves(output)):
        if tensor.is_floating_point() and tensor.requires_grad:
            total = total + (tensor * (1 + 0.1 * i)).pow(2).mean() + 0.1 * tensor.mean()
    return total


def output_batch_dims(scene: Scene) -> list[int | None]:
    return [0, *(KINDS[k][2] for k in kinds(scene.output or ("const", None)))]


def part(scene: Scene, output: Any, rank: int) -> Any:
    """What data rank ``rank`` has of the whole output."""
    new = []
    for (_, tensor), dim in zip(leaves(output), output_batch_dims(scene), strict=True):
        if dim is None:
            new.append(tensor)
            continue
        rows = tensor.shape[dim] // sum(scene.batches)
        start = sum(scene.batches[:rank]) * rows
        new.append(tensor.narrow(dim, start, scene.batches[rank] * rows))
    return replaced(output, new)
