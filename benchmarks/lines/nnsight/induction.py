# docs/patterns/attention-patterns.md; the model's own attentions are shorter than .source
import torch

from given import length, repeated
from preamble import model

with model.trace(repeated, output_attentions=True):
    answer = torch.stack(model.output.attentions).diagonal(1 - length, -2, -1).mean((1, 3)).save()
