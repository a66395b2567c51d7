"""What ``FlexModel`` tells of itself: rows, pictures, a log, and whether what hooks see is right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

from flex_model.components.place import Place
from flex_model.core.naming.globs import Pattern
from flex_model.core.report import HookRow, PlanRow, SiteRow, hook_rows, plan_rows, site_rows

if TYPE_CHECKING:
    from flex_model.check.report import Report
    from flex_model.core.flex_model import FlexModel
    from flex_model.core.runtime import Runtime
    from flex_model.show import Picture

__all__ = ["Reporting"]


class Reporting:
    """The public names are ``FlexModel``'s; ``report.py``, ``flex_model.show`` and ``flex_model.check`` do the work."""

    _runtime: Runtime

    def hooks(self) -> list[HookRow]:
        """What is hooked: place, type, groups, on or off, times fired."""
        return hook_rows(self._runtime)

    def sites(self) -> list[SiteRow]:
        """What can be hooked, and the layouts known so far."""
        return site_rows(self._runtime)

    def plan(self) -> list[PlanRow]:
        """What each hook costs: layout, collective and elements moved a call, from the layouts known so far."""
        return plan_rows(self._runtime)

    def show(self, inputs: Any = None, *, forward: Callable[..., Any] | None = None) -> Picture:
        """The model as a picture: modules, parameters, what passes them, layouts, hooks and their groups.

        >>> fm.show(batch)                                                   # doctest: +SKIP
        >>> print(fm)                                                        # doctest: +SKIP

        With ``inputs`` (this rank's: a dict of keywords, a tuple of arguments, or one of them) one forward is looked
        at, in eval mode, and what is found is kept; all ranks call it. ``forward`` calls the model instead, such as a
        schedule's ``eval``. Without, and by ``print``, it shows what was found before, and what hooks have met. No
        value is moved, only sizes.
        """
        from flex_model.show.picture import picture

        return picture(cast("FlexModel", self), inputs, forward)

    def log(self, path: str | Path, *patterns: Pattern | Place, every: int = 1) -> AbstractContextManager[None]:
        """While the block runs, write what each forward does to the folder ``path``, for ``flex-model watch path``.

        >>> with fm.log("run", fm.at("resid_post"), every=10):               # doctest: +SKIP
        ...     train(fm)

        Each rank appends to a file of its own: when, which hooks have fired, and of the values that the patterns match,
        each ``every`` forwards, the root mean square. Nothing is moved between ranks, and a folder
        that cannot be written any more is a warning. All ranks enter and leave the block.
        """
        from flex_model.show.log import logged

        return logged(cast("FlexModel", self), path, patterns, every)

    def __str__(self) -> str:
        from flex_model.show.picture import tree_of

        return tree_of(cast("FlexModel", self))

    def check(
        self,
        inputs: Any,
        *,
        reference: nn.Module | Callable[[], nn.Module] | Literal[False] | None = None,
        patterns: Pattern | Place = "**",
        rtol: float | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        grad: bool = True,
    ) -> Report:
        """Is what hooks see right here? One forward and backward on this rank's ``inputs``, in eval mode; all ranks.

        Compared are all sites with the unsharded model (``reference``: it, or what makes it, on the lowest rank; made
        of whole parameters where it is not given; False: not compared), and replicas and parameters across the ranks
        that should have the same; what is not finite is counted. ``loss`` takes the output, and should be a mean over
        the batch; the default is the mean square of the output. ``rtol``: of a tensor's norm.

        >>> fm.check(batch).raise_if_failed()                                # doctest: +SKIP
        """
        from flex_model.check.parity import check

        return check(
            cast("FlexModel", self), inputs, reference=reference, patterns=patterns, rtol=rtol, loss=loss, grad=grad
        )
