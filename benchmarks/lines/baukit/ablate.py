# https://github.com/davidbau/baukit, docstring of Trace; it edits outputs, so the head's values are
# made zero
import torch

from given import HEAD, HEAD_SIZE, LAYER, ids
from preamble import Trace, model

with Trace(
    model,
    f"transformer.h.{LAYER}.attn.c_attn",
    edit_output=lambda qkv: qkv.index_fill(
        2, 2 * model.config.n_embd + torch.arange(HEAD * HEAD_SIZE, (HEAD + 1) * HEAD_SIZE), 0.0
    ),
):
    answer = model(ids).logits
