"""Every named module of a model under an engine, all five hook types, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from oracle import Count, Key, own_experts, plain_hooks, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flex_model import FlexModel, HookFunction, Site
from flex_model.errors import FlexModelError

TYPES = ("forward", "forward_pre", "full_backward_pre", "full_backward")


def as_key(name: str, hook_type: str, index: int, count: int) -> Any:
    return name if count == 1 else Site(name, hook_type, index)


def compare(
    model: nn.Module,
    plain: nn.Module,
    run: Callable[[nn.Module], Tensor],
    run_plain: Callable[[nn.Module], Tensor],
    *,
    types: Sequence[str] = TYPES,
    tolerance: float = 1e-5,
    deliver: str = "all",
    mesh: DeviceMesh | None = None,
    rows: bool = False,
    leave: Callable[[str], bool] = lambda name: False,
) -> Count:
    """``run`` makes the local loss on the engine's model, ``run_plain`` the oracle's loss on the plain one.

    ``rows``: values inside mixtures of experts are compared row by row, by token and expert, and as they are as well
    where they come as whole tensors. ``leave``: names that are compared elsewhere.
    """
    backward = any("backward" in t for t in types)
    want = plain_hooks(plain, run_plain, backward=backward)
    with own_experts(plain) as ids:
        by_row = plain_hooks(plain, run_plain, backward=backward) if rows else {}
    inside = {n: ids[m] for n, _ in plain.named_modules() for m in ids if n.startswith(f"{m}.")}
    fm = FlexModel(model, mesh=mesh)
    names = [n for n in fm.wrapped_module_names if any((n, t, 0) in want for t in types) and not leave(n)]
    count = Count()
    with ExitStack() as stack:
        acts = {
            t: stack.enter_context(fm.capture(names, hook_type=t, unpack_idx="all", deliver=deliver)) for t in types
        }
        loss = run(fm)
        if backward:
            loss.backward()
    for (name, kind, index), values in want.items():
        if kind not in types or leave(name):
            continue
        at = {"full_backward_pre": "forward", "full_backward": "forward_pre"}.get(kind, kind)
        key = as_key(name, kind, index, sum(1 for n, k, _ in want if (n, k) == (name, at)))
        label = f"{name or '(root)'}.{kind}[{index}]"
        try:
            got: Any = acts[kind].calls(key)
        except (FlexModelError, KeyError) as error:
            got = error
        if name in inside and isinstance(got, list):
            mine = acts[kind].rows(key)
            same = torch.equal(mine.tokens, inside[name][0]) and torch.equal(mine.experts, inside[name][1])
            whole = all(isinstance(g, Tensor) for g in got) and len(got) == len(values)
            got = [mine.values if same else mine.tokens, *(got if whole else [])]
            values = [*by_row[name, kind, index], *(values if whole else [])]
        count.add(label, got, values, tolerance)
    return count


def whole_step(plain: nn.Module, run_plain: Callable[[nn.Module], Tensor]) -> dict[Key, list[Tensor]]:
    """What ``compare_step`` expects: the oracle's values, and the gradients of parameters."""
    want = plain_hooks(plain, run_plain)
    return {**want, **{(n, "tensor", 0): [p.grad] for n, p in plain.named_parameters() if p.grad is not None}}


def compare_step(fm: FlexModel, want: dict[Key, list[Tensor]], run: Callable[[], Any]) -> tuple[Count, Any]:
    """A step that calls backward itself, a pipeline's: every module, and every parameter's gradient, once a step.

    Parameters are met twice, by ``capture`` on every rank and by ``register_hook``, which delivers to the lowest. The
    other value is what ``run`` returned.
    """
    count, parameters = Count(), [n for n, kind, _ in want if kind == "tensor"]
    handles = [fm.register_hook(HookFunction(name)) for name in parameters]
    with ExitStack() as stack:
        acts = {t: stack.enter_context(fm.capture("", "**", hook_type=t, unpack_idx="all")) for t in TYPES}
        acts["tensor"] = stack.enter_context(fm.capture("**", hook_type="tensor"))
        out = run()
    for handle in handles:
        handle.remove()
    for (name, kind, index), values in want.items():
        at = {"full_backward_pre": "forward", "full_backward": "forward_pre"}.get(kind, kind)
        key = as_key(name, kind, index, sum(1 for n, k, _ in want if (n, k) == (name, at)))
        try:
            got: Any = acts[kind].calls(key)
        except (FlexModelError, KeyError) as error:
            got = error
        count.add(f"{name or '(root)'}.{kind}[{index}]", got, values)
    registered = Count()
    for name in parameters if not dist.get_rank() else ():
        registered.add(f"{name}, registered", fm.output_ptr.get(name, []), want[name, "tensor", 0])
    count.wrong += registered.wrong
    return count, out


def full_gradients(fm: FlexModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full gradient of every parameter, whatever the engine keeps of it.

    ``parameters`` are those from before the forward: DDP over tensor parallelism replaces them in it.
    """
    runtime = fm._runtime
    out = {}
    flat = next((e for e in runtime.engines.found if e.name == "FSDP1"), None)
    if flat is not None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        for wrapper in FullyShardedDataParallel.fsdp_modules(fm.module):
            prefix = next(n for n, m in fm.module.named_modules() if m is wrapper)
            handle = wrapper._handle
            for info, fqn in zip(handle.flat_param._param_infos, handle.flat_param._fqns, strict=True):
                name = ".".join([runtime.names.strip(prefix)] * bool(prefix) + [fqn]) if prefix else fqn
                out[runtime.names.strip(name)] = flat.full_gradient(info.module, info.param_name, None)
        return out
    for name, parameter in parameters.items():
        grad, spec = parameter.grad, getattr(parameter, "_st_info", None)
        if spec is not None and grad is not None:
            grad = DTensor.from_local(
                grad, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
            )
        cut = getattr(parameter, "cut", None)  # (dim, group) of parameters that are plain parts
        if cut is not None and grad is not None:
            grad = _joined(grad, *cut)
        if grad is not None:
            out[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return out


def _joined(local: Tensor, dim: int, group: Any) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)


def wrong_gradients(
    fm: FlexModel, plain: nn.Module, parameters: dict[str, Tensor], tolerance: float = 1e-5
) -> list[str]:
    """Parameters whose full gradient differs from the oracle's."""
    mine, bad = full_gradients(fm, parameters), []
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            continue
        error = relative_error(mine[name], parameter.grad) if name in mine else float("nan")
        if not error <= tolerance:
            bad.append(f"{name}: off by {error:.2g}")
    return bad


def square(output: Any) -> Tensor:
    """A loss with a gradient everywhere."""
    logits = output.logits if hasattr(output, "logits") else output
    logits = logits if isinstance(logits, Tensor) else logits[0]
    return logits.float().pow(2).mean()
