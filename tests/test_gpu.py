"""On GPUs: the same numbers, over NCCL; and a forward waits neither for the device nor for a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import context
import engines
import models
import parity
import pytest
import test_edits_gradients
import test_faults
import test_harvest
import torch
import torch.distributed as dist
from gpus import needs_gpu, run_faulty_gpus, run_gpus
from oracle import relative_error
from test_context_parallel import torch_context
from test_parity_torch import parity_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend

from flex_model import FlexModel, HookFunction

pytestmark = needs_gpu
ENGINES = ("ddp", "fsdp1", "fsdp2", "tp", "tp_dtensors", "tp_local_head", "sp")


# -- the same numbers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("deliver", ["all", "main"])
def test_parity(deliver: str) -> None:
    for rank, rows in enumerate(run_gpus(2, _parity, deliver)):
        for engine, (text, problems, tried) in rows.items():
            print(f"{engine}, two ranks over NCCL, deliver={deliver!r}: {text}")
            absent = [p for p in problems if "sent it to rank 0" in p]
            assert tried == 62 and len(absent) == (62 if rank and deliver == "main" else 0)
            assert problems == absent


def _parity(deliver: str) -> dict[str, Any]:
    return {engine: parity_of(engine, deliver) for engine in ENGINES}


def test_parity_of_one_process() -> None:
    [(text, problems, tried)] = run_gpus(1, _alone)
    print(f"one process: {text}")
    assert not problems and tried == 62


def _alone() -> tuple[str, list[str], int]:
    dist.destroy_process_group()
    plain, full = models.net().to("cuda"), models.tokens().to("cuda")
    count = parity.compare(
        copy.deepcopy(plain), plain, lambda m: engines.loss(m(full)), lambda m: engines.loss(m(full))
    )
    return str(count), count.wrong + count.refused, count.tried


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_edits_and_gradients(engine: str) -> None:
    for tried, bad in run_gpus(2, test_edits_gradients.all_of, engine, True):
        print(f"{engine}: {tried - len(bad)} exact of {tried}")
        assert not bad and tried == 15


def _long_context() -> tuple[str, list[str], int]:
    context.LENGTH = 128  # the kernel pads what torch merges to 32 tokens, and a rank has chunks of a fourth
    return torch_context("cuda", True, True, SDPBackend.EFFICIENT_ATTENTION)


def test_torch_context() -> None:
    """Causal and zig-zag, which torch cannot run on the CPU."""
    for text, problems, tried in run_gpus(2, _long_context):
        print(f"torch's context_parallel, causal, zig-zag: {text}")
        assert not problems and tried == 114


# -- where values are kept -------------------------------------------------------------------------------------
def _where() -> dict[str, str]:
    placed = engines.place("tp", models.net().to("cuda"))
    full = models.tokens().to("cuda")
    said = {}
    for device in ("cpu", "cuda", None):
        fm = FlexModel(placed.model, device=device)
        with torch.no_grad(), ExitStack() as stack:
            acts = {
                mode: stack.enter_context(fm.capture("layers.0.mlp.act", "layers.0", deliver=mode))
                for mode in ("main", "all", "local")
            }
            fm(full)
        for mode in ("main", "all", "local") if dist.get_rank() == 0 else ("all", "local"):
            for name in ("layers.0.mlp.act", "layers.0"):
                value = acts[mode][name]
                told = f"{value.device.type}"
                if isinstance(value, DTensor):  # whose shards can be put together wherever they lie
                    told += " same" if torch.equal(value.full_tensor().cpu(), acts["all"][name].cpu()) else " other"
                said[f"{device} {mode} {name}"] = told
        fm.restore()
    return said


def test_values_are_kept_where_they_were_asked_to_be() -> None:
    for said in run_gpus(2, _where):
        for key, told in said.items():
            device, mode, _ = key.split()
            where = "cpu" if device == "cpu" else "cuda"
            assert told == (f"{where} same" if mode == "local" else where), (key, told)


# -- copies ----------------------------------------------------------------------------------------------------
class Overwriting(nn.Module):
    """The model writes on in the memory of what was captured, and gives it back, while the copy is on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Identity() for _ in range(8))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = step(x)
            x.add_(1) if i % 2 else x.mul_(2)
        return x + self.weight


def _overwritten(device: str | None) -> tuple[list[bool], list[bool]]:
    dist.destroy_process_group()
    fm = FlexModel(Overwriting().to("cuda"), device=device)
    same, pinned = [], []
    for size in (1, 1000, 2**24):  # the last: 64 MiB
        for _ in range(3):
            with torch.no_grad(), fm.capture("steps.*") as acts:
                fm(torch.arange(size, dtype=torch.float, device="cuda"))
            want = torch.arange(size, dtype=torch.float)
            for i in range(8):
                got = acts[f"steps.{i}"]
                same.append(torch.equal(got.cpu(), want))
                pinned.append(got.is_pinned())
                want = want + 1 if i % 2 else want * 2
    return same, pinned


@pytest.mark.parametrize("device", ["cpu", None])
def test_no_later_write_changes_a_capture(device: str | None) -> None:
    [(same, pinned)] = run_gpus(1, _overwritten, device)
    assert all(same) and all(pinned) == (device == "cpu")


