"""Analyses, built on the public API."""

from flex_model.lens.attention import AttentionPatterns, attention_patterns
from flex_model.lens.direct import DirectLogits, direct_logit_attribution
from flex_model.lens.edges import EdgeAttribution, edge_attribution
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
from flex_model.lens.probes import Probe, ProbeSweep, train_probe, train_probes
from flex_model.lens.steering import SteeringVector, steering_vector
from flex_model.lens.tuned import LensTraining, TunedLens
from flex_model.result import Result, save_figure

__all__ = [
    "AttentionPatterns",
    "CopyLoss",
    "DirectLogits",
    "EdgeAttribution",
    "Head",
    "Induction",
    "LensTraining",
    "LogitLens",
    "Patching",
    "Probe",
    "ProbeSweep",
    "Result",
    "SteeringVector",
    "TunedLens",
    "Unembedding",
    "activation_patching",
    "attention_patterns",
    "attribution_patching",
    "direct_logit_attribution",
    "edge_attribution",
    "induction_scores",
    "logit_lens",
    "measure",
    "remove_heads",
    "repeated_loss",
    "repeated_tokens",
    "save_figure",
    "steering_vector",
    "top_heads",
    "train_probe",
    "train_probes",
]
