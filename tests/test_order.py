"""The order of shards through a module's own views: sizes fit where the order does not, and that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from flex_model import DummyModule, FlexModel
from flex_model.errors import LayoutError
from flex_model.layout.moves import Trace, out_of_order


class Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        took = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.trace.note(func, args, took, result)
        return result


B, S, HEAD = 2, 3, 4


def joined_in_place(x: Tensor, n: int) -> Tensor:
    cache = torch.zeros(B, S, n * HEAD)
    cache[:, :2] = torch.cat([x, x], -1)[:, :2, : n * HEAD]
    return cache[:, 1:]


CODE = {  # name: (code on (B, S, n * HEAD) with n heads here, whether its heads are in order)
    "split": (lambda x, n: x.view(B, S, n, HEAD), True),
    "split the head": (lambda x, n: x.view(B, S, 2, -1), False),
    "joined": (lambda x, n: x.view(B, S, n, HEAD).transpose(1, 2).transpose(1, 2).reshape(B, S, -1), True),
    "joined as the inner dim": (lambda x, n: x.view(B, S, n, HEAD).transpose(2, 3).reshape(B, S, -1), False),
    "with the batch": (lambda x, n: x.view(B, S, n, HEAD).transpose(1, 2).reshape(B * n, S, HEAD), False),
    "with the batch and apart": (
        lambda x, n: x.view(B, S, n, HEAD).transpose(1, 2).reshape(B * n, S, HEAD).exp().view(B, n, S, HEAD),
        True,
    ),
    "products": (lambda x, n: (q := x.view(B, S, n, HEAD).transpose(1, 2)) @ q.transpose(2, 3), True),
    "batch and positions in one": (lambda x, n: x.view(B * S, n, HEAD).flatten(1), True),
    "two joined": (lambda x, n: torch.cat([x, x], -1), False),
    "joined along another": (lambda x, n: torch.cat([x, x], 1), True),
    "each repeated": (lambda x, n: x.view(B, S, n, HEAD).repeat_interleave(2, 2), True),
    "all repeated": (lambda x, n: x.view(B, S, n, HEAD).repeat(1, 1, 2, 1), False),
    "repeated along another": (lambda x, n: x.repeat(1, 2, 1), True),
    "expanded after": (lambda x, n: x.view(B, S, n, 1, HEAD).expand(B, S, n, 2, HEAD).reshape(B, S, 2 * n, HEAD), True),
    "expanded before": (
        lambda x, n: x.view(B, S, 1, n, HEAD).expand(B, S, 2, n, HEAD).reshape(B, S, 2 * n, HEAD),
        False,
    ),
    "written in place": (joined_in_place, False),
}


@pytest.mark.parametrize("name", CODE)
def test_code(name: str) -> None:
    code, in_order = CODE[name]
    traces, numbers = [], []
    for heads in (2, 4):
        with Noted() as mode:
            out = code(torch.ones(B, S, heads * HEAD), heads)
        traces.append(mode.trace)
        numbers.append(mode.trace.number(out))
    assert (numbers[1] in out_of_order(*traces)) != in_order


def test_other_code_on_one_rank() -> None:
    traces = []
    for times in (1, 2):
        with Noted() as mode:
            x = torch.ones(2)
            for _ in range(times):
                x = x + 1
        traces.append(mode.trace)
    with pytest.raises(ValueError, match="other things"):
        out_of_order(*traces)
    assert out_of_order(traces[1], traces[0], cut=True) == {}


class Heads(nn.Module):
    """As tutorials shard an attention: the number of heads is divided by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.split = DummyModule()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.split(self.up(x).unflatten(-1, (self.heads, -1))).flatten(2))


def _tensor_parallel() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), Heads())
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"1.up": ColwiseParallel(), "1.down": RowwiseParallel()})
    model[1].heads //= 2
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    fm = FlexModel(model)
    with fm.capture("1.split") as acts:
        fm(x)
    with pytest.raises(LayoutError) as caught:
        acts["1.split"]
    return str(caught.value)


class Forgetful(nn.Module):
    """Fails at first where it is given more than its own batch."""

    def __init__(self, sick: bool) -> None:
        super().__init__()
        self.up, self.sick = nn.Linear(8, 4), 2 * sick  # a probe tries twice

    def forward(self, x: Tensor) -> Tensor:
        if self.sick and len(x) > B:
            self.sick -= 1
            raise torch.OutOfMemoryError("no room for twice the batch")
        return self.up(x)


def _out_of_memory_once(sick_ranks: list[int]) -> tuple[str, bool]:
    torch.manual_seed(0)
    full = torch.randn(2 * B, 8)
    model = Forgetful(dist.get_rank() in sick_ranks)
    want = model.up(full).detach()
    fm = FlexModel(nn.parallel.DistributedDataParallel(model))
    mine = full.chunk(2)[dist.get_rank()]
    with fm.capture("up") as acts:
        fm(mine)
    with pytest.raises(LayoutError) as caught:
        acts["up"]
    with fm.capture("up") as acts:
        fm(mine)
    return str(caught.value), torch.allclose(acts["up"], want)


@pytest.mark.parametrize("sick_ranks", [[1], [0, 1]])
def test_a_probe_that_failed_is_made_again(sick_ranks: list[int]) -> None:
    for message, right in run_world(2, _out_of_memory_once, sick_ranks):
        assert "no room for twice the batch" in message and right


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.more, self.taken = nn.Linear(8, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.more(x) if self.taken else x


def _taken_later() -> list[Any]:
    torch.manual_seed(0)
    full, model = torch.randn(2 * B, 8), Branch()
    want = model.more(model.up(full)).detach()
    fm = FlexModel(nn.parallel.DistributedDataParallel(model))
    found: list[Any] = []
    for model.taken in (False, True, True):
        with torch.no_grad(), fm.capture("more") as acts:
            fm(full.chunk(2)[dist.get_rank()])
        try:
            found.append(torch.allclose(acts["more"], want))
        except LayoutError as error:
            found.append(str(error))
        except KeyError:
            found.append("not there")
    return found


def test_a_branch_taken_later_is_looked_at_in_the_next_call() -> None:
    for first, second, third in run_world(2, _taken_later):
        assert first == "not there" and "the full value is unknown" in second and third is True


def test_heads_divided_by_hand_under_tensor_parallelism() -> None:
    assert all("not in the order of the ranks" in message for message in run_world(2, _tensor_parallel))
