"""Finding tensors in any value, naming them, and putting others in their place."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from flex_model.trees import copy_tree, find_leaves, input_leaves, replace_leaves, resolve_index, tensors

Pair = namedtuple("Pair", "left right")


class Named(NamedTuple):
    hidden: Tensor
    extra: Tensor | None


@dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    value: Tensor
    inner: Any = None


@dataclass
class Plain:
    value: Tensor
    count: int = 0


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


VALUES = [
    (t(1), [""]),
    ((t(1), (t(2), None), 3), ["0", "1.0"]),
    ([t(1), "x", t(2)], ["0", "2"]),
    ({"b": t(1), "a": {"c": t(2)}}, ["b", "a.c"]),
    (OrderedDict(z=t(1), y=t(2)), ["z", "y"]),
    (Pair(t(1), t(2)), ["left", "right"]),
    (Named(t(1), None), ["hidden"]),
    (Frozen("x", t(1), Plain(t(2))), ["value", "inner.value"]),
    ((Plain(t(1), 3), {"k": Frozen("y", t(2))}), ["0.value", "1.k.value"]),
    (
        CausalLMOutputWithPast(logits=t(1), hidden_states=(t(2), t(3))),
        ["logits", "hidden_states.0", "hidden_states.1"],
    ),
    (nn.Parameter(t(1)), [""]),
    (None, []),
    ((1, "a", None), []),
]


@pytest.mark.parametrize(("value", "paths"), VALUES)
def test_leaves_in_flattening_order_with_their_paths(value, paths):
    leaves = find_leaves(value)
    assert [x.path for x in leaves] == paths
    assert [x.index for x in leaves] == list(range(len(paths)))
    assert all(a is b.tensor for a, b in zip(tensors(value), leaves, strict=True))


@pytest.mark.parametrize(("value", "paths"), VALUES)
def test_every_leaf_can_be_replaced_and_nothing_else_changes(value, paths):
    before = [x.clone() for x in tensors(value)]
    for index in range(len(paths)):
        out = replace_leaves(value, {index: t(9, 9)})
        assert type(out) is (Tensor if isinstance(value, nn.Parameter) else type(value))
        found = tensors(out)
        assert torch.equal(found[index], t(9, 9))
        assert all(a is b for i, (a, b) in enumerate(zip(found, tensors(value), strict=True)) if i != index)
    assert all(torch.equal(a, b) for a, b in zip(tensors(value), before, strict=True))
    assert replace_leaves(value, {}) is value


def test_what_is_no_tensor_is_kept():
    value = (Frozen("x", t(1)), 5, {"s": "text", "v": t(2)})
    out = replace_leaves(value, {1: t(3)})
    assert out[0] is value[0] and out[1] == 5 and out[2]["s"] == "text"


def test_a_model_output_stays_one():
    value = CausalLMOutputWithPast(loss=t(0), logits=t(1), hidden_states=(t(2),))
    out = replace_leaves(value, {1: t(5)})
    assert isinstance(out, CausalLMOutputWithPast)
    assert out.loss is value.loss and torch.equal(out["logits"], t(5)) and torch.equal(out[1], t(5))


def test_a_cache_is_opened_and_written_in_place():
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    leaves = find_leaves({"past": cache})
    assert [x.path for x in leaves] == ["past.0.keys", "past.0.values"]
    out = replace_leaves({"past": cache}, {1: torch.full((1, 2, 3, 4), 7.0)})
    assert out["past"] is cache and (cache.layers[0].values == 7).all() and (cache.layers[0].keys == 1).all()


@pytest.mark.parametrize(
    ("index", "paths"),
    [
        (0, ["h"]),
        (1, ["o.a"]),
        (-1, ["o.b"]),
        (3, []),
        (-4, []),
        ("h", ["h"]),
        ("o", ["o.a", "o.b"]),
        ("o.b", ["o.b"]),
        ("zzz", []),
        ((2, "h"), ["o.b", "h"]),
        ("all", ["h", "o.a", "o.b"]),
    ],
)
def test_resolve_index(index, paths):
    leaves = find_leaves({"h": t(1), "o": {"a": t(2), "b": t(3)}})
    assert [x.path for x in resolve_index(leaves, index)] == paths


def test_inputs_have_the_names_of_the_arguments():
    class Module(nn.Module):
        def forward(self, x, pair, *rest, mask=None, **more):
            return x

    args, kwargs = (t(1), (t(2), t(3)), t(4)), {"mask": t(5), "bias": t(6)}
    leaves = input_leaves(Module(), args, kwargs)
    assert [x.path for x in leaves] == ["x", "pair.0", "pair.1", "2", "mask", "bias"]
    assert [float(x.tensor) for x in leaves] == [1, 2, 3, 4, 5, 6]
    assert [x.index for x in leaves] == list(range(6))


def test_a_copy_shares_no_tensor_even_inside_other_objects():
    class Holder:
        def __init__(self) -> None:
            self.tensor, self.module = t(1), nn.Linear(1, 1)

    value = (t(1), {"h": Holder()}, Plain(t(2)))
    out = copy_tree(value, lambda x: x + 10)
    assert float(out[0]) == 11 and float(out[1]["h"].tensor) == 11 and float(out[2].value) == 12
    assert float(value[0]) == 1 and float(value[1]["h"].tensor) == 1 and float(value[2].value) == 2


def test_a_copy_shares_what_cannot_be_copied():
    def numbers():
        yield 1

    module, generator = nn.Linear(1, 1), numbers()
    out = copy_tree((module, generator, t(1)), lambda x: x * 2)
    assert out[0] is module and out[1] is generator and float(out[2]) == 2
