# pyvene_101.ipynb, "Activation Collection with Intervention"; keep_last_dim as in "Model Steering"
import torch

import pyvene as pv
from given import LAYERS, ids, model

answer = torch.stack(
    pv.IntervenableModel(
        [
            {
                "layer": i,
                "component": "block_output",
                "intervention": pv.CollectIntervention(keep_last_dim=True),
            }
            for i in range(LAYERS)
        ],
        model,
    )({"input_ids": ids})[0][1]
)
