"""Prompts: what ``--prompt`` and the like become, and what tokens are shown as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flex_model.cli.models import SAFE, ModelError

__all__ = ["Words"]


class Words:
    """A model's tokenizer: texts to a batch, tokens to words."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **SAFE)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"--model {folder}: no tokenizer can be read from it ({reason}); save one beside the weights.",
                page="model-not-found",
            ) from error

    def batch(self, texts: Sequence[str], what: str = "--prompt") -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, S), shorter texts padded on the right."""
        rows = [self._tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts]
        if not rows or not all(rows):
            raise ModelError(f"{what} has no tokens; give a text of one word or more.", page="bad-argument")
        longest = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def one(self, text: str, what: str) -> int:
        """The token that ``text`` is. Raises ModelError if it is several."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            shown = " ".join(repr(self.show(i)) for i in ids)
            raise ModelError(
                f"{what} {text!r} is {len(ids)} tokens ({shown}); give a text that is one; mind the space before it.",
                page="bad-argument",
            )
        return int(ids[0])

    def show(self, token: int) -> str:
        """What one token stands for, in one line."""
        text: str = self._tokenizer.decode([token])
        return text.replace("\n", "\\n")

    def text(self, tokens: Sequence[int]) -> str:
        out: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return out
