"""Random nets under random engines with random hooks, against plain torch hooks on the unsharded net in one process.

``FLEX_MODEL_FUZZ_CASES`` is the number of cases in all, ``FLEX_MODEL_FUZZ_SEED`` draws others than always the same.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import fuzz
import fuzz_models
import pytest
from fuzz_case import Case
from fuzz_run import run_case
from fuzz_world import World
from hypothesis import HealthCheck, given, seed, settings

CASES = int(os.environ.get("FLEX_MODEL_FUZZ_CASES", "2000"))
SEED = os.environ.get("FLEX_MODEL_FUZZ_SEED", "")
SHARES = {  # (ranks, engines): the share of the cases
    (1, ("solo",)): 0.5,
    (2, ("ddp", "fsdp2")): 0.25,
    (2, ("tp", "tp_dtensors", "sp")): 0.17,
    (4, ("ddp_tp", "2d_tp", "2d_sp", "hsdp")): 0.08,
}
MOST_REFUSED = 0.15


def _over_samples(case: Case) -> bool:
    scene = case.scene
    trees = [s for s in (scene.value, scene.named, scene.output) if s is not None]
    return len(scene.batches) > 1 and any("sum" in fuzz_models.kinds(s) for s in trees)


def _stays(case: Case) -> bool:
    return case.deliver == "local" or any(h.deliver == "local" for h in case.hooks)


def _of_few_words(case: Case) -> bool:
    """Whether samples and positions are one dim, of values that are the same for the same word."""
    scene = case.scene
    trees = [s for s in (scene.value, scene.named, scene.output) if s is not None]
    return not scene.floats and any("flat" in fuzz_models.kinds(s) for s in trees)


def _on_shards(case: Case) -> bool:
    return any(h.run == "sharded" and h.edit for h in case.hooks)


@dataclass(frozen=True)
class Refusal:
    """An error by name that is right: what it says, and in which cases it may say it."""

    reason: str
    says: str
    where: Callable[[Case], bool]


REFUSALS = (
    Refusal("a sum over a rank's own samples", "yet depends on the batch|it should be the same along", _over_samples),
    Refusal("summands of uneven rows, left there", "summands of its rows", _stays),
    Refusal("rows that are all the same", "the rows of dim 0 repeat themselves", _of_few_words),
    Refusal(
        "a selection across shards, left there",
        "select= takes part of a dim that is sharded",
        _stays,
    ),
    Refusal("cumulative sums along shards", "is wrong on shards", _on_shards),
    Refusal("elements alone on shards of other sizes", "sizes that DTensor does not count with", _on_shards),
    Refusal("random numbers on shards", "draws random numbers", _on_shards),
    Refusal(
        "what torch cannot do on shards",
        "Sharding propagation|got mixed torch.Tensor and DTensor|does not support|not supported",
        _on_shards,
    ),
)


@dataclass
class Tally:
    cases: int = 0
    values: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        why = ", ".join(f"{reason}: {n}" for reason, n in self.reasons.most_common())
        return (
            f"{self.cases - self.refused} exact of {self.cases} cases ({self.values} values), "
            f"{self.refused} refused by name{f' ({why})' if why else ''}"
        )


def check(case: Case, world: World, tally: Tally) -> None:
    """A wrong value, a hang and an error that no rule allows are failures."""
    outcomes = world.ask(case)
    if any(o.broken for o in outcomes):
        world.close()
    problems = [f"rank {r}: {p}" for r, o in enumerate(outcomes) for p in o.problems]
    reasons = set()
    for told in (t for o in outcomes for t in o.refused):
        rule = next((r for r in REFUSALS if re.search(r.says, told) and r.where(case)), None)
        if rule is None:
            problems.append(f"refused, and no rule allows it: {told}")
        else:
            reasons.add(rule.reason)
    assert not problems, "\n".join(problems)
    tally.cases += 1
    tally.values += sum(o.values for o in outcomes)
    tally.refused += bool(reasons)
    tally.reasons.update(reasons)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks,engines", SHARES, ids=lambda v: str(v) if isinstance(v, int) else "+".join(v))
def test_against_the_oracle(ranks: int, engines: tuple[str, ...]) -> None:
    world, tally = World(ranks, run_case), Tally()
    how = settings(
        max_examples=max(1, round(CASES * SHARES[ranks, engines])),
        derandomize=not SEED,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )

    @how
    @given(fuzz.cases(engines))
    def run(case: Case) -> None:
        check(case, world, tally)

    try:
        (seed(int(SEED))(run) if SEED else run)()
    finally:
        world.close()
    print(f"fuzz {'+'.join(engines)}: {tally}")
    assert tally.refused <= MOST_REFUSED * tally.cases
