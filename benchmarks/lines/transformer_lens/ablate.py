# demos/Main_Demo.ipynb, "Hooks: Intervening on Activations"
import torch

from given import HEAD, LAYER, ids
from preamble import model

answer = model.run_with_hooks(
    ids,
    fwd_hooks=[
        (f"blocks.{LAYER}.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor(HEAD), 0.0))
    ],
)
