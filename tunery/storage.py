"""Objects. Keys are minted by us and written once; what is published was read back first."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tunery import failpoints
from tunery.contracts.events import FileEntry
from tunery.errors import Unavailable
from tunery.settings import MIB, StorageSettings

_BLOCK = MIB
_MOST_AT_ONCE = 1000
"""Keys in one request to delete: S3's limit."""
_FAULTS = (BotoCoreError, ClientError)


class CorruptObject(Exception):
    """What the store returned is not what was put there."""


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it."""

    key: str
    bytes: int
    modified: datetime


class Storage:
    """One bucket of an S3 service. Raises `Unavailable` when the service does not answer."""

    def __init__(self, settings: StorageSettings, *, patient: bool = True) -> None:
        """`patient` waits and tries again, for data; the other gives up in a second, for questions."""
        self.bucket = settings.s3_bucket
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id.get_secret_value(),
            aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
            config=Config(
                connect_timeout=5 if patient else 1,
                read_timeout=60 if patient else 1,
                retries={"mode": "standard", "total_max_attempts": 5 if patient else 1},
                s3={"addressing_style": "path"},
            ),
        )
        self._transfer = TransferConfig(multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=4)

    def ping(self, prefix: str | None = None) -> None:
        """Raises Unavailable unless the bucket, or what lies below `prefix`, can be reached."""
        if prefix is None:
            self._do(lambda: self._client.head_bucket(Bucket=self.bucket))
        else:
            self._do(lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1))

    def put(self, key: str, stream: BinaryIO) -> None:
        def sent(_: int) -> None:
            failpoints.reach("store.part")

        self._do(lambda: self._client.upload_fileobj(stream, self.bucket, key, Config=self._transfer, Callback=sent))

    def put_bytes(self, key: str, data: bytes) -> None:
        self._do(lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=data))

    def put_verified(self, key: str, path: Path, sha256: str) -> None:
        """Store a file and read it back: a server may acknowledge what it has not kept.

        Raises:
            CorruptObject: twice in a row nothing came back, or something with another hash.
        """
        for _ in range(2):
            with path.open("rb") as stream:
                self.put(key, stream)
            if self._hash(key) == sha256:
                return
        raise CorruptObject(f"{key} did not come back as it was stored")

    def _hash(self, key: str) -> str | None:
        sha = hashlib.sha256()
        try:
            for block in self.read(key):
                sha.update(block)
        except KeyError:
            return None
        return sha.hexdigest()

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The object's bytes from `start`, in blocks."""
        extra = {"Range": f"bytes={start}-"} if start else {}
        try:
            body = self._do(lambda: self._client.get_object(Bucket=self.bucket, Key=key, **extra))["Body"]
        except KeyError:
            raise KeyError(key) from None
        try:
            yield from body.iter_chunks(_BLOCK)
        except _FAULTS as error:
            raise Unavailable("The object store broke off a transfer.", fix="Try again.") from error
        finally:
            body.close()

    def get_bytes(self, key: str) -> bytes | None:
        """A small object whole, or None if there is none."""
        try:
            return b"".join(self.read(key))
        except KeyError:
            return None

    def fetch(self, key: str, path: Path, sha256: str) -> None:
        """Bring an object to `path`, which appears only once its hash is right.

        Raises:
            CorruptObject: twice in a row the bytes had another hash.
            KeyError: there is no such object.
        """
        part = path.with_name(path.name + ".part")
        for _ in range(2):
            sha = hashlib.sha256()
            with part.open("wb") as out:
                for block in self.read(key):
                    sha.update(block)
                    out.write(block)
            if sha.hexdigest() == sha256:
                part.rename(path)
                return
        part.unlink(missing_ok=True)
        raise CorruptObject(f"{key} does not have the recorded hash")

    def delete(self, key: str) -> None:
        self._do(lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def delete_all(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone already count as deleted. Raises Unavailable if one is still there."""
        for start in range(0, len(keys), _MOST_AT_ONCE):
            wanted = {"Objects": [{"Key": key} for key in keys[start : start + _MOST_AT_ONCE]], "Quiet": True}
            answer = self._do(lambda wanted=wanted: self._client.delete_objects(Bucket=self.bucket, Delete=wanted))
            if left := [error for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"]:
                raise Unavailable(f"The object store did not delete {left[0].get('Key')}: {left[0].get('Message')}.")

    def keys(self, prefix: str) -> Iterator[str]:
        """Keys below `prefix`, in order."""
        return (found.key for found in self.objects(prefix))

    def objects(self, prefix: str) -> Iterator[Stored]:
        """What lies below `prefix`, in order of the keys."""
        wanted = {"Bucket": self.bucket, "Prefix": prefix}
        while True:
            page = self._do(lambda: self._client.list_objects_v2(**wanted))
            for found in page.get("Contents", []):
                yield Stored(found["Key"], found["Size"], found["LastModified"])
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def abort_uploads(self, older_than: datetime) -> int:
        """End uploads in parts that began before that and that nobody finished; how many. Repeating it is right: a
        part that was on its way may land after the first abort."""
        after: dict[str, str] = {}
        aborted = 0
        while True:
            page = self._do(lambda after=after: self._client.list_multipart_uploads(Bucket=self.bucket, **after))
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < older_than:
                    self._abort(upload["Key"], upload["UploadId"])
                    aborted += 1
            if not page.get("IsTruncated"):
                return aborted
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, key: str, upload_id: str) -> None:
        def abort() -> None:
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)

        with suppress(KeyError):
            self._do(abort)

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def _do(self, call: Any) -> Any:
        try:
            return call()
        except _FAULTS as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] in (
                "NoSuchKey",
                "NoSuchUpload",
                "404",
            ):
                raise KeyError(str(error)) from error
            if isinstance(error, ClientError) and error.response["Error"]["Code"] == "RequestTimeTooSkewed":
                raise Unavailable(
                    "The object store refuses requests of this host: their clocks differ by more than it allows.",
                    fix="Set this host's clock; S3 allows 15 minutes.",
                ) from error
            raise Unavailable(
                "The object store does not answer.", fix="Try again; your operator sees the cause."
            ) from error


def manifest(directory: Path) -> list[FileEntry]:
    """Name, size and sha256 of every file below `directory`, by name."""
    found = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            sha = hashlib.file_digest(stream, "sha256").hexdigest()
        found.append(FileEntry(name=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=sha))
    return found
