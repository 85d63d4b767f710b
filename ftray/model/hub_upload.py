"""A directory of a model to a repository of the Hugging Face hub, through its own library. Knows no runs.

The token (HF_TOKEN, or what `hf auth login` left) and the endpoint (HF_ENDPOINT) are the library's own; the token appears
in no message. A repository that is made is private; one that is there stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftray.errors import ConfigError, FtrayError, RunError
from ftray.redact import redacted

PREFIX = "hub:"
# Of what was there before, goes: an adapter beside whole weights, or old shards, would be loaded with the new ones.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja")


def check_push(address: str) -> str:
    """The `org/name` of `hub:org/name`, once the hub has said that it knows the token.

    Raises ConfigError for an address of another form, no token, or one that the hub refuses; RunError where it can't be
    reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = address.removeprefix(PREFIX)
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if not address.startswith(PREFIX) or name.count("/") != 1:
        raise ConfigError(f"--push {address} is no repository of the hub; write hub:org/name")
    if get_token() is None:
        raise ConfigError(f"--push {address} needs a token that may write there; set HF_TOKEN, or run: hf auth login")
    with _explained(address):
        HfApi().whoami()
    return name


def push(directory: Path, name: str, message: str) -> str:
    """Uploads all files of a directory as one commit; returns its address. Raises as `check_push` does."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    with _explained(PREFIX + name):
        if not api.repo_exists(name):
            api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, commit_message=message, delete_patterns=list(_MODEL_FILES)
        )
        return str(commit.commit_url)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """The library's errors as ours, without the token."""
    try:
        yield
    except Exception as err:  # noqa: BLE001 - the library's own, its HTTP library's, those of its uploader in Rust
        raise _explain(address, err) from None


def _explain(address: str, err: BaseException) -> FtrayError:
    from huggingface_hub import constants, get_token

    while err.__cause__ is not None and not hasattr(err, "response"):  # an upload's thread wraps what happened
        err = err.__cause__
    status = getattr(getattr(err, "response", None), "status_code", None)
    if status == 401:
        return ConfigError(
            f"--push {address}: {constants.ENDPOINT} refuses the token; make another, and set HF_TOKEN to it"
        )
    if status == 403:
        return ConfigError(
            f"--push {address}: the token may not write there; give it that right, or choose another name"
        )
    if status in (400, 404, 422):
        reason = redacted(" ".join(str(err).split())).replace(get_token() or "\0", "…")[:300]
        return ConfigError(f"--push {address}: {constants.ENDPOINT} refuses it ({reason}); correct what it names")
    if constants.is_offline_mode():
        return ConfigError(f"--push {address}: HF_HUB_OFFLINE is set; unset it")
    reason = redacted(" ".join(str(err).split())).replace(get_token() or "\0", "…")[:200] or type(err).__name__
    what = "does not answer as a hub does" if status is not None else "can't be reached"
    return RunError(f"--push {address}: {constants.ENDPOINT} {what} ({reason}); run the command again")
