"""transformers' ``generate`` on ranks whose sequences end at different steps."""

from __future__ import annotations

import sys

__all__ = ["keeps_company"]


def keeps_company() -> bool:
    """Whether ``generate`` runs the forward that begins now for other ranks' sake only: this rank has finished.

    With ``synced_gpus`` every rank goes on until all have finished, and throws away what it computes.
    """
    code = getattr(sys.modules.get("transformers.generation.utils"), "__file__", None)
    frame = None if code is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == code and "this_peer_finished" in frame.f_code.co_varnames:
            here = frame.f_locals
            return bool(here.get("synced_gpus")) and bool(here.get("this_peer_finished"))
        frame = frame.f_back
    return False
