# docs/patterns/activation-patching.md, "Sweep over layers"
import torch

import nnsight
from given import LAYERS, clean, corrupted, metric
from preamble import model

with model.trace(clean):
    residuals = nnsight.save([block.input for block in model.transformer.h])
answer = torch.empty(LAYERS, corrupted.shape[1])
for layer in range(LAYERS):
    for position in range(corrupted.shape[1]):
        with model.trace(corrupted):
            model.transformer.h[layer].input[:, position] = residuals[layer][:, position]
            answer[layer, position] = metric(model.output.logits)
answer -= metric(model(corrupted).logits)
