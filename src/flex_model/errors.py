"""Every error of this library, one class a kind of mistake, with a page for each mistake; and its warnings.

Each message is one sentence or two: which site, which rank, what was expected, what was found, what to do. Printed, it
ends with its page: a class has one, and a mistake of its own is raised with ``page=``.
"""

from __future__ import annotations

__all__ = [
    "ComponentError",
    "DataError",
    "DeliveryError",
    "EditError",
    "EditWarning",
    "EngineError",
    "FlexModelError",
    "GroupError",
    "HarvestError",
    "LayoutError",
    "MeshError",
    "MismatchError",
    "MissedHookWarning",
    "NameNotFoundError",
    "PeerError",
    "RegistrationError",
    "RowError",
    "ShapeError",
    "StoreError",
    "summary",
]


class FlexModelError(Exception):
    """Base of all errors raised on purpose by flex_model.

    >>> error = LayoutError("mlp: the full value is unknown.")
    >>> str(error)
    'mlp: the full value is unknown. (docs/errors/layout-unknown.md)'
    >>> error.message, error.page
    ('mlp: the full value is unknown.', 'layout-unknown')
    """

    page: str = ""  # the slug of docs/errors/<page>.md

    def __init__(self, *args: object, page: str = "") -> None:
        super().__init__(*args)
        if page:
            self.page = page  # in __dict__, so that it is pickled with the error

    @property
    def message(self) -> str:
        """What happened, without the page."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:  # also in place of KeyError's, which would print the repr
        if not (self.args and self.page):
            return self.message
        gap = "\n" if "\n" in self.message else " "  # below a traceback
        return f"{self.message.rstrip()}{gap}(docs/errors/{self.page}.md)"


def summary(error: BaseException) -> str:
    """Class and message of any error on one line's beginning, without a page: to be told within another message."""
    text = error.message if isinstance(error, FlexModelError) else str(error)
    return f"{type(error).__name__}: {text}".rstrip(": .")


class NameNotFoundError(FlexModelError, KeyError):
    """A module or parameter name, or a pattern, matches nothing in the model."""

    page = "name-not-found"


class ComponentError(FlexModelError, LookupError):
    """A part of a transformer, asked for by its general name, that this model does not have or that cannot be found."""

    page = "component-unknown"


class GroupError(FlexModelError, KeyError):
    """A hook group that does not exist, or that must not be changed (``all``)."""

    page = "group-unknown"


class RegistrationError(FlexModelError, ValueError):
    """A hook, or a trainable module, cannot be registered as asked."""

    page = "bad-argument"


class MeshError(FlexModelError, ValueError):
    """Sizes or a mesh that were given contradict the parallelism found on the model."""

    page = "mesh-contradiction"


class EngineError(FlexModelError, NotImplementedError):
    """The model runs in a way that hooks on it cannot follow."""

    page = "engine-unsupported"


class LayoutError(FlexModelError, RuntimeError):
    """The full value of a site cannot be known, so it is refused instead of guessed."""

    page = "layout-unknown"
    passing = False  # whether the next call looks anew: the model raised when it was probed, or was not


class ShapeError(FlexModelError, ValueError):
    """A value has another shape than was promised: by ``expected_shape``, or by an edit."""

    page = "expected-shape"


class EditError(FlexModelError, RuntimeError):
    """An editing function or a ``select`` failed on some rank; every rank raises it."""

    page = "edit-failed"


class EditWarning(UserWarning):
    """What ``flex_model.check.examine`` found in an editing function that is being registered.

    Silence it as any warning: ``warnings.filterwarnings("ignore", category=EditWarning, message="FM141")``.
    """


class MismatchError(FlexModelError, RuntimeError):
    """Ranks do different things: other hooks, another order, another function, a module that some of them skip."""

    page = "ranks-differ"


class PeerError(FlexModelError, RuntimeError):
    """Another rank failed, died or never came to where this rank waits; every rank that waits raises it."""

    page = "peer-failed"


class DeliveryError(FlexModelError, KeyError):
    """A captured value was asked for where it was not delivered."""

    page = "not-delivered"


class StoreError(FlexModelError, RuntimeError):
    """A store of activations cannot be written or read: its place failed, or is not what was written."""

    page = "store-place"


class RowError(StoreError, IndexError):
    """A row, or a name, that a store does not have."""

    page = "row-unknown"


class DataError(FlexModelError, ValueError):
    """Texts or tokens that are to be batches cannot be read, or not as asked."""

    page = "data-unreadable"


class MissedHookWarning(UserWarning):
    """A hook is on and did not fire although it should have; the message says which, and why."""


class HarvestError(FlexModelError, RuntimeError):
    """Activations cannot go into rows: a site has none for a batch's tokens, or a run cannot be gone on with."""

    page = "harvest-rows"
