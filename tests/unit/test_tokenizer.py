"""The quick way to ids is the plain way, id for id: many at once, any engine, a tokenizer that travelled."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.chat import ChatFormat, Conversation, Encoded, Message, TrainOn
from ftray.chat.placeholders import ShapeCache
from ftray.chat.renderer import TemplateRenderer
from ftray.chat.segments import TemplateSegmenter
from ftray.config import ModelConfig
from ftray.data import tokenizer as tokenize
from ftray.data.chunks import _tokenizer, streams
from ftray.data.tokenizer import (
    TELLING,
    BatchTokenizer,
    NamedTokenizer,
    SerializedTokenizer,
    TokenizerLoader,
    backend_json,
    pack_tokenizer,
    pick_sample,
)
from ftray.errors import DataError
from ftray.model import embedded
from ftray.model.load import load_tokenizer
from tests import tiny

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
COPYING = {
    "chatml": tiny.TEMPLATE,
    "trims": tiny.TEMPLATE.replace("m['content']", "m['content'] | trim"),
    "system text in front of the first question": (
        "{% set first = messages[0]['content'] + '\\n' if messages[0]['role'] == 'system' else '' %}"
        "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
        "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\\n' + (first if loop.first else '') }}"
        "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{{ m['content'] | tojson }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
    ),
    "asks whether a text is empty": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\\n' + m.content }}{% endif %}"
        "{% for call in m.tool_calls %}{{ call.arguments | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
    ),
    "counts turns": (
        "{% for m in messages %}{% if messages | length > 1 and m.role == 'tool' and loop.index0 % 2 == 0 %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        + TURN
        + "{{ '[' ~ loop.index ~ ']' }}{% endfor %}"
        + ASK
    ),
    "keeps it in a namespace": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = m['content'] %}{% endfor %}"
    + tiny.TEMPLATE,
    "takes any key": tiny.TEMPLATE.replace("m['content']", "m['con' + 'tent']"),
    "tells the day": tiny.TEMPLATE.replace("m['content']", "m['content'] + strftime_now('%d')"),
    "captures it": tiny.TEMPLATE.replace("m['content']", "say(m.content)").replace(
        "{% for m in", "{% macro say(x) %}[{{ x | trim }}]{% endmacro %}{% for m in", 1
    ),
    "sets a block of it": tiny.TEMPLATE.replace("m['content']", "x").replace(
        "{{ '<|im_start|>'", "{% set x %}[{{ m.content }}]{% endset %}{{ '<|im_start|>'", 1
    ),
}
# Each does something else with some texts than with others.
LOOKING = {
    "splits thoughts off": tiny.TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "asks what is in it": tiny.TEMPLATE.replace("m['content']", "('!' if '?' in m['content'] else m['content'])"),
    "asks how long it is": tiny.TEMPLATE.replace("m['content']", "m['content'] + '' * (m['content'] | length)"),
    "compares it": tiny.TEMPLATE.replace("m['content']", "(m['content'] if m['content'] != 'a' else 'b')"),
    "compares under another name": "{% set x = messages[0]['content'] %}{% if x == 'a' %}!{% endif %}" + tiny.TEMPLATE,
    "looks through the list": tiny.TEMPLATE
    + "{% for m in messages %}{{ m | length }}{{ m.items() | list }}{% endfor %}",
    "writes it as JSON": tiny.TEMPLATE.replace("m['content']", "m['content'] | tojson"),
    "writes the list": "{{ messages }}" + tiny.TEMPLATE,
    "takes its first letter": tiny.TEMPLATE.replace("m['content']", "m['content'][0]"),
    "changes case": tiny.TEMPLATE.replace("m['content']", "m['content'] | upper"),
    "formats with it": tiny.TEMPLATE.replace("m['content']", "m['content'] % ()"),
    "goes through a macro": "{% macro f(x) %}{{ x | upper }}{% endmacro %}"
    + tiny.TEMPLATE.replace("m['content']", "f(m.content)"),
    "looks at the neighbour": tiny.TEMPLATE.replace("m['content']", "m['content'] + loop.previtem.content"),
    "captures it and looks": tiny.TEMPLATE.replace("m['content']", "(say(m.content) | length | string)").replace(
        "{% for m in", "{% macro say(x) %}{{ x }}{% endmacro %}{% for m in", 1
    ),
    "asks for a letter": tiny.TEMPLATE.replace("m['content']", "m['content'] | int(0) | string"),
    "looks for it in a list": tiny.TEMPLATE.replace("m['content']", "('!' if m['content'] in ['a'] else '?')"),
    "takes it as a key": tiny.TEMPLATE.replace("m['content']", "m['content'] + {'a': 'b'}.get(m['content'], '')"),
    "asks whether what is left is empty": tiny.TEMPLATE.replace("m['content']", "('!' if m['content'] | trim else '')"),
    "is no template": "{% for %}",
}


def chat_of(template: str) -> ChatFormat:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)))


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


def one_by_one(chat: ChatFormat, conversation: Conversation | str) -> Encoded | str:
    """What the plain way gives, or why it refuses."""
    try:
        return chat.encode_text(conversation) if isinstance(conversation, str) else chat.encode_example(conversation)
    except DataError as err:
        return str(err)


def assert_same(chat: ChatFormat, conversations: Sequence[Conversation | str]) -> None:
    for found, conversation in zip(chat.encode_examples(conversations), conversations, strict=True):
        plain = one_by_one(chat, conversation)
        if isinstance(found, DataError) or isinstance(plain, str):
            assert str(found) == plain
            continue
        assert isinstance(found.input_ids, np.ndarray)
        assert found.input_ids.dtype == np.int32
        assert isinstance(found.loss_mask, np.ndarray)
        assert found.input_ids.tolist() == plain.input_ids
        assert found.loss_mask.tolist() == plain.loss_mask


PIECES = [
    "\n",
    "  ",
    "\t",
    "a",
    "Bc",
    "12",
    "'s",
    "é",
    "e\u0301",
    "日本",
    "🙂",
    "👩‍👩‍👧",
    "\ufeff",
    "\x00",
    "</think>",
    "<|im_end|>",
    "{{",
    "?",
    "\ue0f7",
    "\u2003",
    "\ud800",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=6).map("".join)
ROLE = st.sampled_from(["system", "user", "assistant", "assistant", "user", "tool"])
CONVERSATION = st.one_of(
    TEXT,
    st.lists(st.builds(Message, ROLE, TEXT, st.booleans()), min_size=1, max_size=5).map(
        lambda m: Conversation(tuple(m))
    ),
    st.tuples(TEXT, TEXT).map(lambda t: talk(Message("user", t[0]), Message("assistant", t[1]))),
)


@pytest.mark.parametrize(
    "template", [*COPYING.values(), *list(LOOKING.values())[:4]], ids=[*COPYING, *list(LOOKING)[:4]]
)
def test_many_at_once_are_what_each_is_by_itself(template: str) -> None:
    chat = chat_of(template)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(CONVERSATION, max_size=6))
    def holds(conversations: list[Conversation | str]) -> None:
        assert_same(chat, conversations)

    holds()


def test_many_at_once_are_what_each_is_by_itself_with_a_real_model() -> None:
    tokenizer = load_tokenizer(ModelConfig(base=embedded.NAME))
    chat = ChatFormat(tokenizer, BatchTokenizer(tokenizer, backend_json(tokenizer)))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(CONVERSATION, max_size=6))
    def holds(conversations: list[Conversation | str]) -> None:
        assert_same(chat, conversations)

    holds()


@pytest.mark.parametrize("name", COPYING)
def test_a_template_that_copies_is_rendered_once_for_all_conversations_of_its_shape(name: str) -> None:
    chat = chat_of(COPYING[name])
    conversations: list[Conversation | str] = [
        talk(Message("user", f"{n}?"), Message("assistant", f" {n}! ")) for n in range(20)
    ]
    chat.encode_examples(conversations[:1])
    chat._segmenter.renderer.render = None  # type: ignore[method-assign,assignment]
    assert not any(isinstance(e, DataError) for e in chat.encode_examples(conversations))


@pytest.mark.parametrize("name", LOOKING)
def test_a_template_that_looks_into_texts_is_rendered_for_each(name: str) -> None:
    key = tuple((role, True) for role in ("system", "user", "assistant", "user", "assistant"))

    def shape_of(template: str) -> object:
        return ShapeCache(TemplateSegmenter(TemplateRenderer(template, {}))).find_shape(key)

    assert shape_of(tiny.TEMPLATE) is not None
    assert shape_of(LOOKING[name]) is None


def test_a_template_that_trims_two_texts_together_is_rendered_for_each() -> None:
    chat = chat_of(tiny.TEMPLATE.replace("m['content']", "(m['role'] + m['content']) | trim"))
    conversations: list[Conversation | str] = [
        talk(Message("user", text), Message("assistant", " b ")) for text in ("a", " ", "")
    ]
    assert_same(chat, conversations)


class Wrong:
    """An engine that is right about what tells tokenizers apart, and wrong about one word."""

    def __init__(self, backend: str) -> None:
        self._right = tokenize._open_hf(backend)
        self.num_calls = 0

    def __call__(self, texts: Sequence[str]) -> Any:
        self.num_calls += 1
        return self._right([text.replace("cow", "caw") for text in texts])


def test_an_engine_that_differs_on_a_chunk_is_not_used_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Wrong] = []

    def open_wrong(backend: str) -> Wrong:
        opened.append(Wrong(backend))
        return opened[0]

    monkeypatch.setitem(tokenize.ENGINES, "fastokens", open_wrong)  # type: ignore[arg-type]
    tokenizer = tiny.make_tokenizer()
    batch = BatchTokenizer(tokenizer, backend_json(tokenizer))
    assert batch.engine == "fastokens"
    texts = ["a cow says moo"] * 50
    ids, offsets = batch(texts)
    assert ids[: offsets[1]].tolist() == tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert "fastokens and transformers give different ids" in caplog.text
    caplog.clear()
    batch(["a pig says oink"] * 50)  # it is right here
    assert (caplog.text, opened[0].num_calls) == ("", 3)


def test_an_engine_that_is_wrong_at_once_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backend: str) -> tokenize.Encode:
        return lambda texts: tokenize._open_hf(backend)([text.lower() for text in texts])

    for name in tokenize.ENGINES:
        monkeypatch.setitem(tokenize.ENGINES, name, wrong)
    tokenizer = tiny.make_tokenizer()
    batch = BatchTokenizer(tokenizer, backend_json(tokenizer))
    assert batch.engine == "transformers"
    ids, offsets = batch(["ABC", "", "d"])
    assert ids.tolist() == [i for text in ("ABC", "d") for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert offsets.tolist() == [0, len(ids) - 1, len(ids) - 1, len(ids)]


def test_the_sample_holds_rare_and_common_texts_and_is_always_the_same() -> None:
    texts = ["plain"] * 10_000
    texts[5003] = "é"
    picked = pick_sample(texts)
    assert 5003 in picked
    assert 50 <= len(picked) <= 60
    assert picked == pick_sample(list(texts))
    assert pick_sample([]) == []
    assert pick_sample(["a"]) == [0]


def test_fastokens_gives_the_same_ids() -> None:
    for tokenizer in (tiny.make_tokenizer(), load_tokenizer(ModelConfig(base=embedded.NAME))):
        backend = backend_json(tokenizer)
        batch = BatchTokenizer(tokenizer, backend)
        assert batch.engine == "fastokens"
        assert backend is not None
        encode = tokenize._open_fastokens(backend)
        assert encode is not None
        texts = [*TELLING, "", "\U000f0000 that no vocabulary has", *("".join(PIECES[k:-1]) for k in range(15))]
        ids, offsets = encode(texts)
        for n, text in enumerate(texts):
            plain = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids[offsets[n] : offsets[n + 1]].tolist() == plain


def test_a_tokenizer_travels_as_itself_and_is_loaded_once_a_process() -> None:
    calls: list[int] = []

    def load() -> Any:
        calls.append(1)
        return tiny.make_tokenizer()

    loader = TokenizerLoader(load)
    there = pickle.loads(pickle.dumps(loader))
    assert isinstance(there, SerializedTokenizer)
    pickle.dumps(loader)
    assert len(calls) == 1
    assert there == pickle.loads(pickle.dumps(loader))
    assert _tokenizer(there, TrainOn()) is _tokenizer(
        pickle.loads(pickle.dumps(loader)), TrainOn()
    )  # a task unpickles its own copy
    chat, other = ChatFormat(loader()), ChatFormat(there())
    assert chat.identity == other.identity
    conversation = talk(Message("system", "s"), Message("user", "Is it so?"), Message("assistant", "Yes 🙂."))
    assert chat.encode_example(conversation) == other.encode_example(conversation)
    assert chat.encode_prompt(conversation.until(2)) == other.encode_prompt(conversation.until(2))
    assert chat.encode_text("a text") == other.encode_text("a text")


def test_a_tokenizer_that_would_not_be_the_same_elsewhere_is_loaded_there_by_name() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.split_special_tokens = True
    assert pack_tokenizer(tokenizer) is None
    loader = TokenizerLoader(make_splitting)
    there = pickle.loads(pickle.dumps(loader))
    assert isinstance(there, NamedTokenizer)
    assert there == pickle.loads(pickle.dumps(loader))
    assert there().split_special_tokens


def make_splitting() -> Any:
    tokenizer = tiny.make_tokenizer()
    tokenizer.split_special_tokens = True
    return tokenizer


def test_streams_of_one_section_share_their_loader() -> None:
    from ftray.config import DataConfig

    data = DataConfig.model_validate({"train": [{"path": "x"}], "eval": {"fraction": 0.1}})
    stream, heldout = streams(data, make_splitting)
    assert heldout is not None
    assert stream.load_tokenizer is heldout.load_tokenizer
    assert streams(data, stream.load_tokenizer)[0] == stream


def test_a_task_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    saved = tmp_path / "loader.pickle"
    saved.write_bytes(pickle.dumps(TokenizerLoader(tiny.make_tokenizer)))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "from ftray.chat import Conversation, Message, TrainOn; from ftray.data.chunks import _tokenizer\n"
        f"chat, _ = _tokenizer(pickle.loads(Path({str(saved)!r}).read_bytes()), TrainOn())\n"
        "assert len(chat.encode_examples([Conversation((Message('user', 'a'), Message('assistant', 'b')))])[0].input_ids) > 5\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