def _more_than_room() -> bool:
    from flex_model.routing import copies

    dist.destroy_process_group()
    copies._ROOM = 2**20
    fm = FlexModel(Overwriting().to("cuda"))
    with torch.no_grad(), fm.capture("steps.*") as acts:
        fm(torch.ones(2**22, device="cuda"))
    return all(len(acts[f"steps.{i}"].unique()) == 1 for i in range(8))


def test_copies_beyond_the_room_for_them() -> None:
    assert run_gpus(1, _more_than_room) == [True]


# -- nothing waits ---------------------------------------------------------------------------------------------
@contextmanager
def _never_waiting(model: nn.Module) -> Iterator[None]:
    """Between the first module's start and the last one's end, what waits for the device raises."""
    first, last = model.get_submodule("emb"), model.get_submodule("head")
    handles = [
        first.register_forward_pre_hook(lambda m, a: torch.cuda.set_sync_debug_mode("error"), prepend=True),
        last.register_forward_hook(lambda m, a, o: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()


def _unhurried(engine: str) -> str:
    """Everything at once: captures of all sites, a selection, edits on ranks' own values, and of whole ones."""
    plain = models.net().to("cuda")
    if engine == "none":
        dist.destroy_process_group()
        placed = engines.Placed(plain)
    else:
        placed = engines.place(engine, plain)
    fm = FlexModel(placed.model)
    fm.register_forward_hook(HookFunction("layers.0", editing_function=lambda x: x * 1.5, run="sharded"))
    fm.register_forward_hook(HookFunction("layers.1", editing_function=lambda x: x + x.mean(-1, keepdim=True)))
    fm.register_forward_hook(HookFunction("layers.0.mlp.act", editing_function=lambda x: x - x.mean(-1)[..., None]))
    full = placed.mine(models.tokens().to("cuda"))
    inner = [n for n in fm.wrapped_module_names if n.startswith("layers.")]
    seen = []
    for turn in range(3):  # in the first, layouts are found out
        with torch.no_grad(), ExitStack() as stack:
            acts = stack.enter_context(fm.capture(inner))
            stack.enter_context(fm.capture("norm", select=(slice(None), -1)))
            if turn:
                stack.enter_context(_never_waiting(plain))
            try:
                fm(full)
            except RuntimeError as error:
                return str(error)
        seen.append({k: acts[k] for k in acts} if not dist.is_initialized() or not dist.get_rank() else {})
    return "" if all(torch.equal(seen[0][k], seen[2][k]) for k in seen[0]) else "other values"


@pytest.mark.parametrize(("engine", "size"), [("none", 1), ("tp", 2), ("sp", 2), ("fsdp2", 2)])
def test_nothing_waits_for_the_device_in_a_forward(engine: str, size: int) -> None:
    assert run_gpus(size, _unhurried, engine) == [""] * size


# -- what goes wrong -------------------------------------------------------------------------------------------
def test_every_rank_ends_with_the_right_error() -> None:
    """The faults of which every rank must hear, over NCCL, in whose collectives nobody can be woken."""
    rows = run_faulty_gpus(2, test_faults.faults_of, "ddp", list(SOON), test_faults.LONG, timeout=120)
    assert all(end.kind == "returned" for end in rows), rows
    ends = {name: [end.value[name] for end in rows] for name in SOON}
    late = run_faulty_gpus(2, test_faults.faults_of, "ddp", LATE, test_faults.SOON, timeout=60)
    assert all(end.kind == "returned" for end in late), late
    ends |= {name: [end.value[name] for end in late] for name in LATE}
    ends["kill -9"] = run_faulty_gpus(2, test_faults.killed_in, "ddp", timeout=40)
    for name, of_ranks in ends.items():
        kinds = ", ".join(f"{rank}: {end.kind}" for rank, end in enumerate(of_ranks))
        print(f"faults, ddp x 2 over NCCL: {name:30s} {max(e.seconds for e in of_ranks):5.1f} s  {kinds}")
    assert not [w for n, e in ends.items() for w in test_faults.wrong_ends(test_faults.MATRIX[n], n, e)]


LATE = ["sleeps past the timeout", "a module is skipped"]
SOON = tuple(n for n in test_faults.MATRIX if n not in test_faults.TIMEOUTS and n != "kill -9")


# -- with others -----------------------------------------------------------------------------------------------
def _generated() -> list[str]:
    dist.destroy_process_group()
    model = models.make("llama").to("cuda", torch.bfloat16)
    model.set_attn_implementation("sdpa")
    inputs = {k: v.to("cuda") for k, v in models.inputs("llama").items()}
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        plain = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options)
        fm = FlexModel(model)
        with fm.capture("model.layers.1") as acts, fm.edit("model.layers.0", lambda x: x * 1.0):
            same = fm.generate(**inputs, **options)
        with fm.edit("model.layers.0", lambda x: -x):
            other = fm.generate(**inputs, **options)
    bad = [] if torch.equal(plain, again) and torch.equal(plain, same) else ["an edit of nothing changed the text"]
    bad += ["an edit changed nothing"] if torch.equal(plain, other) else []
    calls = acts.calls("model.layers.1")
    return bad + ([] if len(calls) == 5 and calls[0].dtype == torch.bfloat16 else [f"{len(calls)} calls"])


def test_generate() -> None:
    assert run_gpus(1, _generated) == [[]]


def _random() -> list[bool]:
    """Random edits: the same on one process and on two, call by call, and the model's own state is left alone."""
    full = models.tokens().to("cuda")

    def noisy(model: nn.Module) -> Tensor:
        fm = FlexModel(model)
        noise = HookFunction("layers.0.mlp.act", editing_function=lambda x: x + torch.randn_like(x), random=True)
        fm.register_forward_hook(noise)
        with torch.no_grad(), fm.capture("layers.1", deliver="all") as acts:
            state = torch.cuda.get_rng_state()
            fm(full)
        assert torch.equal(state, torch.cuda.get_rng_state())
        fm.restore()
        return acts["layers.1"]

    apart = noisy(engines.place("tp", models.net().to("cuda")).model)
    dist.destroy_process_group()
    return [relative_error(apart, noisy(models.net().to("cuda"))) < 1e-5]


def test_random_edits() -> None:
    assert run_gpus(2, _random) == [[True]] * 2


def _compiled() -> list[str]:
    dist.destroy_process_group()
    plain, full = models.net().to("cuda"), models.tokens().to("cuda")
    with torch.no_grad():
        fm = FlexModel(torch.compile(copy.deepcopy(plain)))
        with fm.capture("layers.1.mlp.act") as acts:
            fm(full)
        whole = FlexModel(plain)
        with whole.capture("layers.1.mlp.act") as want:
            whole(full)
    error = relative_error(acts["layers.1.mlp.act"], want["layers.1.mlp.act"])
    return [] if error < 1e-4 else [f"off by {error}"]


def test_compiled() -> None:
    assert run_gpus(1, _compiled) == [[]]


def _offloaded() -> list[str]:
    from accelerate import dispatch_model

    dist.destroy_process_group()
    plain = models.make("llama").to("cuda")
    inputs = {k: v.to("cuda") for k, v in models.inputs("llama").items()}
    names = ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.down_proj", "lm_head"]
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.norm": 0, "lm_head": 0}
    spread = dispatch_model(copy.deepcopy(plain), {**places, "model.layers.1": "cpu"})
    with torch.no_grad():
        fm, whole = FlexModel(spread), FlexModel(plain)
        with fm.capture(names) as acts, whole.capture(names) as want:
            fm(**inputs)
            whole(**inputs)
    return [n for n in names if relative_error(acts[n], want[n]) > 1e-5]


def test_a_model_partly_on_the_host() -> None:
    assert run_gpus(1, _offloaded) == [[]]


# -- harvests ----------------------------------------------------------------------------------------------------
SITES = ["layers.0", "layers.1.mlp.act", "norm"]


def _harvested(engine: str, path: Path) -> list[str]:
    """What differs from plain hooks on one process's CPU."""
    plain = models.net().to("cuda")
    placed = plain if engine == "none" else engines.place(engine, plain).model
    fm = FlexModel(placed)
    fm.harvest(test_harvest.of_engine(engine), SITES, path / "acts", exclude_tokens=(5,), commit_every=2)
    fm.harvest(test_harvest.of_engine(engine), SITES, path / "cast", exclude_tokens=(5,), dtype="bfloat16")
    if dist.is_initialized():
        dist.barrier()
    keep = {"exclude": (5,)}
    want = test_harvest.by_hand(
        models.net(), test_harvest.of_engine(engine), SITES, lambda b: test_harvest.kept(b["ids"], **keep)
    )
    wrong = test_harvest.differences(path / "acts", want)
    cast = {name: rows.bfloat16().float() for name, rows in want.items()}
    return wrong + test_harvest.differences(path / "cast", cast, 1e-2)


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "tp", "sp"])
def test_harvest_of_a_gpu(engine: str, tmp_path: Path) -> None:
    ranks = 1 if engine == "none" else 2
    assert run_gpus(ranks, _harvested, engine, tmp_path) == [[]] * ranks


def _harvest_waits_for_nothing(path: Path) -> str:
    """A step's forward, and what is taken from it, wait for nothing on the device once layouts are known."""
    dist.destroy_process_group()
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to("cuda")
    fm, data = FlexModel(model), [torch.randn(1024, 512, device="cuda") for _ in range(6)]

    def forward(x: Tensor) -> None:
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")
        try:
            fm(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    steps: list[int] = []
    fm.harvest(data, ["0", "2"], path / "acts", forward=forward, dtype="bfloat16")
    with torch.no_grad():
        want = torch.cat([model[0](x) for x in data]).bfloat16().cpu()
    return "" if torch.equal(fm.harvest(data, ["0", "2"], path / "acts").store["0"].torch(), want) else "rows differ"


def test_a_harvest_waits_for_nothing_in_a_forward(tmp_path: Path) -> None:
    assert run_gpus(1, _harvest_waits_for_nothing, tmp_path) == [""]
