# pyvene_101.ipynb, "Activation Collection with Intervention" and "LMs Generation"
import pyvene as pv
from given import LAYER, ids, model, negative, positive

plus, minus = (
    pv.IntervenableModel(
        {
            "layer": LAYER,
            "component": "block_output",
            "intervention": pv.CollectIntervention(keep_last_dim=True),
        },
        model,
    )({"input_ids": x})[0][1][0][:, -1].mean(0)
    for x in (positive, negative)
)
answer = pv.IntervenableModel(
    {
        "layer": LAYER,
        "component": "block_output",
        "intervention": lambda x, source: x + 4.0 * (plus - minus),
    },
    model,
)({"input_ids": ids})[1].logits
