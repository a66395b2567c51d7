"""Adapters for parallel frameworks: one file each, and ``Engines``, all that are at work on one model."""

from flex_model.engines.combined import Engines, wrapped
from flex_model.engines.engine import Conductor, Engine, GradientSite

__all__ = ["Conductor", "Engine", "Engines", "GradientSite", "wrapped"]
