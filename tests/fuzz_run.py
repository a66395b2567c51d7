"""A fuzz case on FlexModel, on this rank of a world, and the comparison with the oracle."""

from __future__ import annotations

import functools
import traceback
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import engines
import fuzz_edits
import fuzz_models
import parity
import torch
import torch._dynamo  # before ranks are forked, each of which would need seconds for it
import torch.distributed as dist
from fuzz_case import Case, Hook, Oracle, Round, backwards, beside, trainables, zero
from fuzz_models import Scene
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from flex_model import FlexModel, HookFunction, Site
from flex_model.errors import DeliveryError, FlexModelError, NameNotFoundError
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.assembly import Parts

TOLERANCE = {
    "float64": (1e-8, 1e-12),
    "float32": (1e-4, 1e-5),
    "bfloat16": (0.3, 0.3),
}  # of the largest element; absolute
_placed: dict[Scene, engines.Placed] = {}


@dataclass
class Outcome:
    """What this rank found. ``refused``: messages of errors by name; ``values``: how many were compared; ``broken``:
    the engine was left in the middle of something, so that this world should run no further case."""

    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    values: int = 0
    broken: bool = False


@functools.cache
def share_groups() -> None:
    """The same process groups for all models of a world that lie alike: each group of its own would cost threads."""
    kept: dict[Any, tuple[Any, Any]] = {}
    prepare, leave = ModelMesh.prepare, ModelMesh.leave

    def shared(self: ModelMesh) -> None:
        if self._whole is not None or not self.axes or self._groups:
            return prepare(self)
        key = tuple(self.ranks), tuple(a.ranks for a in self.axes)
        if key not in kept:
            prepare(self)
            kept[key] = dict(self._groups), self._control
        self._groups.update(kept[key][0])
        self._control = kept[key][1]

    def left(self: ModelMesh) -> None:
        kept.clear()
        leave(self)

    ModelMesh.prepare, ModelMesh.leave = shared, left  # type: ignore[method-assign]
    engines.init_device_mesh = functools.cache(engines.init_device_mesh)


