"""The wrapper and what users pass to it."""

from flex_model.core.core_utils import DummyModule
from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import Call, HookFunction, Site

__all__ = ["Call", "DummyModule", "FlexModel", "HookFunction", "Site"]
