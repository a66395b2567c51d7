# https://github.com/davidbau/baukit, docstring of Trace
import torch

from given import LAYER, ids, negative, positive
from preamble import Trace, model

with Trace(model, f"transformer.h.{LAYER}") as trace:
    model(torch.cat([positive, negative]))
means = trace.output[:, -1].unflatten(0, (2, -1)).mean(1)
with Trace(model, f"transformer.h.{LAYER}", edit_output=lambda x: x + 4.0 * (means[0] - means[1])):
    answer = model(ids).logits
