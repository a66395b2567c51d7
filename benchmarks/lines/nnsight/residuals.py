# docs/usage/save.md, docs/usage/access-and-modify.md
import torch

import nnsight
from given import ids
from preamble import model

with model.trace(ids):
    answer = nnsight.save(torch.stack([block.output for block in model.transformer.h]))
