"""``Notes``: what was found in one editing function, in sentences; and what a reader of it must know."""

from __future__ import annotations

from dataclasses import dataclass, field

from flex_model.check.findings import Finding, finding
from flex_model.check.values import Mark, Value

__all__ = ["Notes"]

_ALONE = "let the edit depend on its input alone, or run it with run='one_rank'"
_MARKS = {
    "FM111": f"what comes of {{what}} is another value on every rank; {_ALONE}",
    "FM112": "what comes of {what} changes with the number of ranks, though the input is whole already; leave it out",
    "FM113": f"what comes of {{what}} is another value in every process; {_ALONE}",
}


@dataclass
class Notes:
    """``copied``: the function gets a copy of its input, because it looks as if it wrote into it.

    ``shards``: it asks whether its input is a DTensor, and knows what to do with either.
    """

    name: str
    run: str
    random: bool
    copied: bool
    shards: bool = False
    found: dict[tuple[str, int], Finding] = field(default_factory=dict)
    effects: int = 0  # of any kind, wanted or not

    def add(self, code: str, line: int, text: str, *, inside: str = "", error: bool = False) -> None:
        if (code, line) in self.found:
            return
        where = f"line {line}" if line else "somewhere"
        if inside:
            where += f" (in {inside})"
        sentence = f"{self.name}, {where}: {text}."
        self.found[code, line] = finding(code, sentence, line, severity="error" if error else None)

    # -- the kinds ---------------------------------------------------------------------------------------------
    def differs(self, marks: frozenset[Mark]) -> None:
        """A value that differs between processes has reached the edit's answer."""
        for mark in marks if self.run != "one_rank" else ():
            self.add(mark.code, mark.line, _MARKS[mark.code].format(what=mark.what), inside=mark.inside)

    def collective(self, what: str, line: int, inside: str, *, uncertain: str) -> None:
        if self.run == "one_rank":
            self.add(
                "FM115",
                line,
                f"{what} waits for all ranks, but run='one_rank' calls the function on one; "
                f"the input is whole already, so leave the call out",
                inside=inside,
            )
        elif uncertain:
            self.add(
                "FM115",
                line,
                f"{what} is in a branch that depends on {uncertain}, so some ranks may wait for others for ever; "
                f"call it on every rank alike, or leave it out",
                inside=inside,
            )
        else:
            self.add(
                "FM114",
                line,
                f"{what} talks to other ranks, and fails where there are none; the input is whole already, so leave "
                f"it out",
                inside=inside,
            )

    def whole_already(self, method: str, line: int, inside: str) -> None:
        if not self.shards:
            self.add(
                "FM114",
                line,
                f".{method}() is a DTensor's, and the input is a whole, plain tensor; leave it out, or pass "
                f"run='sharded'",
                inside=inside,
                error=True,
            )

    def draws(self, what: str, line: int, inside: str) -> None:
        self.effects += 1
        if not self.random:
            self.add(
                "FM121",
                line,
                f"{what} draws random numbers, other ones on every rank and in a recomputation; pass random=True",
                inside=inside,
            )

    def draws_unseeded(self, what: str, line: int, inside: str) -> None:
        self.effects += 1
        self.add(
            "FM122",
            line,
            f"{what} draws from a generator that random=True does not seed; draw with torch's own functions and "
            f"random=True, or from a generator made and seeded inside the function",
            inside=inside,
        )

    def seeds(self, what: str, line: int, inside: str) -> None:
        self.effects += 1
        if not self.random:
            self.add(
                "FM123",
                line,
                f"{what} changes the generator that the model draws from; pass random=True instead, which seeds it "
                f"for the time of the edit",
                inside=inside,
            )

    def output(self, what: str, line: int, inside: str, *, guarded: bool) -> None:
        self.effects += 1
        if self.run != "one_rank" and not guarded:
            self.add(
                "FM141",
                line,
                f"{what} happens once on every rank, and again in a recomputation; pass run='one_rank', or read the "
                f"value with fm.capture",
                inside=inside,
            )

    def state(self, what: str, line: int, inside: str, *, guarded: bool, kept: Value) -> None:
        self.effects += 1
        if self.run != "one_rank" and not guarded:
            self.add(
                "FM142",
                line,
                f"{what} changes what outlives the call, once on every rank and again in a recomputation; pass "
                f"run='one_rank', write to save_ctx, or read the value with fm.capture",
                inside=inside,
            )
        if kept.graph:
            self.add(
                "FM143",
                line,
                f"{what} keeps the tensor with its graph, and with it the activations of every call; keep "
                f"x.detach().clone()",
                inside=inside,
            )

    def write(self, target: Value, what: str, line: int, inside: str) -> None:
        """A write in place into ``target``."""
        self.effects += 1
        if target.beside and target.alias:
            self.add(
                "FM132",
                line,
                f"{what} writes through {target.beside}, where neither autograd nor this library sees it; return "
                f"a new tensor",
                inside=inside,
            )
        elif target.expanded:
            self.add(
                "FM133",
                line,
                f"{what} writes into an expanded tensor, whose elements share memory; add .clone() before it",
                inside=inside,
            )
        elif target.alias and self.run == "sharded":
            lost = "is lost or refused" if target.view else "goes into the model's own memory, not into a copy"
            self.add(
                "FM134",
                line,
                f"{what} writes in place, which on shards {lost}; return a new tensor, say with torch.where or "
                f"slice_scatter",
                inside=inside,
                error=target.view,
            )
        elif target.alias and not self.copied:
            self.add(
                "FM131",
                line,
                f"{what} writes into the input where the library does not look, so it gets no copy and the edit is "
                f"refused; start the function with x = x.clone()",
                inside=inside,
            )
        elif target.outside and not target.role:
            self.add(
                "FM144",
                line,
                f"{what} writes into {target.outside}, which outlives the call: once on every rank, and again in a "
                f"recomputation; make a new tensor, or keep it in save_ctx",
                inside=inside,
            )

    def data(self, what: str, line: int, inside: str) -> None:
        if self.run == "sharded":
            self.add(
                "FM151",
                line,
                f"{what} needs the numbers of a tensor that lies in shards, so it gathers, fails, or takes another "
                f"way on every rank; use torch.where, or run='every_rank'",
                inside=inside,
            )
