"""``Finder``: from a component's general name to the module, the side of it and the heads that it is in this model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn

from flex_model.components.decoder import Decoder, Layer
from flex_model.components.heads import Chosen, FlatHeads, Heads
from flex_model.components.place import COMPONENTS, IN_LAYERS, WITH_HEADS, Place, Spot, Sum
from flex_model.errors import ComponentError

__all__ = ["Finder"]

_OUTSIDE = {
    "embed": ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings.word_embeddings"),
    "pos_embed": ("wpe", "embed_positions", "embeddings.position_embeddings"),
    "ln_final": ("norm", "ln_f", "final_layer_norm", "final_layernorm"),
    "unembed": ("lm_head", "embed_out", "cls.predictions.decoder"),
}
# How queries, keys and values lie in a fused projection is written nowhere but in the attention's own code: one after
# another, or head by head. {model type: (name of the projection, head by head)}
_FUSED = {
    "gpt2": ("c_attn", False),
    "phi3": ("qkv_proj", False),
    "gpt_neox": ("query_key_value", True),
}
_MID = (
    "the residual goes on past this module, so that only what the MLP takes would change, not the stream; "
    "use 'resid_pre', 'attn_out' or 'resid_post'"
)
_INPUT = ("resid_pre", "resid_mid", "z", "mlp_post")  # what is the input of a module

Layers = int | Sequence[int] | range | None


class Finder:
    """Looks up components in one model."""

    def __init__(self, names: Iterable[str], class_of: Callable[[str], str], config: Any) -> None:
        text = getattr(config, "get_text_config", None)
        self.config = config if text is None else text()
        self.decoder = Decoder.find(names, class_of, self.config)

    def at(self, component: str, layer: Layers = None, head: int | Sequence[int] | None = None) -> Place:
        if component not in COMPONENTS:
            raise ComponentError(f"{component!r} is no component; expected one of {', '.join(COMPONENTS)}.")
        if head is not None and component not in WITH_HEADS:
            raise ComponentError(f"{component!r} has no heads; head= goes with {', '.join(WITH_HEADS)}.")
        if component not in IN_LAYERS:
            if layer is not None:
                raise ComponentError(f"{component!r} is in no layer; leave out layer={layer!r}.")
            return Place(component, (self._outside(component),))
        found, missing = [], None
        for index in self._layers(layer):
            try:
                found.append(self._in_layer(component, index, head))
            except ComponentError as error:  # a mixture has layers of both kinds
                if layer is not None:
                    raise
                missing = missing or error
        if missing is not None and not found:
            raise missing
        return Place(component, tuple(found))

    def _layers(self, layer: Layers) -> list[int]:
        count = self.decoder.count
        asked = list(range(count)) if layer is None else _numbers(layer)
        wrong = [i for i in asked if not _is_one_of(i, range(-count, count))]
        if wrong or not asked:
            raise ComponentError(
                f"there is no layer {wrong[0]!r}; the model has {count}, 0 to {count - 1}, or counted from the end "
                f"-1 to -{count}."
                if wrong
                else "layer= names no layer; None stands for all."
            )
        return list(dict.fromkeys(i % count for i in asked))

    def _outside(self, component: str) -> Spot:
        name = self.decoder.outside(*_OUTSIDE[component])
        if name is None:
            rotary = component == "pos_embed" and self.decoder.outside("rotary_emb") is not None
            why = "positions are rotary, inside attention" if rotary else f"no module {_either(_OUTSIDE[component])}"
            raise ComponentError(f"{self.decoder.class_name} has no {component!r}: {why} beside its layers.")
        return Spot(f"@{component}", name, "forward")

    # -- within a layer ----------------------------------------------------------------------------------------
    def _in_layer(self, component: str, index: int, head: int | Sequence[int] | None) -> Spot:
        layer = self.decoder.layer(index)
        side: Literal["forward", "forward_pre"] = "forward_pre" if component in _INPUT else "forward"
        key = f"@{component}.{index}"
        if component in WITH_HEADS:
            spot = Spot(key, "", side)
            return self._of_heads(component, layer, spot, head)
        spot = Spot(key, self._module(component, layer), side)
        if component in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out") and not layer.after_sums:
            spot = replace(spot, sum=self._sum(layer))
        return replace(spot, read_only=_MID) if component == "resid_mid" else spot

    def _module(self, component: str, layer: Layer) -> str:
        """The module whose input or output a component is."""
        if component in ("resid_pre", "resid_mid", "resid_post", "ln1", "ln2") and layer.after_sums:
            self._lacks(component, layer, "its norms come after the sums, so that there is no residual stream")
        if component in ("mlp_pre", "mlp_post") and layer.experts:
            inside = f"{layer.mlp}.experts.act_fn"
            self._lacks(component, layer, f"its MLP is a mixture of experts; capture {inside!r} and take acts.rows")
        if component == "resid_mid":
            return self._mid(layer)
        found = {
            "resid_pre": lambda: layer.name,
            "resid_post": lambda: layer.name,
            "ln1": lambda: layer.ln1,
            "ln2": lambda: layer.ln2,
            "attn_out": lambda: layer.after_attention or self._attention_out(layer),
            "mlp_out": lambda: layer.after_mlp or layer.mlp,
            "mlp_pre": lambda: layer.into_mlp,
            "mlp_post": lambda: layer.out_of_mlp,
            "router": lambda: layer.router,
        }[component]()
        if found is None:
            self._lacks(component, layer, f"nothing there is called as what gives {component} in other models")
        return found

    def _lacks(self, component: str, layer: Layer, why: str) -> NoReturn:
        raise ComponentError(f"{self.decoder.class_name} has no {component!r} in {layer.name!r}: {why}.")

    def _attention_out(self, layer: Layer) -> str | None:
        return layer.mixes if layer.after_sums else layer.attention

    def _mid(self, layer: Layer) -> str:
        found = layer.ln2 or (layer.mlp if layer.after_attention else None)
        if layer.side_by_side or found is None:
            self._lacks(
                "resid_mid", layer, "attention and MLP both take the layer's input, so there is nothing between"
            )
        return found

    def _sum(self, layer: Layer) -> Sum:
        mid = None if layer.side_by_side else self._mid(layer)
        return Sum(layer.name, self._module("attn_out", layer), self._module("mlp_out", layer), mid)

    # -- heads -------------------------------------------------------------------------------------------------
    def _of_heads(self, component: str, layer: Layer, spot: Spot, head: int | Sequence[int] | None) -> Spot:
        count, size = self._sizes(component, layer)
        chosen = _chosen(component, head, count, self._count("z"))
        if chosen is not None:
            spot = replace(spot, key=f"{spot.key}.{_written(chosen)}", some_heads=True)
        if component == "pattern":
            return self._pattern(layer, spot, count, chosen)
        if component == "z":
            name, heads = layer.mixes, FlatHeads(count, size, chosen=chosen)
        else:
            name, heads = layer.projection(component), FlatHeads(count, size, chosen=chosen)
            if name is None and layer.fused is not None:
                name, heads = layer.fused, self._in_fused(component, layer, count, size, chosen)
        if name is None:
            self._lacks(component, layer, "no projection there is called as those of other models")
        return replace(spot, name=name, select=heads)

    def _pattern(self, layer: Layer, spot: Spot, count: int, chosen: Chosen) -> Spot:
        used = getattr(self.config, "_attn_implementation", None)
        if used != "eager":
            raise ComponentError(
                f"attention probabilities do not exist under attn_implementation={used!r}; load the model with "
                f"attn_implementation='eager', or call set_attn_implementation('eager').",
                page="attention-unknown",
            )
        if layer.inside is None:
            self._lacks("pattern", layer, "no attention found")
        select = None if chosen is None else Heads(count, chosen=chosen)
        return replace(spot, name=layer.inside, unpack_idx=1, select=select)

    def _count(self, component: str) -> int:
        count = getattr(self.config, "num_attention_heads", None)
        if not isinstance(count, int):
            raise ComponentError(
                f"{self.decoder.class_name} has no config with num_attention_heads, so heads cannot be told apart; "
                f"name its modules themselves."
            )
        if component in ("k", "v"):
            few = getattr(self.config, "num_key_value_heads", None)
            return count if few is None else int(few)
        return count

    def _sizes(self, component: str, layer: Layer) -> tuple[int, int]:
        """How many heads, and how wide."""
        config, count = self.config, self._count(component)
        size = getattr(config, "head_dim", None)
        if layer.first("self_attn.kv_b_proj"):  # a latent for all heads is widened to keys and values at once
            size = config.v_head_dim
        return count, int(size) if size else int(config.hidden_size) // self._count("z")

    def _in_fused(self, component: str, layer: Layer, count: int, size: int, chosen: Chosen) -> FlatHeads:
        assert layer.fused is not None
        own, by_head = _FUSED.get(getattr(self.config, "model_type", ""), ("", False))
        if own != layer.fused.rpartition(".")[2]:
            self._lacks(
                component, layer, f"the order of queries, keys and values in {layer.fused!r} is not known; capture that"
            )
        which = "qkv".index(component)
        if by_head:
            return FlatHeads(count, size, chosen=chosen, stride=3 * size, inner=which * size)
        widths = [self._count(c) * size for c in "qkv"]
        return FlatHeads(count, size, chosen=chosen, width=sum(widths), start=sum(widths[:which]))


def _chosen(component: str, head: int | Sequence[int] | None, count: int, queries: int) -> Chosen:
    if head is None:
        return None
    asked = _numbers(head)
    wrong = [h for h in asked if not _is_one_of(h, range(count))]
    if wrong or not asked or len(set(asked)) < len(asked):
        shared = (
            f" key-value heads, each for {queries // count} of the {queries} query heads" if count < queries else ""
        )
        what = f"no head {wrong[0]!r}" if wrong else f"no such choice of heads as {head!r}"
        raise ComponentError(f"{component!r} has {what}: it has {count}{shared or ' heads'}.", page="head-unknown")
    return asked[0] if not isinstance(head, Iterable) else tuple(asked)


def _numbers(given: Any) -> list[Any]:
    """One number or several, as Python's own where they are whole (NumPy's too)."""
    several = list(given) if isinstance(given, Iterable) else [given]
    return [x if isinstance(x, bool) or not hasattr(x, "__index__") else operator.index(x) for x in several]


def _is_one_of(number: Any, known: range) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number in known


def _written(chosen: int | tuple[int, ...]) -> str:
    return str(chosen) if isinstance(chosen, int) else "+".join(map(str, chosen))


def _either(names: Sequence[str]) -> str:
    return f"called {', '.join(names[:-1])} or {names[-1]}"
