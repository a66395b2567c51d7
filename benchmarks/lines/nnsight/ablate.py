# docs/patterns/ablation.md, "Zero one attention head"; what the output projection takes is per head
from given import HEAD, HEAD_SIZE, LAYER, ids
from preamble import model

with model.trace(ids):
    model.transformer.h[LAYER].attn.c_proj.input.unflatten(-1, (-1, HEAD_SIZE))[:, :, HEAD] = 0
    answer = model.output.logits.save()
