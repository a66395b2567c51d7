"""``Bucket``: a store in object storage (S3, Google Cloud Storage), through tensorstore."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flex_model.errors import StoreError
from flex_model.store.place import MANIFEST, Appending, Place, telling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flex_model.store.segment import Segment

__all__ = ["Bucket"]

_SCHEMES = ("s3://", "gs://")
# Of each request, two minutes of trying again: for what says that it is busy, and for nobody there.
RETRIES = {"max_retries": 12, "initial_delay": "250ms", "max_delay": "16s"}
PATIENCE = 180.0  # seconds for all tries of a request, and a second for each MiB of it: a server may also say nothing


class Bucket(Place):
    """Objects below a URL. An object is put as a whole, so that a segment is held in memory until it is closed.

    ``s3://``: keys and region from the usual environment (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ...), another server
    than Amazon's from ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``. ``gs://``: Google's application default
    credentials, another server from ``TENSORSTORE_GCS_HTTP_URL``.
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
            return {"driver": "gcs", "bucket": bucket, "path": path, "context": {"gcs_request_retries": RETRIES}}
        context = {"s3_request_retries": RETRIES}
        found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path, "context": context}
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
                self._opened = _done(_tensorstore().KvStore.open(self.spec))
        return self._opened

    def make(self) -> None:
        """A bucket is made by its owner."""

    def read(self, name: str) -> bytes | None:
        found = _done(self._files.read(name))
        return None if found.state == "missing" else bytes(found.value)

    def write(self, name: str, data: bytes) -> None:
        _done(self.put(name, data), len(data))

    def put(self, name: str, data: bytes) -> Any:
        """tensorstore's future."""
        return self._files.write(name, data)

    def appending(self, name: str) -> Appending:
        return _Object(self, name)

    def listing(self, folder: str) -> list[str]:
        found = self._list(f"{folder}/", f"{folder}0")  # "0" is what comes after "/"
        # tensorstore takes Google's refusal to list for an empty list: look for what must be there
        if not found and self.read(MANIFEST) is not None and not self._list(MANIFEST, f"{MANIFEST}0"):
            raise StoreError(
                f"{self.url} can be read but not listed; grant this account the right to list the bucket's objects.",
                page="store-place",
            )
        return found

    def _list(self, first: str, end: str) -> list[str]:
        keys = _done(self._files.list(_tensorstore().KvStore.KeyRange(first, end)))
        return sorted(key.decode() for key in keys)

    def remove(self, names: list[str]) -> None:
        for future in [self._files.write(name, None) for name in names]:
            _done(future)

    def rows(self, segment: Segment) -> NDArray[Any]:
        tensorstore = _tensorstore()
        kvstore = {**self.spec, "path": self.spec["path"] + segment.folder + "/"}
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore, "metadata": segment.metadata()}
        spec |= {"fill_missing_data_reads": False}  # what is gone is not zeros
        opened = _done(tensorstore.open(spec, open=True, assume_metadata=True))
        found: NDArray[Any] = _Indexed(opened, segment.row_bytes)  # type: ignore[assignment]
        return found


class _Indexed:
    """Reads when it is indexed, as an array in memory does."""

    def __init__(self, array: Any, row_bytes: int) -> None:
        self._array, self._row_bytes = array, row_bytes

    def __getitem__(self, rows: Any) -> Any:
        part = self._array[rows]
        return _done(part.read(), part.shape[0] * self._row_bytes)


class _Object(Appending):
    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._pieces: list[Any] = []

    def append(self, data: Any) -> None:
        self._pieces.append(data)

    def close(self, *, durable: bool = True) -> None:
        whole = b"".join(self._pieces)
        self._pieces = []
        size, future = len(whole), self._bucket.put(self._name, whole)
        del whole  # tensorstore has its own, and it may be long under way
        _done(future, size)

    def drop(self) -> None:
        self._pieces = []


def _done(future: Any, size: int = 0) -> Any:
    """Its result. The server must answer in time."""
    try:
        return future.result(timeout=PATIENCE + size / 2**20)
    except TimeoutError:
        future.cancel()
        raise


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError:
        raise StoreError("a store by URL needs tensorstore; install flex-model[store].", page="not-installed") from None
    return tensorstore
