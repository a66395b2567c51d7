"""Training a tuned lens: layers are independent of one another, so each rank trains every W-th of the translators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flex_model import FlexModel, FlexModelError
from flex_model.lens.logit import Unembedding, divergence
from flex_model.lens.tokens import chosen_rows, whole_mask
from flex_model.lens.tuned.checkpoint import Checkpoint
from flex_model.lens.tuned.ranks import Ranks
from flex_model.lens.whole import whole
from flex_model.progress import progress_bar
from flex_model.result import Result, grid, long_table
from flex_model.routing.watch import mark_shared

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

__all__ = ["Forward", "LensTraining", "MakeOptimizer", "Settings", "Training", "Write", "sgd"]

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
Forward = Callable[[Mapping[str, Any]], Any]
Write = Callable[[int, Tensor, Tensor], None]  # the weight and the bias of a translator


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Nesterov momentum; the rate is 1, less what torch's SGD adds to it by momentum. As in the authors' package."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


@dataclass(frozen=True, slots=True)
class LensTraining(Result):
    """``loss`` is ``(steps, translators)``: KL(model | lens) in nats on the step's batch, before its update.

    Translator ``i`` reads the input of layer ``i``.
    """

    loss: Tensor

    def to_dataframe(self) -> DataFrame:
        """step, translator, loss."""
        return long_table(("step", "translator"), loss=self.loss)

    def plot(self) -> Figure:
        title = "Tuned lens: divergence of the model's prediction from the lens's (nats)"
        return grid(self.loss.T, title=title, x="step", y="translator", centred=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be the same for a checkpoint to be gone on from."""

    steps: int
    tokens: int | None
    seed: int
    clip: float | None
    decay: bool
    translators: int
    width: int

    def check(self) -> None:
        wrong = {
            "steps": self.steps < 1,
            "tokens": self.tokens is not None and self.tokens < 1,
            "clip": self.clip is not None and not self.clip > 0,
        }
        for name in (n for n, bad in wrong.items() if bad):
            raise FlexModelError(
                f"{name}={getattr(self, name)!r}: expected a positive number{'' if name == 'steps' else ' or None'}.",
                page="bad-argument",
            )


@dataclass(slots=True)
class _Own:
    """One translator of this rank."""

    index: int
    translator: nn.Linear
    optimizer: torch.optim.Optimizer
    rates: list[float]  # of its parameter groups at the first step


