"""The residual stream as parts write to it and read from it: what a head adds, and the gradient of what it takes.

A head writes its slice of the output projection; a part reads the stream through its norm, so that its gradient at the
stream is that at the norm's output, taken back through the norm alone. Whole weights are had layer by layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from flex_model import FlexModel
from flex_model.components.heads import Heads
from flex_model.errors import ComponentError
from flex_model.lens.whole import whole

if TYPE_CHECKING:
    from flex_model.core.captured import Captured

__all__ = ["Layer", "Parts", "Runs", "Stream"]

Parts = Literal["head", "block"]
Nodes = tuple[list[str], Tensor]  # names, and what they write or the gradient of what they read (n, N, D)


class Stream:
    """The places where parts of a model meet its residual stream, attention as heads or as blocks."""

    def __init__(self, fm: FlexModel, parts: Parts) -> None:
        self.fm, self.parts = fm, parts
        self.first, self.last = fm.at("resid_pre", 0), fm.at("resid_post", -1)
        names = ("ln1", "ln2", "attn_out", "mlp_out", *("qkvz" if parts == "head" else ()))
        self.places = {c: fm.at(c) for c in names}
        self.count = len(fm.at("resid_post").keys)
        short = next((c for c, place in self.places.items() if len(place.keys) != self.count), None)
        if short is not None:
            raise ComponentError(f"not every layer has {short!r}, so what writes and reads in each is not known.")
        try:
            fm.at("resid_mid")
            self.side_by_side = False
        except ComponentError:  # attention and MLP read the same
            self.side_by_side = True

    @property
    def writers(self) -> list[Any]:
        heads = [self.places["z"]] if self.parts == "head" else []
        return [self.first, self.places["attn_out"], self.places["mlp_out"], *heads]

    @property
    def readers(self) -> list[Any]:
        heads = [self.places[c] for c in "qkv"] if self.parts == "head" else []
        return [self.places["ln1"], self.places["ln2"], self.last, *heads]

    @property
    def norms(self) -> list[str]:
        return [spot.name for c in ("ln1", "ln2") for spot in self.places[c].spots]


class Runs:
    """What was captured in the clean run and in the corrupted one, as rows (N, ...), N = B * S."""

    def __init__(self, good: Captured, bad: Captured, inputs: Captured, grads: Captured) -> None:
        self._good, self._bad, self._inputs, self._grads = good, bad, inputs, grads

    def change(self, key: str) -> Tensor:
        """Clean less corrupted."""
        return _rows(key, whole(self._good, key)) - self.value(key)

    def value(self, key: str) -> Tensor:
        return _rows(key, whole(self._bad, key))

    def input(self, name: str) -> Tensor:
        """What a norm took."""
        return _rows(name, whole(self._inputs, name))

    def gradient(self, key: str) -> Tensor:
        whole(self._grads, key)  # says so where it is none
        return _rows(key, self._grads.grad(key))  # type: ignore[arg-type]


class Layer:
    """One layer's attention and MLP as nodes."""

    def __init__(self, stream: Stream, runs: Runs, index: int) -> None:
        self.stream, self.runs, self.index = stream, runs, index
        self._matrices: dict[str, Tensor] = {}  # of projections, which may give queries, keys and values at once

    def attention_writes(self) -> Nodes:
        key = f"@attn_out.{self.index}"
        if self.stream.parts == "block":
            return [f"a{self.index}"], self.runs.change(key)[None]
        spot = self.stream.places["z"].spots[self.index]
        mixes = self._module(spot.name)
        self._check(_applied(mixes, self.runs.value(spot.key).flatten(1)), self.runs.value(key), "write")
        change = self.runs.change(spot.key)  # (N, heads, d)
        matrix = _matrix(mixes, change[0].numel()).to(change).unflatten(0, change.shape[1:])  # type: ignore[no-untyped-call]
        names = [f"a{self.index}.h{h}" for h in range(change.shape[1])]
        return names, torch.einsum("nhd,hde->hne", change, matrix)

    def attention_reads(self) -> Nodes:
        norm = f"@ln1.{self.index}"
        if self.stream.parts == "block":
            return [f"a{self.index}"], self._through("ln1", self.runs.gradient(norm)[None])
        names, gradients = [], []
        for which in "qkv":
            found = self._of_heads(which)
            names += [f"a{self.index}.h{h}<{which}>" for h in range(len(found))]
            gradients.append(found)
        read = torch.cat(gradients)
        self._check(read.sum(0), self.runs.gradient(norm), "read")
        return names, self._through("ln1", read)

    def mlp_reads(self) -> Nodes:
        return [f"m{self.index}"], self._through("ln2", self.runs.gradient(f"@ln2.{self.index}")[None])

    def _of_heads(self, which: str) -> Tensor:
        """(heads, N, D): the gradient at the norm's output by way of each head's queries, keys or values."""
        spot = self.stream.places[which].spots[self.index]
        gradient = self.runs.gradient(spot.key)  # (N, heads, d)
        if spot.name not in self._matrices:
            width = self.runs.gradient(f"@ln1.{self.index}").shape[-1]
            self._matrices[spot.name] = _matrix(self._module(spot.name), width).to(gradient)
        assert isinstance(spot.select, Heads)
        weight = spot.select.take(self._matrices[spot.name][None])[0]  # (D, heads, d)
        return torch.einsum("nhd,ehd->hne", gradient, weight)

    def _through(self, norm: str, gradient: Tensor) -> Tensor:
        """Gradients (n, N, D) at the norm's output, at its input."""
        name = self.stream.places[norm].spots[self.index].name
        with torch.enable_grad():
            x = self.runs.input(name).expand(gradient.shape).clone().requires_grad_()
            out = self._module(name).to(x)(x)
            (found,) = torch.autograd.grad(out, x, gradient)
        return found

    def _module(self, name: str) -> nn.Module:
        return self.stream.fm.whole_module(name)

    def _check(self, mine: Tensor, theirs: Tensor, what: str) -> None:
        error = float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
        if not error <= 1e-2:
            raise ComponentError(
                f"the heads of layer {self.index} together do not {what} what its attention does: they are off by "
                f"{error:.1e} of it, so that something lies between; use parts='block'."
            )


def _rows(key: str, value: Tensor) -> Tensor:
    """(N, D), or of heads (N, heads, d), in single precision at least."""
    dims = 2 if key.startswith(("@q.", "@k.", "@v.", "@z.")) else 1
    return value.reshape(-1, *value.shape[-dims:]).to(torch.promote_types(value.dtype, torch.float32))


def _applied(module: nn.Module, x: Tensor) -> Tensor:
    """In the module's own precision."""
    weight = next(module.parameters())
    return module(x.to(device=weight.device, dtype=weight.dtype)).to(x)  # type: ignore[no-any-return]


def _matrix(module: nn.Module, width: int) -> Tensor:
    """(width, out): what a projection does to each unit of its input, its bias left out."""
    for part in module.modules():
        bias = part._parameters.get("bias")
        if bias is not None:
            part._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    weight = next(module.parameters())
    found: Tensor = module(torch.eye(width, dtype=weight.dtype, device=weight.device))
    return found.to(torch.promote_types(found.dtype, torch.float32))
