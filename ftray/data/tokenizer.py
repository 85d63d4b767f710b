"""Tokenizers for many texts: the fastest engine that gives the ids of transformers, and one that is cheap to send.

`BatchTokenizer` uses the Rust package fastokens if it is installed and agrees with transformers on texts that tell tokenizers
apart (once per process) and on a sample of each batch. If it does not, or refuses a text, the ids come from `tokenizers`,
with the same checks, and if these differ too, from the tokenizer itself. Ray's tasks load a `PortableTokenizer`, which imports
neither torch nor transformers (that takes seconds). Knows no files, templates or Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from ftray.chat import ChatFormat, Conversation, Message
from ftray.errors import FtrayError

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], tuple[Ids, Offsets]]

SAMPLE_SHARE, SAMPLE_LEAST = 1 / 200, 4  # share of a batch's texts that are compared, of ASCII texts and of others

log = logging.getLogger("ftray")

# Texts on which tokenizers differ: spaces, digits, contractions, case, combining and rare characters.
TELLING = (
    "Hello, world! It's 12:34 and 1234567 isn't 1,234.5; we'll see.",
    " leading,  two   three    four spaces, trailing   ",
    "a\n\nb\r\nc\n\n\n  d\t\te \n",
    "I'M YOU'RE they'LL I’m we’ve 'tis",
    "snake_case camelCase kebab-case == != <<16-3-4=9>> {'a': [1, 2]} // # ## ####",
    "def f(x):\n    return x**2\n\n\nclass A:\n\tpass\n",
    "Straße ÉCOLE e\u0301cole ﬁne İstanbul ǅ naïve Å Å ½ ² ٣ 四",
    "日本語の文章です。中文、한국어 텍스트 ไทยก็ नमस्ते العربية עברית русский Ελληνικά",
    "🙂👩‍👩‍👧🇩🇪 👍🏽 \u200b\u00a0\u3000\u2028\u0085\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><s></s>[INST] [/INST]<think>\n</think> <|eot_id|>",
    "x" * 50 + " " * 50 + "-" * 50 + "\n" * 20 + "ha" * 30,
    "$\\frac{1}{2}$ \\begin{align} €5 ¥6 10% ~@#^&*()",
)


class BatchTokenizer:
    """Texts → their concatenated ids, int32, and the offset of each, with the end: int64 [texts + 1].

    Args:
        tokenizer: Any tokenizer that `ChatFormat` takes. Its ids are the reference.
        backend: Its `backend_json`.
    """

    def __init__(self, tokenizer: Any, backend: str | None) -> None:
        self._tokenizer, self._backend = tokenizer, backend
        self._opened: dict[str, Encode | None] = {}

    @property
    def engine(self) -> str:
        """The source of the ids if all checks pass: `fastokens`, `tokenizers` or `transformers`."""
        return next((name for name in ENGINES if self._open(name)), "transformers")

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        sample = pick_sample(texts)
        expected = [self._plain(texts[i]) for i in sample]
        for name in ENGINES:
            encode = self._open(name)
            if encode is None:
                continue
            ids, offsets = encode(texts)
            if all(ids[offsets[i] : offsets[i + 1]].tolist() == e for i, e in zip(sample, expected, strict=True)):
                return ids, offsets
            log.warning(
                "%s and transformers give different ids for a text of this chunk, so it is not used for the chunk", name
            )
        return _join([np.asarray(self._plain(text), dtype=np.int32) for text in texts])

    def _open(self, name: str) -> Encode | None:
        if name not in self._opened:
            encode = ENGINES[name](self._backend) if self._backend is not None else None
            self._opened[name] = encode if encode is not None and self._agrees(encode) else None
        return self._opened[name]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _agrees(self, encode: Encode) -> bool:
        ids, offsets = encode(TELLING)
        encoded = [ids[lo:hi].tolist() for lo, hi in pairwise(offsets.tolist())]
        return encoded == [self._plain(text) for text in TELLING]


def pick_sample(texts: Sequence[str]) -> list[int]:
    """Indices of the texts to compare, evenly spread; the same for the same texts.

    Texts beyond ASCII get their own share, because that is where tokenizers differ.
    """
    rare = [i for i, text in enumerate(texts) if not text.isascii()]
    strata = [rare] if len(rare) == len(texts) else [range(len(texts)), rare]
    picked: set[int] = set()
    for places in strata:
        step = max(1, min(int(1 / SAMPLE_SHARE), len(places) // SAMPLE_LEAST))
        picked.update(places[::step])
    return sorted(picked)


def _open_hf(backend: str) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> tuple[Ids, Offsets]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _join([np.asarray(e.ids, dtype=np.int32) for e in encodings])

    return encode


def _open_fastokens(backend: str) -> Encode | None:
    try:
        from fastokens import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_json_str(backend)
        tokenizer.no_truncation()
    except (ValueError, TypeError, RuntimeError):  # an unsupported kind of tokenizer
        return None

    @cache
    def slow() -> Encode:
        return _open_hf(backend)

    def encode(texts: Sequence[str]) -> tuple[Ids, Offsets]:
        try:
            flat, offsets = tokenizer.encode_batch_flat(list(texts))
        except BaseException as err:
            # It refuses characters that the vocabulary lacks. Find the text with one, and encode the others.
            if not isinstance(err, ValueError) and type(err).__name__ != "PanicException":
                raise
            if len(texts) == 1:
                return slow()(texts)
            half = len(texts) // 2
            (ids, places), (more, after) = encode(texts[:half]), encode(texts[half:])
            return np.concatenate([ids, more]), np.concatenate([places, after[1:] + places[-1]])
        return np.frombuffer(flat, dtype="<u4").astype(np.int32), np.frombuffer(offsets, dtype="<u8").astype(np.int64)

    return encode


ENGINES: dict[str, Callable[[str], Encode | None]] = {"fastokens": _open_fastokens, "tokenizers": _open_hf}


def _join(arrays: list[Ids]) -> tuple[Ids, Offsets]:
    ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
    return ids, np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def backend_json(tokenizer: Any) -> str | None:
    """The tokenizer.json that gives the tokenizer's ids by itself, or None if there is none."""
    if isinstance(tokenizer, PortableTokenizer):
        return tokenizer.backend
    if getattr(tokenizer, "split_special_tokens", False):
        return None
    try:
        return str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # noqa: BLE001 - a component written in Python cannot be saved, and raises various errors
        return None


