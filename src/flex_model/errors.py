"""Every error of this library, one class a kind of mistake, and its warning.

Each message is one sentence or two: which site, which rank, what was expected, what was found, what to do.
"""

from __future__ import annotations

__all__ = [
    "DeliveryError",
    "EditError",
    "EditWarning",
    "EngineError",
    "FlexModelError",
    "GroupError",
    "LayoutError",
    "MeshError",
    "MismatchError",
    "MissedHookWarning",
    "NameNotFoundError",
    "PeerError",
    "RegistrationError",
    "ShapeError",
]


class FlexModelError(Exception):
    """Base of all errors raised on purpose by flex_model."""


class NameNotFoundError(FlexModelError, KeyError):
    """A module or parameter name, or a pattern, matches nothing in the model."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class GroupError(FlexModelError, KeyError):
    """A hook group that does not exist, or that must not be changed (``all``)."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RegistrationError(FlexModelError, ValueError):
    """A hook, or a trainable module, cannot be registered as asked."""


class MeshError(FlexModelError, ValueError):
    """Sizes or a mesh that were given contradict the parallelism found on the model."""


class EngineError(FlexModelError, NotImplementedError):
    """The model runs in a way that hooks on it cannot follow."""


class LayoutError(FlexModelError, RuntimeError):
    """The full value of a site cannot be known, so it is refused instead of guessed."""


class ShapeError(FlexModelError, ValueError):
    """A value has another shape than was promised: by ``expected_shape``, or by an edit."""


class EditError(FlexModelError, RuntimeError):
    """An editing function or a ``select`` failed on some rank; every rank raises it."""


class EditWarning(UserWarning):
    """What ``flex_model.check.examine`` found in an editing function that is being registered.

    Silence it as any warning: ``warnings.filterwarnings("ignore", category=EditWarning, message="FM141")``.
    """


class MismatchError(FlexModelError, RuntimeError):
    """Ranks do different things: other hooks, another order, another function, a module that some of them skip."""


class PeerError(FlexModelError, RuntimeError):
    """Another rank failed, died or never came to where this rank waits; every rank that waits raises it."""


class DeliveryError(FlexModelError, KeyError):
    """A captured value was asked for where it was not delivered."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissedHookWarning(UserWarning):
    """A hook is on and did not fire although it should have; the message says which, and why."""
