"""Many LoRA adapters over one base, mixed in one batch: each token is adapted by its own request's adapter.

Knows adapter directories and torch, but not scheduling, HTTP or registries. PEFT selects an adapter per row of a batch, but
continuous batching packs all requests into one row. So a hook on each linear layer adds B(A(x)) · scaling to the tokens of the
requests that use the adapter, as PEFT computes it, and leaves all other tokens unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear

from ftray.engine.adapters import WEIGHTS_FILE, AdapterSettings, check_adapter, read_adapter_files
from ftray.engine.protocol import EngineError
from ftray.errors import ModelError


@dataclass(frozen=True)
class AdapterWeights:
    """One layer's weights.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        growth: DoRA's magnitude divided by the norm of the adapted weight, [out].
    """

    a: torch.Tensor
    b: torch.Tensor
    growth: torch.Tensor | None


class LoadedAdapter:
    """A loaded adapter. Running requests keep it alive after it was unloaded."""

    def __init__(self, name: str, scaling: float, layers: dict[str, AdapterWeights]) -> None:
        self.name, self.scaling, self.layers = name, scaling, layers

    def __deepcopy__(self, memo: Any) -> LoadedAdapter:
        return self  # a request that is evicted from the cache is copied


class MixedLora:
    """The adapters of one model, and the tokens of the next batch that each of them adapts. Without hooks until `attach`."""

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        self._loaded: dict[str, LoadedAdapter] = {}
        self._groups: list[tuple[LoadedAdapter, slice | torch.Tensor]] = []
        self._num_tokens = 0
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Adds a hook to each linear layer."""
        for name, module in self._layers.items():

            def hook(module: Any, args: Any, output: Any, name: str = name) -> Any:
                return self._adapt(name, module, args[0], output) if self._groups else None

            self._handles.append(module.register_forward_hook(hook))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._loaded)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of this name. Raises ModelError if it is not loaded."""
        if name not in self._loaded:
            raise ModelError(f"the adapter {name} is not loaded")
        return self._loaded[name]

    def load(self, name: str, directory: Path) -> None:
        """Reads an adapter directory. It is checked against the base before a tensor is read. Any thread.

        Raises:
            ModelError: It does not fit the base.
        """
        try:
            settings, shapes = read_adapter_files(directory)
            with safe_open(directory / WEIGHTS_FILE, "pt") as file:
                base = {f"{layer}.weight": list(module.weight.shape) for layer, module in self._layers.items()}
                parts = check_adapter(settings, shapes, base, str(directory))
                layers = {
                    layer: self._weights(layer, settings, {part: file.get_tensor(key) for part, key in names.items()})
                    for layer, names in parts.items()
                }
        except (OSError, SafetensorError) as err:
            raise ModelError(f"{directory} can't be read as an adapter ({err}); publish it again") from None
        self._loaded[name] = LoadedAdapter(name, settings.scaling, layers)

    def unload(self, name: str) -> None:
        """Removes an adapter for new requests. Unknown names are ignored."""
        self._loaded.pop(name, None)

    def route(self, requests: Iterable[tuple[LoadedAdapter | None, int]], device: torch.device) -> None:
        """Assigns the tokens of the next batch to adapters. requests: adapter and number of tokens of each, in their order."""
        ranges: dict[int, tuple[LoadedAdapter, list[range]]] = {}
        start = 0
        for adapter, length in requests:
            if adapter is not None and length:
                ranges.setdefault(id(adapter), (adapter, []))[1].append(range(start, start + length))
            start += length
        self._num_tokens = start
        self._groups = [(adapter, _rows(found, device)) for adapter, found in ranges.values()]

    @torch.no_grad()
    def _weights(self, layer: str, settings: AdapterSettings, parts: dict[str, torch.Tensor]) -> AdapterWeights:
        base = self._layers[layer].weight
        if not base.dtype.is_floating_point or base.dtype.itemsize < 2:
            raise ModelError(
                f"adapters can't be mixed over a base in {str(base.dtype).removeprefix('torch.')}; serve the base in 16 bits, "
                "or the merged model in fewer"
            )
        moved = {part: tensor.to(base.device, base.dtype) for part, tensor in parts.items()}
        a, b, magnitude = moved["lora_A"], moved["lora_B"], moved.get("lora_magnitude_vector")
        if magnitude is not None:  # Liu et al. 2024; the norm is fixed once training is over
            magnitude = magnitude / torch.linalg.norm(base + settings.scaling * (b @ a), dim=1)
        if not all(torch.isfinite(tensor).all() for tensor in (a, b, magnitude) if tensor is not None):
            raise ModelError(f"the adapter's weights of {layer} are not finite; publish an earlier checkpoint")
        return AdapterWeights(a.contiguous(), b.contiguous(), magnitude)

    def _adapt(self, layer: str, module: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x: [1, num_tokens, in]; output: [1, num_tokens, out], changed in place."""
        for adapter, rows in self._groups:
            weights = adapter.layers.get(layer)
            if weights is None:
                continue
            if x.shape[-2] != self._num_tokens:
                raise EngineError(f"{layer} sees {x.shape[-2]} tokens of a batch of {self._num_tokens}")
            delta = linear(linear(x[..., rows, :], weights.a), weights.b) * adapter.scaling
            if weights.growth is not None:
                plain = output[..., rows, :] if module.bias is None else output[..., rows, :] - module.bias
                delta = (weights.growth - 1) * plain + weights.growth * delta
            output[..., rows, :] += delta
        return output


def _rows(ranges: list[range], device: torch.device) -> slice | torch.Tensor:
    """A slice if the tokens are adjacent, which needs no copy, otherwise their indices."""
    first, last = ranges[0], ranges[-1]
    if last.stop - first.start == sum(map(len, ranges)):
        return slice(first.start, last.stop)
    return torch.tensor([i for found in ranges for i in found], device=device)
