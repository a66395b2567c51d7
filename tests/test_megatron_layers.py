"""Megatron-core's layers by themselves, and parallel layers of a kind that nobody knows."""

from __future__ import annotations

from typing import Any

import megatron_cpu as megatron
import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import Count, relative_error
from parity import compare
from test_megatron import alone, perturbed
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import LayoutError


class Around(nn.Module):
    """A Megatron layer with plain torch before and after it, so that every value has a gradient."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.before(x))


def layer(kind: str, spread: Spread, sharded: bool, **changes: Any) -> nn.Module:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    settings = {"sequence_parallel": changes.pop("sequence_parallel", False)} if sharded else {}
    changes.pop("sequence_parallel", None)
    config = megatron.config(**settings, tensor_model_parallel_size=spread.tp if sharded else 1)
    init = nn.init.xavier_normal_
    if kind == "embedding":
        return VocabParallelEmbedding(64, 32, init_method=init, config=config, **changes)
    if kind == "column":
        changes = {"bias": True, "gather_output": False, **changes}
        return Around(ColumnParallelLinear(32, 48, config=config, init_method=init, **changes), 32)
    changes = {"bias": True, "input_is_parallel": True, "skip_bias_add": False, **changes}
    return Around(RowParallelLinear(32, 48, config=config, init_method=init, **changes), 32)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "column": ("column", {}),
    "column, gathered": ("column", {"gather_output": True}),
    "column, bias to the caller": ("column", {"skip_bias_add": True}),
    "column, two blocks": ("column", {"stride": 2}),
    "column, gathered and added": ("column", {"gather_output": True, "bias": False}),
    "row": ("row", {"input_is_parallel": False}),
    "row, bias to the caller": ("row", {"input_is_parallel": False, "skip_bias_add": True}),
    "embedding": ("embedding", {}),
    "embedding, scattered": ("embedding", {"reduce_scatter_embeddings": True}),
}


def whole_loss(output: Any, full_width: int = 48) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as sequence
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as features

    value, bias = output if isinstance(output, tuple) else (output, None)
    if value.shape[0] == 3 and value.shape[-1] == 32:  # a scattered embedding
        value = sequence(value, tensor_parallel_output_grad=False)
    if bias is not None:
        value = value + bias
    if value.shape[-1] == full_width // 2:
        value = features(value)
    return value.pow(2).mean()


def _layer(case: str) -> Count:
    spread = Spread(tp=2)
    kind, changes = CASES[case]
    with spread.alone():
        torch.manual_seed(0)
        plain = perturbed(layer(kind, spread, False, **changes))
    sharded = layer(kind, spread, True, **changes)
    megatron.load_part(sharded, plain, spread.tp)
    x = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(4))
    if kind == "embedding":
        x = torch.arange(24).view(4, 6)
    return compare(
        sharded,
        plain,
        lambda m: whole_loss(m(x)),
        alone(spread, lambda m: whole_loss(m(x))),
    )


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    for count in run_world(2, _layer, case):
        print(f"Megatron-core layer, {case}: {count}")
        # what is beside a fused projection and as wide may be made of its blocks, or not
        beside = ["(root).forward[0]", "(root).full_backward_pre[0]"] if "blocks" in case else []
        assert not count.wrong and sorted(r.split(":")[0] for r in count.refused) == beside


# -- what is not known -----------------------------------------------------------------------------------------
class Own(nn.Module):
    """A parallel layer of somebody's own: its parameter has Megatron's mark, and nothing else is known of it."""

    def __init__(self, tp: int, rank: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        full = torch.randn(48, 32) / 6
        self.width = 48 // tp
        self.weight = nn.Parameter(full.chunk(tp)[rank].clone())
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).view(*x.shape[:-1], self.width)


def _own() -> list[Any]:
    spread = Spread(tp=2)
    rank = dist.get_rank()
    x = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(4))
    want = Around(Own(1, 0), 32)
    model = Around(Own(2, rank), 32)
    model.before.load_state_dict(want.before.state_dict())
    out: list[Any] = []
    fm = FlexModel(model)
    with fm.capture("layer", "before") as acts:
        fm(x)
    try:
        acts["layer"]
    except LayoutError as error:
        out.append(str(error))
    full = want(x)
    out.append(relative_error(acts["before"], want.before(x)) < 1e-5)
    with fm.capture("layer", hook_type="forward_pre") as acts:
        fm(x)
    out.append(relative_error(acts["layer"], want.before(x)) < 1e-5)
    out.append(torch.equal(fm.get_module_parameter("layer.weight"), want.layer.weight))
    for word in ({"layout": {"tp": Shard(2)}}, {"expected_shape": (6, 4, 48)}):
        values: dict[str, list[Tensor]] = {}
        other = FlexModel(model, values, deliver="all")
        other.register_forward_hook(HookFunction("layer", **word))  # type: ignore[arg-type]
        other(x)
        out.append(relative_error(values["layer"][0], full) < 1e-5)
        other.restore()
    return [spread.tp, *out]


def test_own_layer() -> None:
    for tp, refusal, *rest in run_world(2, _own):
        assert tp == 2 and rest == [True] * 5
        assert "layer output 0" in refusal and "Own" in refusal and "layout={'tp': Shard(dim)" in refusal


# -- what moves ------------------------------------------------------------------------------------------------
class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _counts() -> list[int]:
    """Collectives of a forward: of the model's own, with a replicated value captured, and with a sharded one."""
    from test_megatron import pair, positions, tokens

    spread = Spread(tp=2)
    sharded, _ = pair(spread, {}, {})
    ids = tokens()
    counts = []
    for names in ((), ("decoder.layers.0",), ("decoder.layers.0.mlp.linear_fc1",)):
        fm = FlexModel(sharded)
        values: dict[str, list[Tensor]] = {}
        fm.output_ptr = values  # type: ignore[assignment]
        for name in names:
            fm.register_forward_hook(HookFunction(name))
        with torch.no_grad():
            for _ in range(2):
                with _Collectives() as seen:
                    fm(ids, positions(ids), None)
        counts.append(len(seen.seen))
        fm.restore()
    return counts


