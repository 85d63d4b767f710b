"""Files, local or s3://, with retries, atomic commits and leases.

Modules, from the bottom up: address (URIs), local (the disk), s3 (requests with one deadline), files (single files),
transfer (copies), documents (checked JSON), commit (a directory that is complete or does not exist), lease (the owner of a
run).

Functions with side effects are called through their module (`files.read_bytes`), so that a test can replace them in one
place.
"""

from ftray.storage.address import MANIFEST, MARK, FileInfo, MissingFile, absolute, is_remote, join
from ftray.storage.commit import (
    commit_directory,
    commit_files,
    fetch_directory,
    put_file,
    read_manifest,
    verify_directory,
)
from ftray.storage.documents import DamagedFile, find_object, parse_as, parse_object, read_object
from ftray.storage.files import (
    age_s,
    check_writable,
    create_bytes,
    delete,
    delete_tree,
    exists,
    glob_files,
    link_on_the_way,
    list_files,
    list_staged,
    read_bytes,
    read_range,
    size_and_etag,
    write_bytes,
)
from ftray.storage.lease import Lease, Token, acquire_lease, holds, live_owner
from ftray.storage.local import cache_directory
from ftray.storage.s3 import RETRY_S, Upload, abort_upload, brief, list_uploads, patient
from ftray.storage.transfer import download_file, map_file, upload_file

__all__ = [
    "MANIFEST",
    "MARK",
    "RETRY_S",
    "DamagedFile",
    "FileInfo",
    "Lease",
    "MissingFile",
    "Token",
    "Upload",
    "abort_upload",
    "absolute",
    "acquire_lease",
    "age_s",
    "brief",
    "cache_directory",
    "check_writable",
    "commit_directory",
    "commit_files",
    "create_bytes",
    "delete",
    "delete_tree",
    "download_file",
    "exists",
    "fetch_directory",
    "find_object",
    "glob_files",
    "holds",
    "is_remote",
    "join",
    "link_on_the_way",
    "list_files",
    "list_staged",
    "list_uploads",
    "live_owner",
    "map_file",
    "parse_as",
    "parse_object",
    "patient",
    "put_file",
    "read_bytes",
    "read_manifest",
    "read_object",
    "read_range",
    "size_and_etag",
    "upload_file",
    "verify_directory",
    "write_bytes",
]
