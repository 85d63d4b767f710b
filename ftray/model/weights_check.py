"""Weights that are no numbers: a base with an infinite or NaN weight gives no finite loss in any step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.errors import ModelError


def check_finite(model: Any, base: str) -> None:
    """Looks at every weight of a model once, while it is in host memory.

    Args:
        model: A model with its values; quantized layers are judged by the scales of their blocks.
        base: `model.base`, for the message.

    Raises:
        ModelError: A weight is infinite or NaN; it names the file and the tensor.
    """
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not all(map(_is_finite, _values(parameter))):
            file, tensor = _find_in_files(Path(base).expanduser(), name) or ("its weights", name)
            raise ModelError(
                f"model.base {base}: {file} has an infinite or NaN value in {tensor}; download or write the weights again"
            )


def _values(parameter: Any) -> Iterator[Any]:
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in (state.absmax, getattr(state, "offset", None)) if value is not None)
        state = getattr(state, "state2", None)


def _is_finite(values: Any) -> bool:
    """One pass without a copy: NaN and infinity show in the extremes."""
    import torch

    if values.is_meta or not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() < 2:  # torch has no extremes of 8-bit floats
        values = values.float()
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def _find_in_files(directory: Path, name: str) -> tuple[str, str] | None:
    """(file, tensor) of the first value that is not finite; the tensor of that name first."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                keys = sorted(file.keys(), key=lambda key: key != name)
                if bad := next((key for key in keys if not _is_finite(file.get_tensor(key))), None):
                    return path.name, bad
        except (SafetensorError, OSError):
            continue
    return None
