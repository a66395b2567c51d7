"""Probes: what can be read off a model's values. Rows are collected, weights fitted, results shown."""

from flex_model.lens.probes.result import Probe, ProbeSweep
from flex_model.lens.probes.train import train_probe, train_probes

__all__ = ["Probe", "ProbeSweep", "train_probe", "train_probes"]
