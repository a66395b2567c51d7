"""Pictures: of a model and its hooks (``fm.show``)."""

from flex_model.show.outline import Outline
from flex_model.show.picture import Picture

__all__ = ["Outline", "Picture"]
