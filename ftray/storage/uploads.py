"""Uploads in parts that were begun and never completed: no listing of files shows them, and a store charges for them.

A local disk has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ftray.storage import s3
from ftray.storage.address import bucket_and_key, is_remote

GONE = ("NoSuchUpload", "404")


@dataclass(frozen=True)
class Upload:
    """An upload under way or left behind: the file's address, the store's name for it, bytes so far, seconds since its begin."""

    uri: str
    upload_id: str
    size_bytes: int
    age_s: float


def list_uploads(prefix_uri: str) -> list[Upload]:
    """Those below a directory, also of others who are at work there. Raises StorageError."""
    if not is_remote(prefix_uri):
        return []
    bucket, key = bucket_and_key(prefix_uri)
    found = []
    for entry, answered in _pages(bucket, f"{key}/" if key else ""):
        uri = f"s3://{bucket}/{entry['Key']}"
        age_s = max(0.0, (answered - entry["Initiated"]).total_seconds())
        found.append(Upload(uri, entry["UploadId"], _size(uri, entry["UploadId"]), age_s))
    return found


def abort_upload(upload: Upload) -> None:
    """Deletes its parts; one that is no more is fine. Raises StorageError."""
    s3.request("abort_multipart_upload", upload.uri, unless=GONE, UploadId=upload.upload_id)


def _pages(bucket: str, prefix: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each upload, and the time by the store's clock."""
    more: dict[str, Any] = {}
    while True:
        page = s3.request(
            "list_multipart_uploads", f"s3://{bucket}", shown=f"s3://{bucket}/{prefix}", Prefix=prefix, **more
        )
        answered = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for entry in page.get("Uploads", []):
            if entry["Key"].startswith(prefix):
                yield entry, answered
        if not page.get("IsTruncated"):
            return
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _size(uri: str, upload_id: str) -> int:
    total = 0
    more: dict[str, Any] = {}
    while True:
        page = s3.request("list_parts", uri, unless=GONE, UploadId=upload_id, **more)
        if page is None:
            return total
        total += sum(int(part["Size"]) for part in page.get("Parts", []))
        if not page.get("IsTruncated"):
            return total
        more = {"PartNumberMarker": page["NextPartNumberMarker"]}
