# tutorials/advanced_tutorials/Probing_Gender.ipynb
from sklearn.linear_model import LogisticRegression

import pyvene as pv
from given import LAYER, labels, model, test, train

collect = pv.CollectIntervention(keep_last_dim=True)
collector = pv.IntervenableModel(
    {"layer": LAYER, "component": "block_output", "intervention": collect}, model
)
probe = LogisticRegression().fit(collector({"input_ids": train})[0][1][0][:, -1], labels)
answer = probe.predict(collector({"input_ids": test})[0][1][0][:, -1])
