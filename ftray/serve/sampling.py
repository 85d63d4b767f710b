"""From a request's fields to an engine's sampling parameters, and from a token to its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftray.engine.protocol import SamplingParams
from ftray.serve.chat_prompts import ChatPrompt
from ftray.serve.openai_requests import ModelRequest


def sampling_params(body: ModelRequest, max_tokens: int, prompt: ChatPrompt | None) -> list[SamplingParams]:
    """The parameters of each answer to one prompt. prompt: of a chat."""
    return [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),  # vLLM's clients send -1 for all tokens
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
            stop=body.stops,
            seed=None if body.seed is None else body.seed + index,
            num_logprobs=body.num_logprobs,
            json_schema=prompt.json_schema if prompt else None,
            grammar=prompt.grammar if prompt else None,
            visible_ids=prompt.visible_ids if prompt else frozenset(),
        )
        for index in range(body.n or 1)
    ]


def token_speller(tokenizer: Any) -> Callable[[int], bytes]:
    """Token id → its bytes. A part of a character is known for byte-level tokenizers and sentencepiece's byte tokens."""
    from_byte_level = {character: value for value, character in _byte_characters().items()}
    name_of = getattr(tokenizer, "convert_ids_to_tokens", None)

    def spell(token_id: int) -> bytes:
        text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        if "\ufffd" not in text or name_of is None:
            return text.encode()
        name = str(name_of(token_id))
        if len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        if all(character in from_byte_level for character in name):
            return bytes(from_byte_level[character] for character in name)
        return text.encode()

    return spell


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character of each byte, as byte-level tokenizers write their tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
