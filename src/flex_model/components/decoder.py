"""``Decoder``: where a transformer keeps its layers, and ``Layer``: which module does what in one of them.

Both are found from the names of modules, which are known on every rank and for every stage of a pipeline. No class is
looked up: a list whose members hold attention is the stack of layers, and in it a part is what its name says in any of
the families that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flex_model.errors import ComponentError

__all__ = ["Decoder", "Layer"]

_ATTENTION = ("self_attn", "attn", "self_attention", "attention")
_INSIDE = ("attention.self", "attn.attention", *_ATTENTION)  # what holds the projections, and gives probabilities
_MIXES = ("attention.output.dense", *(f"{i}.{o}" for i in _INSIDE for o in ("o_proj", "out_proj", "c_proj", "dense")))
_PROJECTIONS = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
_FUSED = ("c_attn", "query_key_value", "qkv_proj")
_LN1 = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_LN2 = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm")
_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_INTO_MLP = ("gate_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "up_proj")
_OUT_OF_MLP = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")


@dataclass(frozen=True)
class Layer:
    """One layer's modules by what they do, as clean names; None where there is no such module."""

    name: str
    names: frozenset[str]
    config: Any

    def first(self, *paths: str) -> str | None:
        """The first of these paths below the layer that exists."""
        return next((n for p in paths if (n := f"{self.name}.{p}") in self.names), None)

    @property
    def attention(self) -> str | None:
        return self.first(*_ATTENTION)

    @property
    def inside(self) -> str | None:
        return self.first(*_INSIDE)

    @property
    def mixes(self) -> str | None:
        """The projection that takes all heads' outputs."""
        return self.first(*_MIXES)

    def projection(self, which: str) -> str | None:
        return self.first(*(f"{i}.{p}" for i in _INSIDE for p in _PROJECTIONS[which]))

    @property
    def fused(self) -> str | None:
        """The projection that gives queries, keys and values at once."""
        return self.first(*(f"{i}.{p}" for i in _INSIDE for p in _FUSED))

    # -- norms -------------------------------------------------------------------------------------------------
    @property
    def after_sums(self) -> bool:
        """Whether norms come after the sums, so that no stream passes the layers unchanged (BERT)."""
        norms = self.first("attention.output.LayerNorm")
        return norms is not None or getattr(self.config, "do_layer_norm_before", True) is False

    @property
    def after_mlp(self) -> str | None:
        """The norm of what the MLP adds (Gemma 2, OLMo 2)."""
        return self.first(*_AFTER_MLP)

    @property
    def after_attention(self) -> str | None:
        """The norm of what attention adds."""
        if self.after_mlp is None:
            return None
        own = self.first("post_self_attn_layernorm")
        alone = self.first("pre_feedforward_layernorm") is not None or self.ln1 is None
        return own or (self.first("post_attention_layernorm") if alone else None)

    @property
    def ln1(self) -> str | None:
        return self.first(*_LN1)

    @property
    def ln2(self) -> str | None:
        found = self.first(*_LN2)
        return None if found == self.after_attention else found

    @property
    def side_by_side(self) -> bool:
        """Whether attention and MLP take the same input (Phi, GPT-J, Cohere, most of GPT-NeoX)."""
        told = [getattr(self.config, k, None) for k in ("use_parallel_residual", "parallel_attn")]
        return any(told) or (self.ln2 is None and self.after_attention is None)

    # -- MLP ---------------------------------------------------------------------------------------------------
    @property
    def mlp(self) -> str | None:
        """What gives the MLP's output: the MLP, or its last projection where the layer holds that itself (OPT)."""
        return self.first(*_MLP, "fc2") or (self.first("output.dense") if self.after_sums else None)

    @property
    def experts(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return self.mlp is not None and f"{self.mlp}.experts" in self.names

    @property
    def router(self) -> str | None:
        return self.first(*(f"{m}.{r}" for m in _MLP for r in ("gate", "router"))) if self.experts else None

    @property
    def into_mlp(self) -> str | None:
        own = self.first("fc1", "intermediate.dense")
        return own or self.first(*(f"{m}.{p}" for p in _INTO_MLP for m in _MLP))

    @property
    def out_of_mlp(self) -> str | None:
        own = self.first("fc2") or (self.first("output.dense") if self.after_sums else None)
        return own or self.first(*(f"{m}.{p}" for p in _OUT_OF_MLP for m in _MLP))


@dataclass(frozen=True)
class Decoder:
    """A model's stack of layers; ``stack`` is the name of the list that holds them.

    >>> names = ["", "wte", "h", "h.0", "h.0.attn", "h.0.attn.c_proj", "ln_f", "lm_head"]
    >>> Decoder.find(names, lambda name: "Module", None).layer(0).mixes
    'h.0.attn.c_proj'
    """

    stack: str
    count: int
    names: frozenset[str]
    config: Any
    class_name: str

    @classmethod
    def find(cls, names: Iterable[str], class_of: Callable[[str], str], config: Any) -> Decoder:
        known = frozenset(names)
        stacks: dict[str, set[int]] = {}
        for name in known:
            stack, _, index = name.rpartition(".")
            if index.isdigit() and any(f"{name}.{a}" in known for a in _ATTENTION):
                stacks.setdefault(stack, set()).add(int(index))
        model = class_of("")
        if len(stacks) != 1:
            several = f"several stacks of layers, {', '.join(map(repr, sorted(stacks)))}"
            nothing = f"no list of modules that hold one called {', '.join(_ATTENTION)}"
            raise ComponentError(
                f"{model} is not known well enough for general names: it has {several if stacks else nothing}; "
                f"expected one stack of layers. Name its modules themselves (fm.wrapped_module_names)."
            )
        (stack, indices) = stacks.popitem()
        members = {n for n in known if n.rpartition(".")[0] == stack and n.rpartition(".")[2].isdigit()}
        if len(members) != len(indices) or indices != set(range(len(indices))):
            raise ComponentError(
                f"{model} is not known well enough for general names: not every member of {stack!r} holds attention. "
                f"Name its modules themselves (fm.wrapped_module_names)."
            )
        return cls(stack, len(indices), known, config, model)

    def layer(self, index: int) -> Layer:
        return Layer(f"{self.stack}.{index}" if self.stack else str(index), self.names, self.config)

    @cached_property
    def _around(self) -> list[str]:
        """What holds the stack, from inside."""
        parts = self.stack.split(".")[:-1]
        return ["".join(f"{p}." for p in parts[:n]) for n in range(len(parts), -1, -1)]

    def outside(self, *paths: str) -> str | None:
        """The first of these paths that exists beside the stack, or beside what holds it."""
        return next((n for around in self._around for p in paths if (n := around + p) in self.names), None)
