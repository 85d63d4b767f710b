"""S3, spoken through s3fs's client, one request at a time (`request`): retries, and refusals in words.

Never through s3fs's file methods: those cache listings, and retry with limits of their own. So there is one deadline,
and one place that tells a passing trouble from a refusal. Keys, endpoint and region come from where AWS's own tools
take them: AWS_ENDPOINT_URL_S3, AWS_PROFILE. fsspec and s3fs are imported at the first request. Knows no local file.
"""

import math
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from ftray.errors import StorageError
from ftray.storage.address import MissingFile, bucket_and_key, is_remote

RETRY_S = 60.0  # how long passing S3 troubles are retried; FTRAY_STORAGE_RETRY_S overrides it
MISSING = ("404", "NoSuchKey")  # the codes of an object that is not there
retry_s: ContextVar[float | None] = ContextVar("retry_s", default=None)  # a shorter deadline for one caller
PATIENCE = 10.0  # times RETRY_S that work in the background waits for a store that is down
# Not the global generator: training seeds that one, and a retry must not change what it draws.
_jitter = random.Random()
_connecting: dict[int, threading.Lock] = {}  # by pid: a forked child must not wait for a lock of its parent
_REASONS = {
    "AccessDenied": "{endpoint} denies access to {uri}; check the keys (AWS_ACCESS_KEY_ID, AWS_PROFILE), and that they "
    "may list, read, write and delete in bucket '{bucket}'",
    "ExpiredToken": "the session token used for {uri} has expired or is not valid; log in again (AWS_SESSION_TOKEN)",
    "InvalidAccessKeyId": "{endpoint} does not know the access key id used for {uri}; correct AWS_ACCESS_KEY_ID",
    "InvalidBucketName": "'{bucket}' is not a valid bucket name; correct the address {uri}",
    "NoCredentialsError": "{uri} needs S3 keys, and there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "NoSuchBucket": "bucket '{bucket}' does not exist at {endpoint}; create it, or correct the address {uri}",
    "NotImplemented": "{endpoint} can't do what {uri} needs; use a store with conditional writes (If-None-Match)",
    "PermanentRedirect": "bucket '{bucket}' is in another region than the one that was asked; set AWS_REGION",
    "PreconditionFailed": "{uri} changed while it was read; try again",
    "RequestTimeTooSkewed": "the clock of this machine is off, so {endpoint} refuses {uri}; set the clock",
    "SignatureDoesNotMatch": "{endpoint} refuses the signature for {uri}; correct AWS_SECRET_ACCESS_KEY",
}
_SAME = {
    "301": "PermanentRedirect",
    "403": "AccessDenied",
    "412": "PreconditionFailed",
    "AuthorizationHeaderMalformed": "PermanentRedirect",
    "InvalidToken": "ExpiredToken",
    "PartialCredentialsError": "NoCredentialsError",
}
# 4xx that pass all the same; 429 and 5xx always do, except 501.
_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}


