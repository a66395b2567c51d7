"""Read, edit and probe the full activations and gradients of models that are spread over many devices."""

from flex_model import edits
from flex_model.core import Call, DummyModule, FlexModel, HookFunction, Site
from flex_model.errors import FlexModelError
from flex_model.layout.layout import Layout, ZigZag

__version__ = "0.2.0"
__all__ = ["Call", "DummyModule", "FlexModel", "FlexModelError", "HookFunction", "Layout", "Site", "ZigZag", "edits"]