def placed(scene: Scene) -> engines.Placed:
    """The scene's net under its engine; the last ones are kept."""
    if scene not in _placed:
        if len(_placed) >= 8:
            _placed.pop(next(iter(_placed)))
        net = fuzz_models.make(scene)
        if scene.engine == "ddp_tp":  # a forward takes sharded parameters out of parameters(): torch's own doing
            return engines.place(scene.engine, net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a plan names modules that not every net has
            _placed[scene] = engines.Placed(net) if scene.engine == "solo" else engines.place(scene.engine, net)
    return _placed[scene]


def run_case(case: Case) -> Outcome:
    share_groups()
    outcome = Outcome()
    oracle = Oracle(case).run()
    run = Run(case, oracle, outcome)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.all()
    except FlexModelError as error:
        outcome.refused.append(f"{type(error).__name__}: {error}")
        outcome.broken = True
    except Exception:
        outcome.problems.append(traceback.format_exc())
    outcome.broken = outcome.broken or bool(outcome.problems)
    if case.scene.engine == "solo" and outcome.broken:
        _placed.clear()
    if run.fm is not None:
        run.fm.restore()
    return outcome


def fresh(model: nn.Module) -> None:
    """No gradients: also none on the shards, where FSDP2 has left parameters whole after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    zero(model)


class Run:
    def __init__(self, case: Case, oracle: Oracle, outcome: Outcome) -> None:
        self.case, self.scene, self.oracle, self.outcome = case, case.scene, oracle, outcome
        self.placed = placed(case.scene)
        self.fm: FlexModel | None = None
        self.call = 0
        self.input_grads = 0
        self.outputs: list[Any] = []
        self.leaves: list[list[Tensor]] = []  # of the inputs of a round
        self.acts: dict[int, list[Any]] = {}
        self.used: dict[int, int] = {}  # how many values of an attached capture are in a loss
        self.number = 0

    def all(self) -> None:
        if self.case.bitwise and self.case.only_reads:
            before = self._bits(None)
            after = self._bits(self._hooked)
            if len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                self.outcome.problems.append("reading changed a bit of an output or a gradient")
        else:
            self._hooked()
        self._compare()

    def _bits(self, run: Any) -> list[Tensor]:
        """All outputs and gradients of a run, as this rank has them."""
        fresh(self.placed.model)
        self.outputs, self.call = [], 0
        if run is None:
            for now in self.case.rounds:
                if not now.keep:
                    fresh(self.placed.model)
                backwards(now, functools.partial(self._forward, self.placed.model, now), self.call)
        else:
            run()
        outputs = [t for o in self.outputs for _, t in fuzz_models.leaves(o)]
        grads = [p.grad for p in self.placed.model.parameters() if p.grad is not None]
        return [t.clone() for t in (*outputs, *(g.to_local() if isinstance(g, DTensor) else g for g in grads))]

    def _forward(self, model: nn.Module, now: Round, call: int, **keywords: Any) -> Tensor:
        scene = self.scene
        ids, more = fuzz_models.inputs(scene, call)
        rows = slice(sum(scene.batches[: self.placed.index]), sum(scene.batches[: self.placed.index + 1]))
        ids, more = ids[rows], None if more is None else {k: v[rows] for k, v in more.items()}
        leaves = [t.requires_grad_(now.backward != "") for t in (ids, *(more or {}).values()) if t.is_floating_point()]
        output = model(ids, **keywords) if more is None else model(ids, more, **keywords)
        self.leaves.append(leaves)
        self.call += 1
        self.outputs.append(
            fuzz_models.replaced(output, [engines.whole(t).detach().clone() for _, t in fuzz_models.leaves(output)])
        )
        if not now.backward:
            return torch.zeros(())
        return engines.whole(fuzz_models.loss(output)) + beside(self._attached())

    def _attached(self) -> list[Tensor]:
        """What captures have handed out with its graph in this forward."""
        found = []
        for i, blocks in self.acts.items():
            hook, acts = self.case.hooks[i], blocks[-1]
            if hook.attached and hook.rounds[0] <= self.number <= hook.rounds[1]:
                calls = acts.calls(hook.name)
                found += calls[self.used.get(id(acts), 0) :]
                self.used[id(acts)] = len(calls)
        return found

    # -- with hooks --------------------------------------------------------------------------------------------
    def _hooked(self) -> None:
        case, model = self.case, self.placed.model
        fresh(model)
        self.outputs, self.call, self.leaves = [], 0, []
        self.output: dict[Any, list[Any]] = {}
        fm = self.fm = FlexModel(model, self.output, deliver=case.deliver)  # type: ignore[arg-type]
        self.parameters = dict(fm.named_parameters())
        for name, module in trainables(self.scene).items():
            fm.register_trainable_module(name, module)
        handles: dict[int, Any] = {}
        for number, now in enumerate(case.rounds):
            self.number = number
            for i in [i for i in handles if case.hooks[i].rounds[1] < number]:
                handles.pop(i).remove()
            for i, hook in case.at(number):
                if hook.via == "register" and i not in handles:
                    handles[i] = self._register(fm, hook)
            if not now.keep:
                fresh(fm)
                for parameter in self.parameters.values():  # those that torch has taken out of parameters(), too
                    parameter.grad = None
            self.leaves = []
            with ExitStack() as stack:
                for i, hook in case.at(number):
                    if hook.via != "register":
                        entered = stack.enter_context(self._block(fm, hook))
                        if hook.via == "capture":
                            self.acts.setdefault(i, []).append(entered)
                keywords: dict[str, Any] = {}
                chosen = nullcontext()
                if now.groups is not None and now.in_call:
                    keywords = {"groups": now.groups, "complement": now.complement}
                elif now.groups is not None:
                    chosen = fm.groups(now.groups, complement=now.complement)
                stack.enter_context(chosen)
                backwards(now, functools.partial(self._forward, fm, now, **keywords), self.call)
            fm.flush()
            self._check_gradients(number, fm)
        for handle in handles.values():
            handle.remove()

    def _function(self, hook: Hook, **more: Any) -> dict[str, Any]:
        return {
            "unpack_idx": hook.idx,
            "select": fuzz_edits.selection(hook.select),
            "run": hook.run,
            "axes": hook.axes,
            "random": hook.edit == "random",
            **more,
        }

    def _register(self, fm: FlexModel, hook: Hook) -> Any:
        edit = fuzz_edits.editor(hook.edit) if hook.edit else None
        made = HookFunction(hook.name, editing_function=edit, **self._function(hook))
        register = {
            "forward": fm.register_forward_hook,
            "forward_pre": fm.register_forward_pre_hook,
            "full_backward": fm.register_full_backward_hook,
            "full_backward_pre": fm.register_full_backward_pre_hook,
            "tensor": fm.register_hook,
        }[hook.kind]
        handle = register(made)
        for group in hook.groups:
            fm.update_hook_groups(made, group)
        return handle

    def _block(self, fm: FlexModel, hook: Hook) -> Any:
        kind: Any = hook.kind
        if hook.via == "edit":
            return fm.edit(hook.name, fuzz_edits.editor(hook.edit), hook_type=kind, **self._function(hook))
        return fm.capture(
            hook.name,
            hook_type=kind,
            unpack_idx=hook.idx,
            select=fuzz_edits.selection(hook.select),
            deliver=hook.deliver,  # type: ignore[arg-type]
            grad=hook.grad,
            detach=not hook.attached,
        )

    # -- comparing ---------------------------------------------------------------------------------------------
    def _same(self, label: str, got: Any, want: Any, scale: float = 1.0) -> None:
        self.outcome.values += 1
        if not isinstance(got, Tensor) or isinstance(want, type(None)):
            self.outcome.problems.append(f"{label}: {type(got).__name__} for {type(want).__name__}")
            return
        got = got.detach()
        if got.shape != want.shape or got.dtype != want.dtype:
            self.outcome.problems.append(
                f"{label}: {got.dtype} {tuple(got.shape)} for {want.dtype} {tuple(want.shape)}"
            )
            return
        if not got.numel():
            return
        relative, absolute = TOLERANCE[self.scene.dtype]
        apart = float((got.double() - want.double()).abs().max())
        if not apart <= relative * float(want.double().abs().max()) + absolute * scale:
            self.outcome.problems.append(f"{label}: off by {apart:.3g} of {float(want.double().abs().max()):.3g}")

    def _check_gradients(self, number: int, fm: FlexModel) -> None:
        want = self.oracle.grads[number]
        mine = parity.full_gradients(fm, self.parameters)
        for name, grad in want.items():
            if not name.startswith("trainable_modules."):
                self._same(f"gradient of {name} after round {number}", mine.get(name), grad)
        for name, parameter in fm.trainable_modules.named_parameters():
            wanted = want.get(f"trainable_modules.{name}")
            if wanted is not None:
                got = None if parameter.grad is None else engines.whole(parameter.grad)
                self._same(f"gradient of {name} after round {number}", got, wanted)
        parts, index = len(self.scene.batches), self.placed.index
        start, size = sum(self.scene.batches[:index]), self.scene.batches[index]
        for leaves in self.leaves:
            wanted_grads = self.oracle.input_grads[self.input_grads]
            self.input_grads += 1
            for i, wanted_grad in enumerate(wanted_grads):
                got = leaves[i].grad
                if wanted_grad is not None:
                    self._same(f"gradient of input {i}", got, wanted_grad[start : start + size] * parts, parts)
                elif got is not None and got.any():
                    self.outcome.problems.append(f"gradient of input {i}, which an edit has cut off")

    def _compare(self) -> None:
        for call, (got, want) in enumerate(zip(self.outputs, self.oracle.outputs, strict=True)):
            local = fuzz_models.part(self.scene, want, self.placed.index)
            kinds = ["x", *fuzz_models.kinds(self.scene.output or ("const", None))]
            pairs = zip(kinds, fuzz_models.leaves(got), fuzz_models.leaves(local), strict=True)
            for kind, (path, a), (_, b) in pairs:
                if kind == "sum" and len(self.scene.batches) > 1:
                    continue  # over this rank's samples here
                self._same(f"output {path} of call {call}", a, b)
        seen = dict(self.oracle.seen)
        self._compare_output({key: v for (sink, key), v in seen.items() if sink == "out"})
        for number, blocks in self.acts.items():
            hook = self.case.hooks[number]
            for gradient in (False, True) if hook.grad else (False,):
                sink = (number, "grad") if gradient else number
                wanted = {key: v for (s, key), v in seen.items() if s == sink}
                self._compare_capture(hook, blocks, wanted, gradient)

    def _compare_output(self, want: dict[Any, list[Tensor]]) -> None:
        there = self.case.deliver != "main" or self.scene.engine == "solo" or dist.get_rank() == 0
        wanted = want if there else {}
        for key in [k for k in self.output if k not in wanted and self._ties]:
            del self.output[key]
        if set(self.output) != set(wanted):
            self.outcome.problems.append(
                f"output_ptr has {sorted(map(str, self.output))} for {sorted(map(str, wanted))}"
            )
            return
        for key, values in wanted.items():
            self._lists(f"output_ptr[{key!r}]", self.output[key], values, self.case.deliver)

    def _compare_capture(self, hook: Hook, blocks: list[Any], wanted: dict[Any, list[Tensor]], gradient: bool) -> None:
        word = "grads" if gradient else "calls"
        away = hook.deliver == "main" and self.scene.engine != "solo" and dist.get_rank() != 0
        for key, values in wanted.items():
            got: list[Any] = []
            for acts in blocks:
                try:
                    got += getattr(acts, word)(key)
                except DeliveryError as error:
                    if not away and len(blocks) == 1:
                        self.outcome.problems.append(f"{word} of {key!r}: {error}")
                        return
                except NameNotFoundError as error:  # in a block that nothing fired in, of several
                    if not isinstance(key, Site) or len(blocks) == 1:
                        self.outcome.problems.append(f"{word} of {key!r}: {error}")
                        return
                except FlexModelError as error:
                    self.outcome.refused.append(f"{type(error).__name__}: {error}")
                    return
            self._lists(f"{word} of {key!r} ({hook.kind})", got, [] if away else values, hook.deliver)
        extra = {k for acts in blocks for k in (acts._grads if gradient else acts._values).values} - set(wanted)
        if extra and not self._ties:
            self.outcome.problems.append(f"{word} has {extra}, and the oracle does not")

    @property
    def _ties(self) -> bool:
        """Whether there may be gradients where one process has none: what an edit cuts off stays tied to the graph, so
        that collectives of the backward meet."""
        return self.scene.engine != "solo" and any(h.edit in ("constant", "cut") for h in self.case.hooks)

    def _tied_out(self, values: list[Any]) -> list[Any]:
        """Without the zero gradients that come of it."""
        if not self._ties:
            return values
        plain = [v[0] if isinstance(v, Parts) else v.to_local() if isinstance(v, DTensor) else v for v in values]
        return [v for v, p in zip(values, plain, strict=True) if p.any()]

    def _lists(self, label: str, got: list[Any], want: list[Tensor], deliver: str) -> None:
        got = got if len(got) == len(want) else self._tied_out(got)
        if len(got) != len(want):
            self.outcome.problems.append(f"{label}: {len(got)} calls for {len(want)}")
            return
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if deliver == "local" and self.scene.engine != "solo":
                self._local(f"{label}, call {i}", a, b)
            else:
                self._same(f"{label}, call {i}", a, b)

    def _uncounted(self, want: Tensor, shape: torch.Size) -> bool:
        """Whether ranks have other numbers of rows than ``chunk`` would give them, which a DTensor cannot say."""
        sizes = self.scene.batches
        for mine, all_ in zip(shape, want.shape, strict=True):
            if mine * sum(sizes) == all_ * sizes[self.placed.index]:
                rows = all_ // sum(sizes)
                return [rows * n for n in sizes] != [len(c) for c in torch.arange(all_).chunk(len(sizes))]
        return False

    def _part(self, want: Tensor, shape: torch.Size) -> Tensor:
        """What this rank has of the whole, by the dims in which it has less."""
        sizes, index = self.scene.batches, self.placed.index
        for dim, (mine, all_) in enumerate(zip(shape, want.shape, strict=True)):
            if mine * sum(sizes) == all_ * sizes[index]:
                rows = all_ // sum(sizes)
                want = want.narrow(dim, rows * sum(sizes[:index]), rows * sizes[index])
            elif mine != all_:
                want = want.chunk(2, dim)[dist.get_rank() % 2]
        return want

    def _local(self, label: str, got: Any, want: Tensor) -> None:
        """A DTensor of the global shape, with this rank's part in it; or the part, where a DTensor cannot hold it."""
        if isinstance(got, Parts) and len(got) == 1 and self._uncounted(want, got[0].shape):
            self._same(label, got[0], self._part(want, got[0].shape))
            return
        if not isinstance(got, DTensor) or isinstance(got, Parts) or got.shape != want.shape:
            shape = tuple(getattr(got, "shape", ()))
            self.outcome.problems.append(f"{label}: {type(got).__name__} {shape} for {tuple(want.shape)}, locally")
            return
        names, data = got.device_mesh.mesh_dim_names or (), False
        for name, placement, index in zip(names, got.placements, got.device_mesh.get_coordinate() or (), strict=True):
            if isinstance(placement, Partial):
                return
            if not isinstance(placement, Shard):
                continue
            if name == "tp":
                want = want.chunk(got.device_mesh[name].size(), placement.dim)[index]
            elif not data:
                data = True  # several data axes part one dim together
                rows = want.shape[placement.dim] // sum(self.scene.batches)
                start = rows * sum(self.scene.batches[: self.placed.index])
                want = want.narrow(placement.dim, start, rows * self.scene.batches[self.placed.index])
        self._same(label, got.to_local(), want)
