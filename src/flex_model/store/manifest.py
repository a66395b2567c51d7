"""``Manifest``: what a store holds; and JSON that knows when it is damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from flex_model.errors import StoreError
from flex_model.store.dtypes import dtype_name, numpy_dtype
from flex_model.store.place import MANIFEST, Place
from flex_model.store.segment import checksum

__all__ = ["FORMAT", "Manifest", "StoredSite", "pack", "unpack"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StoredSite:
    """The shape of one row of a site, and its dtype; ``layout`` is for people to read.

    >>> StoredSite((576,), torch.bfloat16)                                              # doctest: +SKIP
    StoredSite(shape=(576,), dtype='bfloat16', layout='')
    """

    shape: tuple[int, ...] = ()
    dtype: Any = "float32"
    layout: str = ""

    def __post_init__(self) -> None:
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(int(s) for s in self.shape)
        if any(s < 1 for s in shape):
            raise StoreError(f"expected a shape of sizes from 1, got {shape}.", page="bad-argument")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def width(self) -> int:
        """Numbers in a row, which are its columns: the row flattened."""
        return prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.width * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """Sites, side columns (one number a row) and what was said about them; written once."""

    sites: dict[str, StoredSite]
    columns: dict[str, StoredSite]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, StoredSite]:
        return {**self.sites, **self.columns}

    def save(self, place: Place) -> None:
        kinds = {"sites": self.sites, "columns": self.columns}
        listed = {
            kind: {name: {"shape": s.shape, "dtype": s.dtype, "layout": s.layout} for name, s in sites.items()}
            for kind, sites in kinds.items()
        }
        place.write(MANIFEST, pack({"format": FORMAT, **listed, "about": self.about}, indent=1))

    @classmethod
    def load(cls, place: Place) -> Manifest | None:
        """None where there is no store."""
        data = place.read(MANIFEST)
        if data is None:
            return None
        body = unpack(data, what=f"{place}/{MANIFEST}")
        if body["format"] != FORMAT:
            raise StoreError(
                f"{place} has format {body['format']}, and this version reads {FORMAT}; use the version that wrote it "
                f"({body['about'].get('flex_model', 'not said')}).",
                page="store-damaged",
            )
        return cls(_sites(body["sites"]), _sites(body["columns"]), body["about"])


def _sites(listed: Mapping[str, Mapping[str, Any]]) -> dict[str, StoredSite]:
    return {name: StoredSite(tuple(s["shape"]), s["dtype"], s["layout"]) for name, s in listed.items()}


def pack(body: Any, *, indent: int | None = None) -> bytes:
    """JSON with a checksum of its text."""
    text = json.dumps(body, indent=indent).encode()
    return b'{"check": "%b", "body": %b}' % (checksum(text).encode(), text)


_PACKED = re.compile(rb'\{"check": "([0-9a-f]{32})", "body": (.*)\}', re.DOTALL)


def unpack(data: bytes, *, what: str) -> Any:
    """The body; StoreError where it is not what was packed."""
    packed = _PACKED.fullmatch(data)
    if packed is None or checksum(packed[2]) != packed[1].decode():
        raise StoreError(
            f"{what} is not what was written: its checksum differs; bring the file back from a copy.",
            page="store-damaged",
        )
    return json.loads(packed[2])
