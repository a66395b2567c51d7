# pyvene_101.ipynb, "Get Attention Weights"
import torch

import pyvene as pv
from given import LAYERS, length, model, repeated

answer = (
    torch.stack(
        pv.IntervenableModel(
            [
                {
                    "layer": i,
                    "component": "attention_weight",
                    "intervention": pv.CollectIntervention(keep_last_dim=True),
                }
                for i in range(LAYERS)
            ],
            model,
        )({"input_ids": repeated})[0][1]
    )
    .diagonal(1 - length, -2, -1)
    .mean((1, 3))
)