def _filesystem() -> Any:
    """s3fs's filesystem for this process and these AWS settings; fsspec's own would differ by thread."""
    pid = os.getpid()
    with _connecting.setdefault(pid, threading.Lock()):
        return _connect(pid, tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _connect(_pid: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    import s3fs

    # One attempt here: `request` retries. 64 connections: all threads of a commit and of a few readers beside it.
    config = {
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,
        "connect_timeout": 5,
        "read_timeout": 30,
    }
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    filesystem.connect()
    return filesystem


@contextmanager
def patient() -> Iterator[None]:
    """Inside, requests wait PATIENCE times as long for a store that is down, and for keys that expired to be renewed."""
    before = retry_s.set(PATIENCE * _default_retry_s())
    try:
        yield
    finally:
        retry_s.reset(before)


@contextmanager
def brief(seconds: float) -> Iterator[None]:
    """Inside, requests wait at most so long for a store that is down."""
    before = retry_s.set(min(seconds, retry_s.get() or _default_retry_s()))
    try:
        yield
    finally:
        retry_s.reset(before)


def _default_retry_s() -> float:
    return float(os.environ.get("FTRAY_STORAGE_RETRY_S", RETRY_S))


async def _send(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
    response = await getattr(client, operation)(**arguments)
    if "Body" in response:
        async with response["Body"] as body:
            response["Body"] = await body.read()
    return response


def request(operation: str, uri: str, unless: tuple[str, ...] = (), shown: str = "", **arguments: Any) -> Any:
    """The answer to one S3 request about `uri`, its Body read; None if the store refuses with a code in `unless`.

    Passing troubles (5xx, SlowDown, resets, timeouts, cut answers) are retried with exponential backoff and jitter
    until the deadline of RETRY_S. Errors name `shown`, or else `uri`. Raises MissingFile, and StorageError with the remedy.
    """
    from fsspec.asyn import sync

    bucket, key = bucket_and_key(uri)
    shown = shown or uri
    arguments = {"Bucket": bucket, **({"Key": key} if key else {}), **arguments}
    budget_s = retry_s.get() or _default_retry_s()
    renewals = math.inf if budget_s > _default_retry_s() else 1
    deadline = time.monotonic() + budget_s
    pause_s = 0.1
    while True:
        try:
            filesystem = _filesystem()
            return sync(filesystem.loop, _send, filesystem.s3, operation, arguments)
        except Exception as error:
            code = _refusal(error)[0]
            if code in unless:
                return None
            expired = _SAME.get(code, code) == "ExpiredToken"
            if expired and renewals and time.monotonic() + pause_s <= deadline:
                _connect.cache_clear()  # a new session reads the keys again: a file, a role, a process may have new ones
                renewals -= 1
            elif expired or not _is_passing(error):
                raise _explained(shown, error) from error
            if time.monotonic() + pause_s > deadline:
                failed = "can't be reached" if "Connect" in code else "gave no good answer"
                raise StorageError(
                    f"{_endpoint()} {failed} for {shown} within {budget_s:.3g} s (last: {code}); check "
                    "AWS_ENDPOINT_URL_S3 and the network, or try longer with FTRAY_STORAGE_RETRY_S"
                ) from error
        time.sleep(pause_s * _jitter.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 8.0)


def _refusal(error: Exception) -> tuple[str, int]:
    """The store's code and HTTP status; the name of the exception and 0 where the store said nothing."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return type(error).__name__, 0
    return str(response["Error"].get("Code")), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_passing(error: Exception) -> bool:
    from aiohttp import ClientError as ConnectionTrouble
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, boto.ClientError):
        code, status = _refusal(error)
        return code in _PASSING or status == 429 or (status >= 500 and status != 501)
    passing = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    others = (ConnectionTrouble, ResponseParserError, TimeoutError, ConnectionError)
    return isinstance(error, passing + others) and not isinstance(error, boto.SSLError)


def _endpoint() -> str:
    """The store's address, without a user or password that may stand in it."""
    parts = urlsplit(_filesystem().s3.meta.endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _explained(uri: str, error: Exception) -> StorageError:
    code, status = _refusal(error)
    bucket = bucket_and_key(uri)[0]
    if code in MISSING:
        return MissingFile(f"{uri} does not exist; check the address")
    if reason := _REASONS.get(_SAME.get(code, code)):
        return StorageError(
            reason.format(uri=uri, bucket=bucket, endpoint=_endpoint() if "{endpoint}" in reason else "")
        )
    if status:  # the store's own text may repeat parts of the request
        return StorageError(f"{_endpoint()} refuses {uri} with {code} (HTTP {status}); check the address and the keys")
    said = re.sub(r"//[^/@\s]*@", "//", str(error)).partition("\n")[0]
    return StorageError(f"{uri} can't be reached: {said} ({code}); check the AWS_ settings")


def read_range(uri: str, start: int, end: int, **condition: str) -> bytes:
    """Bytes [start, end) of an object, clipped at its end; `condition`: IfMatch. Raises MissingFile, StorageError."""
    # An empty range can't be asked for: ask for one byte, which tells a missing file, and drop it.
    asked = f"bytes={start}-{max(start, end - 1)}"
    response = request("get_object", uri, unless=("InvalidRange", "416"), Range=asked, **condition)
    return bytes(response["Body"])[: max(0, end - start)] if response else b""


def pages(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The objects of a bucket whose keys begin with `prefix`, all pages of them. Raises StorageError."""
    more: dict[str, Any] = {}
    while True:
        page = request("list_objects_v2", f"s3://{bucket}", shown=f"s3://{bucket}/{prefix}", Prefix=prefix, **more)
        yield from page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def etag(quoted: str, size_bytes: int) -> str:
    """What changes when an object does, from the ETag and the size that the store tells."""
    return f"{quoted.strip(chr(34))}-{size_bytes}"


UPLOAD_GONE = ("NoSuchUpload", "404")


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was not completed. No listing of files shows it, but the store charges for its parts."""

    uri: str
    upload_id: str
    size_bytes: int
    age_s: float


def list_uploads(prefix_uri: str) -> list[Upload]:
    """Incomplete uploads below a directory, also those of other processes. Raises StorageError."""
    if not is_remote(prefix_uri):
        return []
    bucket, key = bucket_and_key(prefix_uri)
    uploads = []
    for entry, now in _upload_pages(bucket, f"{key}/" if key else ""):
        uri = f"s3://{bucket}/{entry['Key']}"
        age_s = max(0.0, (now - entry["Initiated"]).total_seconds())
        uploads.append(Upload(uri, entry["UploadId"], _upload_size(uri, entry["UploadId"]), age_s))
    return uploads


def abort_upload(upload: Upload) -> None:
    """Deletes the parts of an upload, if it still exists. Raises StorageError."""
    request("abort_multipart_upload", upload.uri, unless=UPLOAD_GONE, UploadId=upload.upload_id)


def _upload_pages(bucket: str, prefix: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each upload, and the time of the store's clock."""
    more: dict[str, Any] = {}
    while True:
        page = request(
            "list_multipart_uploads", f"s3://{bucket}", shown=f"s3://{bucket}/{prefix}", Prefix=prefix, **more
        )
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for entry in page.get("Uploads", []):
            if entry["Key"].startswith(prefix):
                yield entry, now
        if not page.get("IsTruncated"):
            return
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _upload_size(uri: str, upload_id: str) -> int:
    total = 0
    more: dict[str, Any] = {}
    while True:
        page = request("list_parts", uri, unless=UPLOAD_GONE, UploadId=upload_id, **more)
        if page is None:
            return total
        total += sum(int(part["Size"]) for part in page.get("Parts", []))
        if not page.get("IsTruncated"):
            return total
        more = {"PartNumberMarker": page["NextPartNumberMarker"]}
