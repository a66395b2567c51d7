"""Pictures of captured values: ``acts.show()``."""

from flex_model.show.values.against import DifferencePicture
from flex_model.show.values.picture import ValuesPicture

__all__ = ["DifferencePicture", "ValuesPicture"]
