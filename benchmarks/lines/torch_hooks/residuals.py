# https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html, register_forward_hook
import torch

from given import ids, model

residuals = []
handles = [
    block.register_forward_hook(lambda m, args, output: residuals.append(output))
    for block in model.transformer.h
]
model(ids)
for handle in handles:
    handle.remove()
answer = torch.stack(residuals)
