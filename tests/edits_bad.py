"""Editing functions that go wrong on many ranks, each with the codes that must be found, and only those."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import random
import socket
import time
import uuid
import weakref
from datetime import datetime
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import all_reduce, get_rank
from torch.distributed import get_rank as which

VECTOR = torch.randn(8)
SEEN: list[Tensor] = []
STORE: dict[str, Any] = {}
COUNT = 0
GENERATOR = torch.Generator()
rng = np.random.default_rng(0)
rank = 0
logger = logging.getLogger("edits")
WITH_DROPOUT = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
BAD: dict[str, tuple[Any, dict[str, Any], set[str]]] = {}


def bad(*codes: str, **keywords: Any):
    def keep(fn):
        BAD[f"{getattr(fn, '__name__', type(fn).__name__)}{len(BAD)}"] = (fn, keywords, set(codes))
        return fn

    return keep


# -- its form
@bad("FM101")
def three(module, x, save_ctx):
    return x


@bad("FM101")
def none_at_all():
    return None


@bad("FM102")
def forgotten(x):
    x * 2


@bad("FM102")
def forgotten_name(x):
    y = x - x.mean()  # noqa: F841


@bad("FM102")
def rebound(module, x, save_ctx, modules):
    x = x + VECTOR


@bad("FM102")
def on_one_way(x):
    if x.shape[1] > 3:
        return x * 2
    x = x * 3


@bad("FM102")
def method_without_underscore(x):
    x.mul(2)


@bad("FM103")
def several(x):
    return x, None


@bad("FM103")
def a_number(x):
    return x.norm().item()


@bad("FM103")
def an_array(x):
    return x.detach().cpu().numpy()


@bad("FM103")
def in_a_list(x):
    return [x * 2]


@bad("FM104")
def generator(x):
    yield x * 2


@bad("FM104")
async def coroutine(x):
    return x


@bad("FM105")
def half(x):
    return x.half() * 2


@bad("FM105")
def a_mask(x):
    return x > 0


@bad("FM105")
def to_bfloat16(x):
    return (x * 2).to(torch.bfloat16)


@bad("FM106")
def on_the_cpu(x):
    return x.cpu() * 2


@bad("FM106")
def on_the_gpu(x):
    y = x.to("cuda")
    return y + 1


@bad("FM106")
def cuda(x):
    return (x - x.mean()).cuda()


# -- ranks
@bad("FM111")
def by_rank(x):
    return x * dist.get_rank()


@bad("FM111")
def only_on_rank_0(x):
    if dist.get_rank() == 0:
        x = x * 2
    return x


@bad("FM111")
def imported_by_name(x):
    return x + VECTOR * get_rank()


@bad("FM111")
def under_another_name(x):
    return x if which() else x * 2


@bad("FM111")
def early_return(x):
    if torch.distributed.get_rank() != 0:
        return None
    return x * 2


@bad("FM111")
def environment(x):
    return x * int(os.environ["RANK"])


@bad("FM111")
def environment_get(x):
    local = int(os.environ.get("LOCAL_RANK", 0))
    return x + local


@bad("FM111")
def getenv(x):
    return x * float(os.getenv("SLURM_PROCID", "0"))


@bad("FM111")
def device(x):
    return x * torch.cuda.current_device()


@bad("FM111")
def device_index(x):
    if x.device.index == 0:
        return x * 2
    return x


@bad("FM111")
def rank_from_outside(x):
    if rank == 0:
        return x * 2
    return x


@bad("FM111")
def mine(x):
    start = dist.get_rank() * 4
    x[..., start : start + 4] = 0
    return x


@bad("FM112")
def world(x):
    return x / dist.get_world_size()


@bad("FM113")
def clock(x):
    return x * (time.time() % 2)


@bad("FM113")
def process(x):
    return x + os.getpid()


@bad("FM113")
def unique(x):
    return x * (uuid.uuid4().int % 7)


@bad("FM113")
def host(x):
    return x * 2 if socket.gethostname() == "a" else x


@bad("FM113")
def date(x):
    return x * datetime.now().minute


@bad("FM114")
def reduced(x):
    y = x.clone()
    dist.all_reduce(y)
    return y


@bad("FM114")
def reduced_by_name(x):
    y = x.clone()
    all_reduce(y)
    return y


@bad("FM114")
def functional(x):
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


@bad("FM114")
def with_gradient(x):
    return dist_nn.all_reduce(x)


@bad("FM114")
def whole_already(x):
    return x.full_tensor() * 2


@bad("FM114")
def waits(x):
    dist.barrier()
    return x


@bad("FM115")
def some_wait(x):
    if dist.get_rank() == 0:
        dist.broadcast(x.clone(), 0)
    return x


@bad("FM115", run="one_rank")
def one_waits(x):
    dist.barrier()
    return x


@bad("FM115", "FM151", run="sharded")
def gathered_by_data(x):
    if x.sum() > 0:
        return x.redistribute(placements=x.placements)
    return x


# -- random numbers
@bad("FM121")
def noise(x):
    return x + torch.randn_like(x)


@bad("FM121")
def uniform(x):
    return x * torch.rand(x.shape[-1])


@bad("FM121")
def dropout(x):
    return F.dropout(x, 0.5)


@bad("FM121")
def sampled(x):
    return F.one_hot(torch.multinomial(x.softmax(-1)[0], 1), 8).to(x)


@bad("FM121")
def bernoulli(x):
    return x * torch.full_like(x, 0.5).bernoulli_()


@bad("FM121")
def normal(x):
    return x.normal_()


@bad("FM121")
def distribution(x):
    return x + torch.distributions.Normal(0.0, 1.0).sample(x.shape)


@bad("FM121")
def module_with_dropout(x):
    return WITH_DROPOUT(x)


@bad("FM122")
def of_numpy(x):
    return x + torch.from_numpy(np.random.randn(8)).to(x)


@bad("FM122", random=True)
def of_python(x):
    return x * random.random()


@bad("FM122", random=True)
def of_numpy_generator(x):
    return x * float(rng.normal())


@bad("FM122", random=True)
def of_its_own(x):
    return x + torch.randn(x.shape, generator=GENERATOR)


@bad("FM122")
def imported_inside(x):
    import random as r

    return x * r.uniform(0, 1)


@bad("FM121", "FM123")
def seeding(x):
    torch.manual_seed(0)
    return x + torch.randn_like(x)


# -- in place
def double_(x: Tensor) -> None:
    x.mul_(2)


def set_first(x: Tensor) -> Tensor:
    x[0] = 0
    return x


@bad("FM131")
def in_a_helper(x):
    double(x)
    return x


def double(x):
    x.mul_(2)


@bad("FM131")
def in_a_helper_on_a_view(x):
    return set_first(x.view(-1)).view(x.shape)


@bad("FM131")
def by_keyword(x):
    return F.relu(x, inplace=True)


@bad("FM131")
def into_out(x):
    return torch.add(x, 1, out=x)


@bad("FM131")
@torch.no_grad()
def wrapped(x):
    x[..., 0] = 0
    return x


@bad("FM132")
def data(x):
    x.data.mul_(2)


@bad("FM132")
def through_numpy(x):
    x.numpy()[0] = 1


@bad("FM133")
def expanded(x):
    y = x.mean(0, keepdim=True).expand_as(x)
    y[..., 0] = 0
    return y


@bad("FM133")
def expanded_sum(x):
    y = VECTOR.expand(x.shape)
    y += x
    return y


@bad("FM134", run="sharded")
def on_shards(x):
    x[:, 2:4] *= 2
    return x


@bad("FM134", run="sharded")
def whole_on_shards(x):
    return x.mul_(2)


# -- side effects
@bad("FM142")
def appended(x):
    SEEN.append(x.detach().clone())
    return x


@bad("FM142", "FM143")
def appended_with_graph(x):
    SEEN.append(x)


@bad("FM142")
def without_its_graph(x):
    SEEN.append(weakref.ref(x))
    SEEN.append(str(x.norm()))
    SEEN.append(np.asarray(x.detach()))


@bad("FM143", run="one_rank")
def kept_with_graph(x):
    STORE["x"] = x * 2


@bad("FM142")
def stored(x):
    STORE["mean"] = x.mean().item()
    return x


@bad("FM142")
def counted(x):
    global COUNT
    COUNT += 1
    return x


@bad("FM142")
def on_the_module(module, x, save_ctx, modules):
    module.seen = x.detach()


@bad("FM144")
def into_a_tensor(x):
    VECTOR.add_(x.mean())
    return x


@bad("FM144")
def running_mean(x):
    VECTOR[...] = 0.9 * VECTOR + 0.1 * x.mean((0, 1))
    return x


@bad("FM141")
def printed(x):
    print(x.shape)
    return x


@bad("FM141")
def saved(x):
    torch.save(x.detach(), "x.pt")
    return x


@bad("FM141")
def written(x):
    with open("log.txt", "a") as file:
        file.write(str(x.shape))
    return x


@bad("FM141")
def dumped(x):
    json.dump(x.detach().tolist(), open("x.json", "w"))  # noqa: SIM115
    return x


@bad("FM141")
def pickled(x):
    pickle.dump(x.detach(), open("x.pkl", "wb"))  # noqa: SIM115


@bad("FM141")
def logged(x):
    logger.info("norm %s", x.norm())
    return x


def tell(x):
    print(x.norm())


@bad("FM141")
def told_by_a_helper(x):
    tell(x)
    return x * 2


class Recorder:
    def __init__(self):
        self.values, self.count = [], 0

    def __call__(self, x):
        self.count += 1
        return x

    def method(self, module, x, save_ctx, modules):
        self.values.append(x.detach())

    def note(self, x):
        self.values.append(x.detach())


recorder = Recorder()


@bad("FM142")
def recorded(x):
    recorder.note(x)
    return x


# -- shards
@bad("FM151", run="sharded")
def asked(x):
    if x.sum() > 0:
        return x * 2
    return x


@bad("FM151", run="sharded")
def item(x):
    return x / x.norm().item()


@bad("FM151", run="sharded")
def as_float(x):
    return x / float(x.max())


@bad("FM151", run="sharded")
def as_list(x):
    largest = x.flatten().tolist()[0]
    return x - largest


@bad("FM151", run="sharded")
def as_bool(x):
    return x * 2 if bool((x > 3).any()) else x


@bad("FM151", run="sharded")
def while_large(x):
    while x.norm() > 1:
        x = x / 2
    return x


@bad("FM151", run="sharded")
def by_mask(x):
    return x - x[x > 0].mean()


def closure():
    seen = []

    def edit(x):
        seen.append(x.detach())
        return x

    return edit


def counting():
    count = 0

    def edit(x):
        nonlocal count
        count += 1
        return x

    return edit


def told(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


@bad("FM111")
@told
def decorated(module, x, save_ctx, modules):
    return x * dist.get_rank()


def scaled(seen, x):
    seen.append(x.detach())
    return x


def unwrapped(fn):
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    return wrapper


bad("FM142")(closure())
bad("FM142")(counting())
bad("FM142")(functools.partial(scaled, []))
bad("FM142")(Recorder())
bad("FM142")(Recorder().method)
bad("FM101")(unwrapped(lambda x: x * 2))
bad("FM101")(nn.Linear(8, 8))
BAD["lambda rank"] = (lambda x: x * dist.get_rank(), {}, {"FM111"})
BAD["lambda noise"] = (lambda x: x + torch.randn_like(x), {}, {"FM121"})
BAD["lambda list"] = (lambda x: SEEN.append(x.detach()), {}, {"FM142"})
BAD["second lambda"] = ((lambda x: x, lambda x: print(x))[1], {}, {"FM141"})
BAD["lambda over lines"] = (
    lambda x: x
    if x.dim() > 2
    else (
        x * torch.rand(1)
    ),
    {},
    {"FM121"},
)  # fmt: skip
