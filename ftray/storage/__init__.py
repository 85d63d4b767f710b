"""One way to files, local or s3://. Knows neither what the files hold nor any room but errors.

An address says where (address). Each of the two kinds of place keeps its own promises: on the disk (local) what is
written appears at once and whole, S3 (s3) is asked one request at a time, with one deadline and refusals in words. On
both stand single files (files), their copies (transfer), JSON that is checked while it is read (documents) and what is
left of copies that broke off (uploads); on those a directory that is whole or does not exist (commit), and the lease that
names the one owner of a run (lease). Beside them, what can be made again (cache).

What touches the world is called by module, `files.read_bytes`, never imported by name: a test replaces it in one place.
"""

from ftray.storage.address import MANIFEST, MARK, FileInfo, MissingFile, absolute, is_remote, join
from ftray.storage.cache import cache_directory
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
from ftray.storage.lease import Lease, Token, acquire_lease, holds
from ftray.storage.s3 import RETRY_S, brief, patient
from ftray.storage.transfer import download_file, map_file, upload_file
from ftray.storage.uploads import Upload, abort_upload, list_uploads

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
