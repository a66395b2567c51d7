"""The tuned lens: what would the model predict if it ended here, read by a translator that was trained for the layer?

Early layers write in a basis that the unembedding does not read. An affine map for each layer is trained to give the
model's own prediction. Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model import FlexModel, FlexModelError
from flex_model.lens.logit import LogitLens, Unembedding, divergence, read_layers
from flex_model.lens.tokens import chosen_rows, whole_mask
from flex_model.lens.tuned.files import read_translators, write_lens
from flex_model.lens.tuned.fit import Forward, LensTraining, MakeOptimizer, Settings, Training, sgd
from flex_model.lens.tuned.ranks import Ranks

__all__ = ["TunedLens"]


class TunedLens(nn.Module):
    """One affine translator a layer, which adds to the residual stream before the model's last norm and unembedding.

    >>> lens = TunedLens(fm)                                          # doctest: +SKIP
    >>> training = lens.fit(loader, steps=250)                        # doctest: +SKIP
    >>> lens(input_ids=ids).plot(decode=tokenizer.decode).show()      # doctest: +SKIP
    >>> lens.save("lens")                                             # doctest: +SKIP

    ``translators[i]`` reads the input of layer ``i`` (the first one embeddings): ``h + weight h + bias``, zero at
    first, so that a new lens is the logit lens. What it gives is counted as ``logit_lens`` counts it: layer ``i`` is
    the stream after layer ``i``, which ``translators[i + 1]`` reads.

    Making one is collective, and so is every method; every rank has all translators, in float32. Raises ComponentError
    on models whose layers, last norm or unembedding are not found, EngineError where the last two cannot be had whole
    (Megatron-core, fairscale).
    """

    def __init__(self, fm: FlexModel) -> None:
        super().__init__()
        self._held = (fm,)  # no module of this one
        unembed = Unembedding(fm)
        width = next(unembed.head.parameters()).shape[-1]
        made = (nn.Linear(width, width, device="meta", dtype=torch.float32) for _ in fm.at("resid_pre").keys)
        self.translators = nn.ModuleList(made).to_empty(device=unembed.device)  # no random numbers are drawn
        for parameter in self.translators.parameters():
            nn.init.zeros_(parameter)

    @property
    def model(self) -> FlexModel:
        return self._held[0]

    @property
    def width(self) -> int:
        return int(self.translators[0].bias.shape[0])  # type: ignore[union-attr,index]

    def translate(self, residual: Tensor, index: int) -> Tensor:
        """What ``translators[index]`` makes of ``(..., D)``, in float32: it goes to the last norm."""
        h = residual.float()
        weight, bias = (_plain(p) for p in self.translators[index].parameters())
        return h + nn.functional.linear(h, weight, bias)

    def forward(self, *args: Any, layers: Sequence[int] | None = None, **inputs: Any) -> LogitLens:
        """The lens of one batch, as ``logit_lens`` gives it; the arguments are the model's.

        Layer ``i`` is the stream after layer ``i``, so that it stands beside layer ``i`` of ``logit_lens``; the last is
        the model's own prediction. Without gradients.
        """
        return read_layers(self.model, args, inputs, layers, lambda layer, h: self.translate(h, layer + 1))

    # -- training ----------------------------------------------------------------------------------------------
    def fit(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        steps: int,
        optimizer: MakeOptimizer = sgd,
        decay: bool = True,
        clip: float | None = 1.0,
        tokens: int | None = None,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: int = 100,
        forward: Forward | None = None,
        progress: bool | None = None,
    ) -> LensTraining:
        """Train the translators to give the model's own prediction; the model is frozen, and in eval mode meanwhile.

        >>> lens.fit(loader, steps=250)                                                          # doctest: +SKIP
        >>> lens.fit(loader, steps=1000, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))       # doctest: +SKIP

        ``batches`` are the model's keywords, one batch a step, this rank's rows where ranks have their own; they are
        gone through again where they end. The loss of a translator is KL(model | lens), the mean over tokens that
        ``attention_mask`` does not leave out. ``tokens``: how many of a batch's tokens a step uses, drawn with ``seed``
        (the unembedding is the cost); None for all.

        ``optimizer`` is called with the parameters of one translator, for each. Its learning rate goes down to zero in
        a line (``decay``), and the gradient of all translators together is clipped to the norm ``clip``; these and
        ``sgd`` are what the authors' package has.

        Every rank trains every W-th translator, on the whole batch: the parameters are those of one process, and no
        gradients move. Optimizers must therefore be alike on all ranks.

        ``checkpoint``: a folder that all ranks see. It is written after ``every`` so many steps, and a run that finds
        one there goes on from it, on any number of ranks, if it gets the same batches from the start. ``forward``: how
        to run a batch where that is not ``fm(**batch)``, as with the schedule of a pipeline.

        Returns the loss of every step. Raises FlexModelError where a loss is not finite; the lens is then as it was
        before that step. After any other error it is as it was before.
        """
        settings = Settings(steps, tokens, seed, clip, decay, len(self.translators), self.width)
        training = Training(
            self.model,
            [self._copy(i) for i in range(len(self.translators))],
            settings,
            make=optimizer,
            forward=forward or (lambda batch: self.model(**batch)),
            write=self._write,
        )
        return training.run(batches, None if checkpoint is None else Path(checkpoint), every, progress)

    def _copy(self, index: int) -> nn.Linear:
        copy = nn.Linear(self.width, self.width, device="meta")
        for name, parameter in self.translators[index].named_parameters():
            setattr(copy, name, nn.Parameter(_plain(parameter).detach().clone()))
        return copy

    @torch.no_grad()
    def _write(self, index: int, weight: Tensor, bias: Tensor) -> None:
        for parameter, value in zip(self.translators[index].parameters(), (weight, bias), strict=True):
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(value)

    # -- in a loop of the user's own ---------------------------------------------------------------------------
    @contextmanager
    def joined(
        self, attention_mask: Tensor | None = None, *, tokens: int | None = None, seed: int = 0
    ) -> Iterator[None]:
        """Train along with the model: within the block a forward leaves the loss of the lens in ``lens.loss``.

        >>> fm.register_trainable_module("lens", lens)                    # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(fm.parameters())                # doctest: +SKIP
        >>> with lens.joined(batch["attention_mask"]):                    # doctest: +SKIP
        ...     out = fm(**batch)
        ...     (out.loss + lens.loss).backward()

        The translators get their gradients, whole and equal on all ranks; the model gets none of the lens's, as
        residuals are detached and the unembedding is a copy of what it is on entering. Every rank computes the loss of
        all layers on the whole batch: ``tokens`` makes it cheaper, and wants another ``seed`` at every step. That the
        unembedding gives the model's own logits is not checked here, as it is by ``fit`` and by calling the lens.
        """
        fm = self.model
        if not any(m is self for m in fm.trainable_modules.values()):
            raise FlexModelError(
                'the lens is no trainable module of its model; call fm.register_trainable_module("lens", lens) first.',
                page="bad-argument",
            )
        unembed, mask = Unembedding(fm), whole_mask(fm, attention_mask)
        before = fm.at("resid_pre")
        numbers = {spot.name: i for i, spot in enumerate(before.spots)}
        vars(fm.save_ctx).pop("tuned_lens_loss", None)

        def keep(module: nn.Module, x: Tensor, save_ctx: Any, modules: nn.ModuleDict, *, site: Any) -> None:
            setattr(save_ctx, f"tuned_lens_{numbers[site.name]}", x.detach())

        def compare(module: nn.Module, x: Tensor, save_ctx: Any, modules: nn.ModuleDict) -> None:
            rows = chosen_rows(x, mask, tokens, seed)
            final = unembed(x.detach().flatten(0, 1)[rows]).log_softmax(-1)
            losses = []
            for i in range(len(self.translators)):
                h = getattr(save_ctx, f"tuned_lens_{i}").flatten(0, 1)[rows]
                losses.append(divergence(final, unembed(self.translate(h, i)).log_softmax(-1)).mean())
                delattr(save_ctx, f"tuned_lens_{i}")
            save_ctx.tuned_lens_loss = torch.stack(losses).mean()

        norm = fm.at("ln_final").spots[0].name  # outside of layers, which may be run again in the backward
        with fm.edit(before, keep), fm.edit(norm, compare, hook_type="forward_pre"):
            yield

    @property
    def loss(self) -> Tensor:
        """Of the last forward within ``joined``: the mean over layers and tokens of KL(model | lens) in nats."""
        found = getattr(self.model.save_ctx, "tuned_lens_loss", None)
        if not isinstance(found, Tensor):
            raise FlexModelError(
                "no forward has run within lens.joined(), so that there is no loss of the lens; call the model in it.",
                page="bad-argument",
            )
        return found

    # -- on disk -----------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``params.pt``, as the package ``tuned-lens`` (0.2) reads and writes them."""
        folder, ranks = Path(folder), Ranks(self.model)
        unembed = Unembedding(self.model)
        with ranks.telling():
            if ranks.index == 0:
                state = {n: _plain(p).detach().cpu().clone() for n, p in self.translators.named_parameters()}
                write_lens(folder, state, unembed, getattr(self.model.module, "config", None))
            ranks.gather(torch.zeros(1), "the files of a tuned lens")  # they are there
        return folder

    @classmethod
    def load(cls, fm: FlexModel, folder: str | Path) -> TunedLens:
        """The lens in ``folder``, of this package or of ``tuned-lens``.

        Warns where it was trained with another unembedding. Raises FlexModelError where it is no linear tuned lens, or
        of a model with other layers or another width.
        """
        lens = cls(fm)
        state = read_translators(Path(folder), len(lens.translators), lens.width, Unembedding(fm))
        lens.translators.load_state_dict(state)
        return lens


def _plain(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
