# docs/usage/save.md for the values; there is no probe in it, so scikit-learn's
import torch
from sklearn.linear_model import LogisticRegression

from given import LAYER, labels, test, train
from preamble import model

with model.trace(torch.cat([train, test])):
    last = model.transformer.h[LAYER].output[:, -1].save()
probe = LogisticRegression().fit(last[: len(train)], labels)
answer = probe.predict(last[len(train) :])
