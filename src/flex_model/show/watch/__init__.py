"""A page about a run that goes on: it reads what the run writes, and cannot disturb it.

``reading`` finds what is new in the folder, ``server`` shows it on this machine's loopback.
"""

from flex_model.show.watch.server import serve

__all__ = ["serve"]
