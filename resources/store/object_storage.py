"""Artifacts in an object store (S3 and compatible services, Google, Azure, or this process's memory).

obstore, not fsspec: its conditional put (``If-None-Match: *``) is the same on every service, a put
is all or nothing even when multipart, there is no listing cache that hides what other processes
wrote, and it is one package that pins no others. Credentials and endpoint come from the
environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``,
or ``AWS_PROFILE`` (with boto3 installed).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import MemoryStore, from_url

from resources.store.durable import ArtifactError, temporary_name

CHUNK_BYTES = 16 * 2**20
_memories: dict[str, MemoryStore] = {}  # memory://name is one store for the whole process


class ObjectStorage:
    """A bucket, or a prefix of it. See `resources.store.storage.Storage`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.prefix = parts.path.strip("/")
        bucket = f"{parts.scheme}://{parts.netloc}"
        self.url = f"{bucket}/{self.prefix}" if self.prefix else bucket
        if not parts.netloc and parts.scheme != "memory":
            raise ArtifactError(f"{url}: the URL names no bucket, e.g. {parts.scheme}://bucket/folder")
        with self._errors("open", ""):
            if parts.scheme == "memory":
                self.store: Any = _memories.setdefault(parts.netloc, MemoryStore())
            else:
                self.store = from_url(bucket, **_options(parts.scheme))
        self._is_ready = False

    def place(self, path: str) -> str:
        return f"{self.url}/{path}"

    def read(self, path: str) -> bytes | None:
        with self._errors("read", path):
            try:
                return bytes(self.store.get(self._name(path)).bytes())
            except FileNotFoundError:
                return None

    def replace(self, path: str, data: bytes) -> None:
        with self._errors("write", path):
            self.store.put(self._name(path), data)

    def create(self, path: str, data: bytes) -> bool:
        with self._errors("write", path):
            try:
                self.store.put(self._name(path), data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def entries(self, prefix: str) -> dict[str, tuple[int, datetime]]:
        start = len(self.prefix) + 1 if self.prefix else 0
        with self._errors("list", prefix):
            found = self.store.list(self._name(prefix)).collect()
        return {m["path"][start:]: (m["size"], m["last_modified"].astimezone(UTC)) for m in found}

    def remove(self, prefix: str) -> None:
        with self._errors("remove", prefix):
            names = [self._name(path) for path in self.entries(prefix)]
            if not names and self.read(prefix) is not None:
                names = [self._name(prefix)]
            if names:
                self.store.delete(names)

    def upload(self, path: str, source: Path) -> None:
        with self._errors("write", path):
            self.store.put(self._name(path), source)

    def download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(target)
        try:
            with self._errors("read", path), temporary.open("wb") as stream:
                for chunk in self.store.get(self._name(path)).stream(min_chunk_size=CHUNK_BYTES):
                    stream.write(chunk)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def ready(self) -> None:
        """Reject a service that accepts a second create of the same name (some S3 gateways do)."""
        if self._is_ready:
            return
        probe = f".probe-{secrets.token_hex(8)}"
        try:
            first, second = self.create(probe, b"1"), self.create(probe, b"2")
        finally:
            self.remove(probe)
        if not first or second:
            raise ArtifactError(
                f"{self.url}: this service ignores If-None-Match, so two processes could overwrite "
                "each other's artifacts: use one with conditional writes, or a local folder"
            )
        self._is_ready = True

    def filesystem(self) -> AbstractFileSystem:
        return _FileSystem(self)

    def _name(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path.strip("/")) if part)

    @contextlib.contextmanager
    def _errors(self, doing: str, path: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            reason = str(error).splitlines()[0].split(": <?xml")[0]
            raise ArtifactError(
                f"cannot {doing} {self.place(path)}: {reason} "
                "(check the bucket, the network, and the credentials in the environment)"
            ) from error


def _options(scheme: str) -> dict[str, Any]:
    """Options that `from_url` does not read from the environment itself."""
    options: dict[str, Any] = {}
    if scheme != "s3":
        return options
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["client_options"] = {"allow_http": True}
    if os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ModuleNotFoundError as error:
            raise ArtifactError("AWS_PROFILE is set, which requires boto3: pip install boto3") from error
        options["credential_provider"] = Boto3CredentialProvider()
    return options


class _FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The few reads that DuckDB needs from an fsspec file system, on top of an `ObjectStorage`."""

    cachable = False

    def __init__(self, storage: ObjectStorage) -> None:
        super().__init__()
        self.protocol = storage.url.split("://")[0]
        self.objects = storage.store

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]  # names are given in full, never as patterns

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = self.objects.head(self._key(path))
        return {
            "name": path,
            "size": found["size"],
            "type": "file",
            "mtime": found["last_modified"],
        }

    def modified(self, path: str) -> datetime:
        modified: datetime = self.info(path)["mtime"]
        return modified

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> AbstractBufferedFile:
        size = self.info(path)["size"]
        return _File(self, path, mode, cache_type="none", size=size)

    def _key(self, path: str) -> str:
        return path.split("://", 1)[1].partition("/")[2]


class _File(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(obstore.get_range(self.fs.objects, self.fs._key(self.path), start=start, end=end))
