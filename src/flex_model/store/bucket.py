"""``Bucket``: a store in object storage (S3, Google Cloud Storage), through tensorstore."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flex_model.errors import StoreError
from flex_model.store.place import Appending, Place, telling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flex_model.store.segment import Segment

__all__ = ["Bucket"]

_SCHEMES = ("s3://", "gs://")


class Bucket(Place):
    """Objects below a URL. An object is put as a whole, so that a segment is held in memory until it is closed.

    ``s3://``: keys and region from the usual environment (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ...), another server
    than Amazon's from ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``.
    """

    buffers = True

    def __init__(self, url: str) -> None:
        if not url.startswith(_SCHEMES):
            raise StoreError(f"expected a folder or a URL of s3, gs or file, got {url!r}.", page="bad-argument")
        self.url = url.rstrip("/") + "/"
        self._opened: Any = None

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_opened": None}

    @property
    def spec(self) -> dict[str, Any]:
        """tensorstore's."""
        scheme, _, rest = self.url.partition("://")
        bucket, _, path = rest.partition("/")
        if scheme == "gs":
            return {"driver": "gcs", "bucket": bucket, "path": path}
        found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            found |= {"endpoint": endpoint.rstrip("/")}
        if endpoint or region:
            found |= {"aws_region": region or "us-east-1"}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # else tensorstore looks in files and asks the machine
            found |= {"aws_credentials": {"type": "environment"}}
        return found

    @property
    def _files(self) -> Any:
        if self._opened is None:
            with telling(f"{self.url} cannot be opened"):
                self._opened = _tensorstore().KvStore.open(self.spec).result()
        return self._opened

    def make(self) -> None:
        """A bucket is made by its owner."""

    def read(self, name: str) -> bytes | None:
        found = self._files.read(name).result()
        return None if found.state == "missing" else bytes(found.value)

    def write(self, name: str, data: bytes) -> None:
        self._files.write(name, data).result()

    def appending(self, name: str) -> Appending:
        return _Object(self, name)

    def listing(self, folder: str) -> list[str]:
        start = f"{folder}/"
        end = f"{folder}0"  # "0" is what comes after "/"
        keys = self._files.list(_tensorstore().KvStore.KeyRange(start, end)).result()
        return sorted(key.decode() for key in keys)

    def remove(self, names: list[str]) -> None:
        for future in [self._files.write(name, None) for name in names]:
            future.result()

    def rows(self, segment: Segment) -> NDArray[Any]:
        tensorstore = _tensorstore()
        spec = {"driver": "zarr3", "kvstore": {**self.spec, "path": self.spec["path"] + segment.folder + "/"}}
        opened = tensorstore.open({**spec, "metadata": segment.metadata()}, open=True, assume_metadata=True)
        found: NDArray[Any] = _Indexed(opened.result())  # type: ignore[assignment]
        return found


class _Indexed:
    """Reads when it is indexed, as an array in memory does."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, rows: Any) -> Any:
        return self._array[rows].read().result()


class _Object(Appending):
    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._pieces: list[Any] = []

    def append(self, data: Any) -> None:
        self._pieces.append(data)

    def close(self, *, durable: bool = True) -> None:
        data = b"".join(bytes(piece) if not isinstance(piece, bytes) else piece for piece in self._pieces)
        self._pieces = []
        self._bucket.write(self._name, data)

    def drop(self) -> None:
        self._pieces = []


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError:
        raise StoreError("a store by URL needs tensorstore; install flex-model[store].", page="not-installed") from None
    return tensorstore
