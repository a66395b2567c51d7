# https://github.com/davidbau/baukit, docstring of Trace; there is no probe in it, so scikit-learn's
import torch
from sklearn.linear_model import LogisticRegression

from given import LAYER, labels, test, train
from preamble import Trace, model

with Trace(model, f"transformer.h.{LAYER}") as trace:
    model(torch.cat([train, test]))
probe = LogisticRegression().fit(trace.output[: len(train), -1], labels)
answer = probe.predict(trace.output[len(train) :, -1])
