"""The tuned lens, in one room: what it reads, how it is fitted on many ranks, and its files."""

from flex_model.lens.tuned.fit import LensTraining
from flex_model.lens.tuned.lens import TunedLens

__all__ = ["LensTraining", "TunedLens"]