class PortableTokenizer:
    """The parts of a transformers tokenizer that `ChatFormat` needs, from its tokenizer.json, template and named tokens."""

    def __init__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.backend: str = state["backend"]
        self.chat_template: str = state["chat_template"]
        self.special_tokens_map: dict[str, Any] = state["special_tokens_map"]
        self.all_special_tokens: list[str] = state["all_special_tokens"]
        self.eos_token_id: int | None = state["eos_token_id"]
        self.pad_token_id: int | None = state["pad_token_id"]
        self._tokenizer = Tokenizer.from_str(self.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.backend_tokenizer = self._tokenizer
        self.added_tokens_decoder = {i: _Added(str(t.content), t.special) for i, t in self._added()}

    def _added(self) -> list[tuple[int, Any]]:
        return sorted(self._tokenizer.get_added_tokens_decoder().items())

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of ids, unchanged."""
        assert not clean_up_tokenization_spaces
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True)
class _Added:
    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


@dataclass(frozen=True)
class SerializedTokenizer:
    """A tokenizer as bytes: the compressed state of its PortableTokenizer. Equal for equal tokenizers."""

    digest: str
    state: bytes = field(compare=False, repr=False)

    def __call__(self) -> PortableTokenizer:
        return PortableTokenizer(json.loads(zlib.decompress(self.state)))


@dataclass(frozen=True)
class NamedTokenizer:
    """A loader for a tokenizer that cannot be packed. Equal to its copies in other processes, so each process loads once."""

    identity: str
    load: Callable[[], Any] = field(compare=False)

    def __call__(self) -> Any:
        return self.load()


class TokenizerLoader:
    """A loader of a tokenizer. Pickled, it becomes the tokenizer itself if a check shows that the copy behaves the same.

    Args:
        load: Picklable. Called at most once, in the process that made the loader.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._identity = load, uuid4().hex
        self._tokenizer: Any = None
        self._packed: SerializedTokenizer | NamedTokenizer | None = None

    def __call__(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        if self._packed is None:
            self._packed = pack_tokenizer(self()) or NamedTokenizer(self._identity, self._load)
        return _same, (self._packed,)


def _same(loader: SerializedTokenizer | NamedTokenizer) -> SerializedTokenizer | NamedTokenizer:
    return loader


def pack_tokenizer(tokenizer: Any) -> SerializedTokenizer | None:
    """A tokenizer to send to other processes, or None if the copy would give other ids or texts."""
    backend = backend_json(tokenizer)
    if backend is None or not isinstance(tokenizer.chat_template, str):
        return None
    state = {
        "backend": backend,
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": tokenizer.special_tokens_map,
        "all_special_tokens": [str(t) for t in tokenizer.all_special_tokens],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        text = json.dumps(state).encode()
    except TypeError:  # a named token that is not a string
        return None
    packed = SerializedTokenizer(hashlib.sha256(text).hexdigest(), zlib.compress(text, 1))
    return packed if _behave_the_same(tokenizer, packed()) else None


def _behave_the_same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids, special tokens, stop tokens and renderings on texts that tell them apart."""
    formats = [ChatFormat(one), ChatFormat(other)]
    if formats[0].identity != formats[1].identity:
        return False
    for text in TELLING:
        ids = [list(t(text, add_special_tokens=False)["input_ids"]) for t in (one, other)]
        if ids[0] != ids[1] or formats[0].decode(ids[0]) != formats[1].decode(ids[0]):
            return False
    words = ["a", "b c\n", " d  ", "<e>", "é"]
    for roles in (["user", "assistant"], ["system", "user", "assistant", "user", "assistant"]):
        talk = Conversation(tuple(Message(role, word) for role, word in zip(roles, words, strict=False)))
        if _encoded(formats[0], talk) != _encoded(formats[1], talk):
            return False
    return True


def _encoded(chat: ChatFormat, conversation: Conversation) -> object:
    try:
        encoded = chat.encode_example(conversation)
    except FtrayError as err:
        return str(err)
    return encoded