class Training:
    """One run. It trains copies of ``translators``, and hands all of them to ``write`` at its end."""

    def __init__(
        self,
        fm: FlexModel,
        translators: Sequence[nn.Linear],
        settings: Settings,
        *,
        make: MakeOptimizer,
        forward: Forward,
        write: Write,
    ) -> None:
        settings.check()
        self.fm, self.settings, self.forward, self.write = fm, settings, forward, write
        self.ranks, self.unembed = Ranks(fm), Unembedding(fm)
        self.own = [
            self._own(i, translators[i], make) for i in range(self.ranks.index, len(translators), self.ranks.count)
        ]
        self.places = fm.at("resid_pre"), fm.at("resid_post", -1)
        self.loss: list[Tensor] = []
        self._checked = False

    def _own(self, index: int, translator: nn.Linear, make: MakeOptimizer) -> _Own:
        mine = copy.deepcopy(translator).to(self.unembed.device)
        optimizer = make(list(mine.parameters()))
        return _Own(index, mine, optimizer, [group["lr"] for group in optimizer.param_groups])

    def run(
        self, batches: Iterable[Mapping[str, Any]], folder: Path | None, every: int, progress: bool | None
    ) -> LensTraining:
        if every < 1:
            raise FlexModelError(f"every={every!r}: expected a positive number of steps.", page="bad-argument")
        steps = self.settings.steps
        with self.ranks.telling():
            checkpoint = None if folder is None else Checkpoint(folder, self.ranks, asdict(self.settings))
            if checkpoint is not None:
                self._resume(checkpoint)
            start = len(self.loss)
            stream = islice(_endless(batches), start, None)
            with _evaluating(self.fm), progress_bar(steps, "tuned lens", progress, done=start) as show:
                for number in range(start, steps):
                    self._step(number, _next(stream, number, steps))
                    show(f"loss {float(self.loss[-1].mean()):.4f}")
                    if checkpoint is not None and ((number + 1) % every == 0 or number + 1 == steps):
                        self._keep(checkpoint)
            self.give_back()
        return LensTraining(torch.stack(self.loss).float())

    # -- one step ----------------------------------------------------------------------------------------------
    def _step(self, number: int, batch: Mapping[str, Any]) -> None:
        residuals, final = self._read(number, batch)
        report = torch.zeros(self._rounds, 2, dtype=torch.float64)  # the loss, and the square of its gradient's norm
        for k, own in enumerate(self.own):
            own.optimizer.zero_grad()
            with torch.enable_grad():
                h = residuals[own.index]
                loss = divergence(final, self.unembed(h + own.translator(h)).log_softmax(-1)).mean()
                loss.backward()
            report[k, 0] = float(loss.detach())
            report[k, 1] = sum(float(p.grad.double().pow(2).sum()) for p in _trained(own.translator))
        told = torch.stack(self.ranks.gather(report, "the losses of a tuned lens"), 1).flatten(0, 1)
        loss, square = told[: self.settings.translators].unbind(1)  # translator i is number i // W of rank i % W
        wrong = [i for i, fine in enumerate((loss + square).isfinite().tolist()) if not fine]
        if wrong:
            self.give_back()
            error = FlexModelError(
                f"the loss of translators {wrong} of the lens, or its gradient, is not finite in step {number}; use a "
                f"smaller learning rate, or look at the batch. The lens is as it was before this step.",
                page="loss-not-finite",
            )
            mark_shared(error)  # all ranks raise it
            raise error
        self.loss.append(loss)
        for own in self.own:
            self._update(own, number, float(square.sum().sqrt()))

    def _update(self, own: _Own, number: int, norm: float) -> None:
        if self.settings.clip is not None and norm > self.settings.clip:
            for p in _trained(own.translator):
                p.grad.mul_(self.settings.clip / norm)
        left = 1 - number / self.settings.steps if self.settings.decay else 1.0
        for group, rate in zip(own.optimizer.param_groups, own.rates, strict=True):
            group["lr"] = rate * left
        own.optimizer.step()

    @torch.no_grad()
    def _read(self, number: int, batch: Mapping[str, Any]) -> tuple[dict[int, Tensor], Tensor]:
        """(N, D) of this rank's layers and (N, V), the model's log probabilities, at the step's tokens."""
        with self.fm.capture(*self.places) as acts:
            output = self.forward(batch)
            if not self._checked:
                output = self.fm.full_output(output)
        last = whole(acts, self.places[1].key)
        if not self._checked and bool(last.isfinite().all()):  # else the loss will say so
            self.unembed.check(last, output.logits if hasattr(output, "logits") else output)
            self._checked = True
        rows = chosen_rows(
            last, whole_mask(self.fm, batch.get("attention_mask")), self.settings.tokens, self._at(number)
        )
        keys = {own.index: self.places[0].keys[own.index] for own in self.own}
        pick = lambda key: whole(acts, key).flatten(0, 1)[rows].to(self.unembed.device).float()  # noqa: E731
        final = self.unembed(pick(self.places[1].key)).log_softmax(-1)
        return {i: pick(key) for i, key in keys.items()}, final

    def _at(self, number: int) -> int:
        return (self.settings.seed << 32) + number

    @property
    def _rounds(self) -> int:
        return -(-self.settings.translators // self.ranks.count)

    def give_back(self) -> None:
        """Every translator to every rank, one of each rank in a message. Collective."""
        width = self.settings.width
        for k in range(self._rounds):
            flat = torch.zeros(width * (width + 1))
            if k < len(self.own):
                flat = torch.cat([p.detach().flatten().cpu() for p in _trained(self.own[k].translator)])
            for rank, theirs in enumerate(self.ranks.gather(flat, "the translators of a tuned lens")):
                if (index := k * self.ranks.count + rank) < self.settings.translators:
                    self.write(index, theirs[: width * width].view(width, width), theirs[width * width :])

    # -- checkpoints -------------------------------------------------------------------------------------------
    def _keep(self, checkpoint: Checkpoint) -> None:
        states = {
            o.index: {"translator": o.translator.state_dict(), "optimizer": o.optimizer.state_dict()} for o in self.own
        }
        checkpoint.write(torch.stack(self.loss), states)

    def _resume(self, checkpoint: Checkpoint) -> None:
        loss = checkpoint.losses()
        if loss is None:
            return
        self.loss = list(loss)
        for own in self.own:
            state = checkpoint.state(own.index, len(loss), self.unembed.device)
            own.translator.load_state_dict(state["translator"])
            own.optimizer.load_state_dict(state["optimizer"])


def _trained(translator: nn.Linear) -> tuple[Any, Any]:
    return translator.weight, translator.bias


def _endless(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Again from the start where they end, unless they can be gone through only once."""
    while True:
        some = False
        for batch in batches:
            some = True
            yield batch
        if not some or isinstance(batches, Iterator):
            return


def _next(stream: Iterator[Mapping[str, Any]], number: int, steps: int) -> Mapping[str, Any]:
    batch = next(stream, None)
    if batch is None:
        raise FlexModelError(
            f"the batches ended before step {number} of {steps}; give more, or a list or DataLoader, which is gone "
            f"through again.",
            page="bad-argument",
        )
    if not isinstance(batch, Mapping):
        raise FlexModelError(
            f"a batch must be a mapping of the model's keywords, such as {{'input_ids': ids}}, found "
            f"{type(batch).__name__}.",
            page="bad-argument",
        )
    return batch


@contextmanager
def _evaluating(fm: FlexModel) -> Iterator[None]:
    """Without dropout; every module as it was afterwards."""
    changed = [m for m in fm.modules() if m.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
