"""Editing functions in which there is nothing to find: what people write to ablate, steer, patch and probe."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model import edits

VECTOR = torch.randn(8)
MASK = torch.ones(8)
MEANS = {"a": torch.zeros(8)}
UNITS = [1, 3]
GENERATOR = torch.Generator()
PROBE = nn.Linear(8, 8)


def ablate_units(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., UNITS] = 0
    return x


def ablate_in_place(x: Tensor) -> None:
    x[..., UNITS] = 0


def add_in_place(x: Tensor) -> Tensor:
    x += VECTOR
    return x


def by_method_in_place(x: Tensor) -> Tensor:
    return x.mul_(0.5).add_(VECTOR)


def a_head(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, -1)).clone()
    heads[..., 2, :] = 0
    return heads.flatten(-2)


def a_head_through_a_view(x: Tensor) -> Tensor:
    x.view(*x.shape[:-1], 4, -1)[..., 2, :].zero_()
    return x


def mean_ablate(x: Tensor) -> Tensor:
    return x.mean(dim=(0, 1), keepdim=True).expand_as(x)


def expanded_and_copied(x: Tensor) -> Tensor:
    y = x.mean(0, keepdim=True).expand_as(x).clone()
    y[..., 0] = 0
    return y


def patch(x: Tensor) -> Tensor:
    return torch.where(MASK.bool(), MEANS["a"].to(x), x)


def patch_a_position(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    out = x.clone()
    out[:, -1] = save_ctx.clean[:, -1].to(x.device, x.dtype)
    return out


def save(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> None:
    save_ctx.activation = x


def save_a_list(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> None:
    save_ctx.seen = [*getattr(save_ctx, "seen", []), x.detach()]


def trained(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + modules["probe"](x)


def its_own_weight(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x * module.weight


def project_out(x: Tensor) -> Tensor:
    direction = VECTOR / VECTOR.norm()
    direction = direction.to(device=x.device, dtype=x.dtype)
    return x - (x @ direction)[..., None] * direction


def in_float32(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


def in_double(x: Tensor) -> Tensor:
    return F.softmax(x.double(), dim=-1).type_as(x)


def clamp(x: Tensor, limit: float = 3.0) -> Tensor:
    return x.clamp(-limit, limit)


def only_where_large(x: Tensor) -> Tensor:
    if x.abs().max() > 3:
        return x / x.abs().max()
    return x


def only_if_long(x: Tensor) -> Tensor | None:
    if x.shape[1] < 4:
        return None
    return torch.cat([x[:, :1], x[:, 1:] * 0.5], dim=1)


def top_k(x: Tensor) -> Tensor:
    values, indices = x.topk(4, dim=-1)
    return torch.zeros_like(x).scatter(-1, indices, values)


def item_of_the_whole(x: Tensor) -> Tensor:
    return x / max(x.norm().item(), 1e-6)


def masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


def loop(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = x[:, : i + 1].mean(1)
    return out


def a_list_of_its_own(x: Tensor) -> Tensor:
    parts = []
    for row in x:
        parts.append(row * 2)
    return torch.stack(parts)


def noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.1)


def noise_of_its_own(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return x + torch.randn(x.shape, generator=generator)


def no_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.1, training=False)


def told_once(x: Tensor) -> Tensor:
    if dist.get_rank() == 0:
        print("norm", x.norm())
    return x * 2


def to_its_device(x: Tensor) -> Tensor:
    return x + VECTOR.to(f"cuda:{dist.get_rank()}" if x.is_cuda else "cpu")


def either_way(x: Tensor) -> Tensor:
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return x - whole.mean()


def logged(x: Tensor) -> None:
    print(x.norm())


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], -1)


def helper(x: Tensor, k: int) -> Tensor:
    return x * math.sqrt(k)


def helped(x: Tensor) -> Tensor:
    return helper(x, 4)


@torch.no_grad()
def without_gradient(x: Tensor) -> Tensor:
    return x * 0.5


def printing(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


@printing
def decorated(x: Tensor) -> Tensor:
    return x * 2


@printing
def decorated_four(module, x, save_ctx, modules):
    return x * 2


class Steer:
    def __init__(self, vector: Tensor) -> None:
        self.vector, self.scale = vector, 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.scale * self.vector.to(x)

    def method(self, module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        return x - self.vector


def scaled(scale: float, x: Tensor) -> Tensor:
    return x * scale


def of_the_site(x: Tensor, *, site: Any, call: Any) -> Tensor:
    return x * 0 if call.index == 0 and site.index == 0 else x


def made(factor: float):
    def edit(x: Tensor) -> Tensor:
        return x * factor

    return edit


def nested(x: Tensor) -> Tensor:
    def part(y: Tensor) -> Tensor:
        return y - y.mean()

    return part(x) + (lambda z: z * 2)(x)  # noqa: PLC3002


def raising(x: Tensor) -> Tensor:
    assert x.dim() == 3
    if x.shape[-1] != 8:
        raise ValueError(x.shape)
    return x


def a_gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(y.pow(2).sum(), y)
    return x - 0.1 * grad


# (function, what it is registered with)
GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (value, {})
    for name, value in list(globals().items())
    if getattr(value, "__module__", "") == __name__ and callable(value) and not isinstance(value, type)
}
for name in ("printing", "made", "helper", "scaled"):
    del GOOD[name]
GOOD["noise"] = (noise, {"random": True})
GOOD["dropped"] = (dropped, {"random": True})
GOOD["logged"] = (logged, {"run": "one_rank"})
GOOD |= {
    "add": (edits.add(VECTOR, scale=2.0), {}),
    "scale": (edits.scale(2.0), {}),
    "zero": (edits.zero(), {}),
    "zero units": (edits.zero([1, 2]), {}),
    "add on shards": (edits.add(VECTOR), {"run": "sharded"}),
    "zero units on shards": (edits.zero([1, 2]), {"run": "sharded"}),
    "scale on one rank": (edits.scale(2.0), {"run": "one_rank"}),
    "lambda": (lambda x: x * 2, {}),
    "lambda in place": (lambda x: (x.mul_(2), None)[1], {}),
    "lambda with default": (lambda x, f=helper: f(x, 2), {}),
    "lambda of four": (lambda module, x, save_ctx, modules: x + 1, {}),
    "unchanged": (lambda x: None, {}),
    "as it is": (lambda x: x, {}),
    "partial": (functools.partial(scaled, 2.0), {}),
    "object": (Steer(VECTOR), {}),
    "method": (Steer(VECTOR).method, {}),
    "closure": (made(2.0), {}),
    "builtin": (torch.relu, {}),
    "functional": (F.gelu, {}),
    "linear": (lambda x: PROBE(x), {}),
    "where on shards": (lambda x: torch.where(x > 0, x, x * 0.1), {"run": "sharded"}),
    "scatter on shards": (lambda x: x.slice_scatter(x[:, :2] * 2, 1, 0, 2), {"run": "sharded"}),
    "gathered on shards": (lambda x: x - x.mean(-1, keepdim=True).full_tensor().mean(), {"run": "sharded"}),
}
