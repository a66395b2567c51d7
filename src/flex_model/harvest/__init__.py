"""Activations of a model on many ranks into a store, each number written by the rank that has it."""

from flex_model.harvest.forecast import Forecast
from flex_model.harvest.harvest import Harvested

__all__ = ["Forecast", "Harvested"]
