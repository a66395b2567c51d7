"""Parts of a transformer by names that are the same for every architecture; ``fm.at`` looks them up."""

from flex_model.components.place import Place, Spot

__all__ = ["Place", "Spot"]
