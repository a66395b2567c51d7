# docs/patterns/steering.md
import torch

from given import LAYER, ids, negative, positive
from preamble import model

with model.trace(torch.cat([positive, negative])):
    means = model.transformer.h[LAYER].output[:, -1].unflatten(0, (2, -1)).mean(1).save()
with model.trace(ids):
    model.transformer.h[LAYER].output[:] += 4.0 * (means[0] - means[1])
    answer = model.output.logits.save()
