# pyvene_101.ipynb, "Set Activation to Zeros with a Lambda Expression"
import torch

import pyvene as pv
from given import HEAD, HEAD_SIZE, LAYER, ids, model

answer = pv.IntervenableModel(
    {
        "component": f"transformer.h[{LAYER}].attn.c_proj.input",
        "intervention": lambda z, source: z.index_fill(
            2, torch.arange(HEAD * HEAD_SIZE, (HEAD + 1) * HEAD_SIZE), 0.0
        ),
    },
    model,
)({"input_ids": ids})[1].logits
