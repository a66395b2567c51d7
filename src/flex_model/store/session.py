"""``Session``: who may write a store. Each writer that opens one takes the next number; an older one is refused."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass

from flex_model.errors import StoreError
from flex_model.store import commits
from flex_model.store.place import Place

__all__ = ["Session"]

_FILE = "session.json"


@dataclass(frozen=True, slots=True)
class Session:
    """One writer's turn at the store in ``place``, with all its ranks."""

    place: Place
    number: int

    @classmethod
    def of(cls, place: Place) -> Session:
        """The one that is on."""
        data = place.read(_FILE)
        if data is None:
            raise StoreError(f"{place} is gone, or {_FILE} in it.", page="store-place")
        return cls(place, int(json.loads(data)["session"]))

    @classmethod
    def first(cls, place: Place) -> Session:
        """Of a new store, in a folder whose other files are not ours to remove."""
        session = cls(place, 0)
        session._tell()
        return session

    def next(self) -> Session:
        """Take the store over; what no commit names is removed from it."""
        session = Session(self.place, self.number + 1)
        try:
            session._tell()  # first of all, to a writer that still runs
        except OSError as error:  # on a full disk there is no room for that before some was made
            if error.errno != errno.ENOSPC:
                raise
            commits.drop_uncommitted(self.place)
            session._tell()
        commits.drop_uncommitted(self.place)
        return session

    def _tell(self) -> None:
        self.place.write(_FILE, json.dumps({"session": self.number}).encode())

    def check(self) -> None:
        """Raises StoreError if it is over."""
        if Session.of(self.place) != self:
            raise StoreError(
                f"{self.place}: another writer took this store over; one at a time may write it.", page="store-taken"
            )
