"""``Finding``: one thing that goes wrong with an editing function in parallel code, and the page on it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["CHANGES", "CODES", "Finding", "finding"]

Severity = Literal["warning", "error"]

# {code: (severity, what it is about)}; an error fails, hangs or is lost, a warning is another number or another effect
CODES = MappingProxyType(
    {
        "FM101": ("error", "the parameters fit neither calling form"),
        "FM102": ("warning", "what was computed is thrown away"),
        "FM103": ("error", "the answer is no tensor"),
        "FM104": ("error", "a generator or coroutine"),
        "FM105": ("warning", "the answer has another dtype"),
        "FM106": ("warning", "the answer is on another device"),
        "FM111": ("warning", "the value depends on the rank"),
        "FM112": ("warning", "the value depends on the number of ranks"),
        "FM113": ("warning", "the value depends on the process or the clock"),
        "FM114": ("warning", "a collective inside an edit"),
        "FM115": ("error", "a collective that some ranks may not reach"),
        "FM121": ("warning", "random numbers without random=True"),
        "FM122": ("warning", "random numbers of a generator that nothing seeds"),
        "FM123": ("warning", "the global generator is seeded"),
        "FM131": ("error", "a write in place out of sight"),
        "FM132": ("error", "a write behind autograd's back"),
        "FM133": ("error", "a write into an expanded tensor"),
        "FM134": ("warning", "a write in place on shards"),
        "FM141": ("warning", "output on every rank"),
        "FM142": ("warning", "Python state is changed on every rank"),
        "FM143": ("warning", "a tensor is kept with its graph"),
        "FM144": ("warning", "a tensor from outside is written in place"),
        "FM151": ("warning", "control flow that depends on data, on shards"),
        "FM161": ("error", "tried on fake tensors: another shape"),
        "FM162": ("error", "tried on fake tensors: another dtype"),
        "FM163": ("error", "tried on fake tensors: it raises"),
        "FM164": ("error", "tried on fake tensors: another device"),
    }
)
CHANGES = frozenset({"FM141", "FM142", "FM143", "FM144"})  # calling the function changes something else


@dataclass(frozen=True, slots=True)
class Finding:
    """``sentence`` says what, where and what to do; ``line`` is of the file that holds it (0: unknown)."""

    code: str
    sentence: str
    line: int
    page: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.code}: {self.sentence} See {self.page}."


def finding(code: str, sentence: str, line: int = 0, *, severity: Severity | None = None) -> Finding:
    given: Severity = CODES[code][0]  # type: ignore[assignment]
    return Finding(code, sentence, line, f"docs/errors/{code}.md", severity or given)
