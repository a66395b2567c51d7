# tutorials/advanced_tutorials/Causal_Tracing.ipynb
import torch

import pyvene as pv
from given import LAYERS, clean, corrupted, metric, model

answer = torch.empty(LAYERS, corrupted.shape[1])
for layer in range(LAYERS):
    patched = pv.IntervenableModel({"layer": layer, "component": "block_input"}, model)
    for position in range(corrupted.shape[1]):
        _, output = patched(
            {"input_ids": corrupted}, [{"input_ids": clean}], {"sources->base": position}
        )
        answer[layer, position] = metric(output.logits)
answer -= metric(model(corrupted).logits)
