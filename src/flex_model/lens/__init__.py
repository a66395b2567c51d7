"""Analyses built on the public API only."""

from flex_model.lens.direct import DirectLogits, direct_logit_attribution
from flex_model.lens.induction import (
    CopyLoss,
    Head,
    Induction,
    induction_scores,
    measure,
    remove_heads,
    repeated_loss,
    repeated_tokens,
    top_heads,
)
from flex_model.lens.logit import LogitLens, Unembedding, logit_lens
from flex_model.lens.patching import Patching, activation_patching, attribution_patching
from flex_model.lens.probe import Probe, ProbeSweep, train_probe, train_probes
from flex_model.lens.result import Result
from flex_model.lens.steering import SteeringVector, steering_vector

__all__ = [
    "CopyLoss",
    "DirectLogits",
    "Head",
    "Induction",
    "LogitLens",
    "Patching",
    "Probe",
    "ProbeSweep",
    "Result",
    "SteeringVector",
    "Unembedding",
    "activation_patching",
    "attribution_patching",
    "direct_logit_attribution",
    "induction_scores",
    "logit_lens",
    "measure",
    "remove_heads",
    "repeated_loss",
    "repeated_tokens",
    "steering_vector",
    "top_heads",
    "train_probe",
    "train_probes",
]
