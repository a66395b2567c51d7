# https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html, register_forward_pre_hook
import torch

from given import HEAD, HEAD_SIZE, LAYER, ids, model

with model.transformer.h[LAYER].attn.c_proj.register_forward_pre_hook(
    lambda m, args: args[0].index_fill(
        2, torch.arange(HEAD * HEAD_SIZE, (HEAD + 1) * HEAD_SIZE), 0.0
    )
):
    answer = model(ids).logits
