"""Every error that ftray raises on purpose.

    FtrayError                the message is for the user; each class has an exit code
    ├── InputError            2: wrong input, nothing was started
    │   ├── ConfigError          the run file or an override
    │   ├── DataError            a source, a record, a split
    │   ├── ModelError           a model directory or an adapter
    │   └── StorageError         a bucket or path that can't be read or written
    ├── RunHeldError          2: another live process owns the run
    ├── RunError              1: the run started and failed
    │   └── CheckpointError      a checkpoint that is damaged or can't be committed
    ├── GateError             3: a gate refused the model
    ├── Preempted             75: the machine is going away; run again to continue
    └── Interrupted           130: Ctrl-C; run again to continue

A message names the key or file, the value, and the remedy, in one or two sentences.
"""


class FtrayError(Exception):
    """Base of all errors for the user; printed without a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message  # Ray Data adds its own advice to `args`

    def __str__(self) -> str:
        return self.message


class InputError(FtrayError):
    """The user's input is wrong and nothing was started."""

    exit_code = 2


class ConfigError(InputError):
    """A run file or an override that can't be carried out."""


class DataError(InputError):
    """A source, record or split that can't be trained on."""


class ModelError(InputError):
    """A model directory, adapter or tokenizer that can't be used."""


class StorageError(InputError):
    """A path or bucket that can't be read or written."""


class RunHeldError(FtrayError):
    """Another live process owns the run."""

    exit_code = 2


class RunError(FtrayError):
    """The run started and failed."""


class CheckpointError(RunError):
    """A checkpoint that is damaged or can't be committed."""


class GateError(FtrayError):
    """A gate refused the model."""

    exit_code = 3


class Preempted(FtrayError):
    """The machine is going away; the same command continues the run."""

    exit_code = 75


class Interrupted(FtrayError):
    """Ctrl-C; the same command continues the run."""

    exit_code = 130


def innermost(error: BaseException) -> BaseException:
    """The original error inside Ray's wrapper exceptions. Stops at the first FtrayError."""
    visited: set[int] = set()
    while id(error) not in visited:
        visited.add(id(error))
        below = getattr(error, "cause", None) or error.__cause__
        if not isinstance(below, BaseException) or (
            isinstance(error, FtrayError) and type(error).__module__.startswith("ftray.")
        ):
            return error
        error = below
    return error