def test_collectives() -> None:
    for own, replicated, gathered in run_world(2, _counts):
        assert replicated == own, "a value that every rank has moves nothing"
        assert own < gathered <= own + 2


# -- kernels that only a GPU has -------------------------------------------------------------------------------
def _kernels_of_a_gpu(model: nn.Module) -> None:
    """Dress Megatron's own layers up as transformer_engine's: their classes, and no way to run without data."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    base = type("Base", (), {"__module__": "transformer_engine.pytorch"})

    def disguise(cls: type, name: str, megatrons: bool) -> type:
        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert not x.is_meta, "a kernel without a meta implementation"
            return cls.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]

        where = "megatron.core.extensions.transformer_engine" if megatrons else "transformer_engine.pytorch"
        bases = (type("TELinear", (cls,), {"__module__": where}), base) if "Linear" in name else (cls, base)
        return type(name, bases, {"forward": forward, "__module__": where, "te_return_bias": False})

    for module in model.modules():
        cls = type(module)
        for kind, name in (
            (ColumnParallelLinear, "TEColumnParallelLinear"),
            (RowParallelLinear, "TERowParallelLinear"),
            (DotProductAttention, "TEDotProductAttention"),
        ):
            if (cls is kind and getattr(module, "weight", None) is not None) or cls is kind is DotProductAttention:
                module.__class__ = disguise(cls, name, True)
        if cls in (nn.RMSNorm, nn.LayerNorm):
            module.__class__ = disguise(cls, cls.__name__, False)
    for parameter in model.parameters():
        if hasattr(parameter, "partition_stride"):
            parameter.partition_stride = 1  # nor do older versions mark gate and up as two blocks


def _as_on_a_gpu() -> Count:
    from test_megatron import loss, pair, positions, tokens

    spread = Spread(tp=2)
    sharded, plain = pair(spread, {"sequence_parallel": True}, {})
    _kernels_of_a_gpu(sharded)
    ids = tokens()
    return compare(
        sharded,
        plain,
        lambda m: loss(m(ids, positions(ids), None)),
        alone(spread, lambda m: loss(m(ids, positions(ids), None))),
    )


def test_layers_of_transformer_engine() -> None:
    for count in run_world(2, _as_on_a_gpu):
        print(f"Megatron-core sp, as if on transformer_engine: {count}")
        # what the real ones have not
        inside = ("core_attention.scale_mask_softmax", "core_attention.attention_dropout")
        assert not count.wrong and all(any(name in r for name in inside) for r in count.refused)


# -- parts of a model by themselves ----------------------------------------------------------------------------
def _layer_over_data() -> list[bool]:
    """A layer that is called with [s, b, h] has its batch in dim 1, on data ranks too."""
    from test_megatron import pair

    spread = Spread(tp=1)
    sharded, plain = pair(spread, {}, {})
    x = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(4))
    mine = x.chunk(2, 1)[dist.get_rank()]
    names = ("mlp", "self_attention.linear_qkv", "self_attention.core_attention")
    want: dict[str, Tensor] = {}
    layer = plain.decoder.layers[0]  # type: ignore[index, union-attr]
    for name in names:
        layer.get_submodule(name).register_forward_hook(
            lambda m, a, o, name=name: want.update({name: o if isinstance(o, Tensor) else o[0]})
        )
    fm = FlexModel(sharded.decoder.layers[0])  # type: ignore[index, union-attr]
    with spread.alone(), torch.no_grad():
        layer(x, attention_mask=None)
    with torch.no_grad(), fm.capture(*names) as acts:
        fm(mine, attention_mask=None)
    return [relative_error(acts[name], want[name]) < 1e-5 for name in names]


def test_layer_over_data_ranks() -> None:
    assert run_world(2, _layer_over_data) == [[True] * 3] * 2
