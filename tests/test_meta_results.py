"""Remembered results of meta operators are those that torch's own meta kernels would give, and are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_world import CountKernels
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flex_model.layout.meta_mode import IntegersAreReal
from flex_model.layout.meta_results import Results, makes_new

aten = torch.ops.aten


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, INTEGERS = _meta(2, 3, 8), _meta(2, 3, dtype=torch.long)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.mm.default, (_meta(4, 8), _meta(8, 2)), {}),
    (aten.mm.default, (_meta(8, 4).t(), nn.Parameter(_meta(8, 2))), {}),
    (aten.add.Tensor, (X, _meta(8)), {"alpha": 2}),
    (aten.add.Tensor, (X.transpose(0, 2), X.transpose(0, 2)), {}),
    (aten.add.Tensor, (INTEGERS, 1), {}),
    (aten.add.Tensor, (INTEGERS, 1.0), {}),
    (aten.add.Tensor, (INTEGERS, True), {}),
    (aten.mean.dim, (X, [-1], True), {}),
    (aten.mean.dim, (X, [-1], False), {}),
    (aten._to_copy.default, (X,), {"dtype": torch.bfloat16}),
    (aten._to_copy.default, (X,), {"dtype": torch.float64}),
    (aten.cat.default, ([X, X], 1), {}),
    (aten.cat.default, ([X, X, X], 1), {}),
    (aten.native_layer_norm.default, (X, [8], _meta(8), None, 1e-5), {}),
    (aten.topk.default, (X, 2), {}),
    (aten._softmax.default, (X, -1, False), {}),
    (aten._unsafe_view.default, (_meta(6, 8), [2, 3, 8]), {}),
    (aten.native_dropout.default, (X, 0.1, False), {}),
]


def _forms(value: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def test_remembered_results_are_torchs() -> None:
    """All cases with one memory, so that one taken for another would show."""
    results = Results()
    for _ in range(2):
        for func, args, kwargs in CASES:
            assert makes_new(func)
            given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            out = results.of(func, args, kwargs)
            assert _forms(out) == _forms(func(*args, **kwargs)), func
            assert func is aten.native_dropout.default or not any(
                a is b for a in pytree.tree_leaves(out) for b in given
            )


def test_what_is_handed_on_is_not_remembered() -> None:
    """Without dropout torch's kernel returns its input, and goes on to."""
    results, x = Results(), _meta(2, 3)
    for _ in range(2):
        assert results.of(aten.native_dropout.default, (x, 0.1, False), {})[0] is x


def test_a_kernel_is_asked_once_a_form() -> None:
    results = Results()
    with CountKernels() as kernels:
        for _ in range(3):
            for width in (8, 16):
                results.of(aten.mm.default, (_meta(4, width), _meta(width, 2)), {})
    assert kernels.asked == {aten.mm.default: 2}


@pytest.mark.parametrize(
    "func", [aten.view.default, aten.t.default, aten.add_.Tensor, aten.set_.source_Tensor, aten.nonzero.default]
)
def test_views_and_writes_are_no_new_tensors(func: Any) -> None:
    assert not makes_new(func)


def test_default_dtype_counts() -> None:
    results = Results()
    args = (_meta(3, dtype=torch.long), 0.5)
    assert results.of(aten.mul.Tensor, args, {}).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert results.of(aten.mul.Tensor, args, {}).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_are_told_each_time() -> None:
    results = Results()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            results.of(aten.mm.default, (_meta(4, 8), _meta(7, 2)), {})


def test_a_model_has_the_same_shapes_as_without() -> None:
    """Views of remembered results, and integers that stay real among them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    real = layer(torch.randn(2, 3, 8))
    with torch.no_grad(), IntegersAreReal(None):
        meta = layer.to("meta")
        out = meta(meta(_meta(2, 3, 8)))
    assert out.shape == real.shape and out.stride() == real.stride() and out.is_meta
