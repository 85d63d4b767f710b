"""Templates of all kinds, and tokenizers that add spaces: the same masks and ids, in bounded time, the same every day."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ftray import storage
from ftray.chat import ChatFormat, Conversation, Encoded, Message
from ftray.chat.template import TODAY, Template
from ftray.config import ModelConfig
from ftray.errors import DataError, ModelError
from ftray.model import embedded
from ftray.model.load import load_tokenizer
from tests import tiny

END = "<|im_end|>"
HEAD = "{% for m in messages %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
MARKED = (
    HEAD
    + "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    + "{% endgeneration %}{{ '\\n' }}{% else %}"
    + TURN
    + "{% endif %}"
    + TAIL
)
# Header and newline inside the marks, as SmolLM3's.
MARKED_WIDELY = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}" + TURN + "{% endgeneration %}{% else %}" + TURN
)
MARKED_WIDELY += "{% endif %}" + TAIL
MARKED_SHORT = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '\\n'", "}}{% endgeneration %}{{ '<|im_end|>\\n'")
# Only what comes after the thoughts is learned.
MARKED_LATE = MARKED.replace(
    "{% generation %}{{ m['content'] + '<|im_end|>' }}",
    "{{ m['content'].split('|')[0] + '|' }}{% generation %}{{ m['content'].split('|')[-1] + '<|im_end|>' }}",
)
SILENT = HEAD + "{% if m['role'] in ('user', 'assistant') %}" + TURN + "{% endif %}" + TAIL
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def chat_with(template: str) -> ChatFormat:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def turns(*contents: str, system: str | None = None) -> Conversation:
    head = () if system is None else (Message("system", system),)
    return Conversation((*head, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))))


def learned(chat: ChatFormat, encoded: Encoded) -> list[str]:
    """The text of each unbroken run of supervised tokens, as it goes on from what is before it."""
    ids, mask = list(encoded.input_ids), list(encoded.loss_mask)
    runs, start = [], 0
    for i in range(len(ids) + 1):
        if i == len(ids) or (i and mask[i] != mask[i - 1]):
            if i > start and mask[start]:
                runs.append(chat.decode(ids[start:i], before=ids[:start]))
            start = i
    return runs


LONG = turns("a?", "one", "b?", "two\n\nlines", "c?", "drei", system="Be brief.")


@pytest.mark.parametrize("template", [MARKED, MARKED_WIDELY])
def test_marks_of_the_template_and_our_own_mask_agree(template: str) -> None:
    marked, plain = chat_with(template), chat_with(tiny.TEMPLATE)
    assert marked.encode_example(LONG) == plain.encode_example(LONG)
    assert learned(marked, marked.encode_example(LONG)) == [f"one{END}", f"two\n\nlines{END}", f"drei{END}"]
    batch = marked.encode_examples([LONG])[0]
    assert isinstance(batch, Encoded)
    assert list(batch.loss_mask) == plain.encode_example(LONG).loss_mask


def test_the_mask_is_the_one_that_transformers_makes_of_the_marks() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = MARKED
    encoded = ChatFormat(tokenizer).encode_example(LONG)
    theirs = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in LONG.messages],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert encoded.input_ids == theirs["input_ids"]
    assert encoded.loss_mask == [bool(m) for m in theirs["assistant_masks"]]


def test_marks_that_name_less_than_the_answer_are_followed() -> None:
    chat = chat_with(MARKED_LATE)
    asked = turns("a?", "thought|said", "b?", "more|done")
    one, batch = chat.encode_example(asked), chat.encode_examples([asked])[0]
    assert learned(chat, one) == [f"said{END}", f"done{END}"]
    assert isinstance(batch, Encoded)
    assert list(batch.input_ids) == one.input_ids
    assert list(batch.loss_mask) == one.loss_mask
    prompt = chat.encode_prompt(asked.until(3))
    assert one.input_ids[: len(prompt)] == prompt
    first, _, *rest = asked.messages
    skipped = Conversation((first, Message("assistant", "thought|said", train=False), *rest))
    assert learned(chat, chat.encode_example(skipped)) == [f"done{END}"]


def test_marks_that_leave_out_the_end_token_are_refused() -> None:
    with pytest.raises(ModelError, match=r"generation %} marks leave out the end token"):
        chat_with(MARKED_SHORT)


def test_a_template_that_leaves_out_system_turns_in_silence_is_refused_where_there_is_one() -> None:
    chat = chat_with(SILENT)
    assert learned(chat, chat.encode_example(turns("a", "b"))) == [f"b{END}"]
    with pytest.raises(
        DataError, match=r"has no system role \(it leaves such turns out\); put its text into the first"
    ):
        chat.encode_example(turns("a", "b", system="s"))
    (refused,) = chat.encode_examples([turns("a", "b", system="s")])
    assert "has no system role" in str(refused)
    with pytest.raises(DataError, match="has no tool role"):
        chat.encode_example(Conversation((*turns("a", "b").messages, Message("tool", "3"), Message("assistant", "c"))))


def test_tool_turns_are_read_and_not_learned() -> None:
    chat = chat_with(tiny.TEMPLATE)
    said = turns("2+2?", "<call>add 2 2</call>").messages
    asked = Conversation((*said, Message("tool", "4"), Message("assistant", "It is 4.")))
    encoded = chat.encode_example(asked)
    assert learned(chat, encoded) == [f"<call>add 2 2</call>{END}", f"It is 4.{END}"]
    prompt = chat.encode_prompt(asked.until(3))
    assert encoded.input_ids[: len(prompt)] == prompt


# --- tokenizers that put a space in front of what they are given


WORDS = [
    "What is heard? moo, then baa.",
    "Ada hears a cow and two sheep.",
    "one two three",
    "a b c x | . [INST] [/INST]",
]


def sentencepiece(kind: str, scheme: str) -> Any:
    """A small tokenizer of the family of Llama 2's: ▁ for spaces, bytes for what the vocabulary lacks."""
    specials = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
    trainer: Any = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*specials, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=120,
            special_tokens=specials,
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=[*map(chr, range(33, 127)), "\n", "é"],
        )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if scheme == "prepend":  # as transformers converts Llama 2's own
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if kind == "unigram":
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.train_from_iterator(WORDS * 3, trainer)
    tree = json.loads(backend.to_str())  # bytes are entries like any other, no control tokens
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(tree))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"eos_token": AddedToken("</s>", special=True, normalized=False)})
    return tokenizer


PREFIXING = [("bpe", "prepend"), ("bpe", "first"), ("bpe", "always"), ("unigram", "always"), ("unigram", "first")]


@pytest.mark.parametrize(("kind", "scheme"), PREFIXING)
@pytest.mark.parametrize("template", [LLAMA_2, ZEPHYR], ids=["llama-2", "zephyr"])
def test_no_space_is_put_in_front_of_a_segment(kind: str, scheme: str, template: str) -> None:
    tokenizer = sentencepiece(kind, scheme)
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer)
    assert chat._inserts_prefix
    asked = turns("What is heard?", "moo, then baa.", "one two", "three", "a", "\n\nb")
    encoded = chat.encode_example(asked)
    pad = " " if template == LLAMA_2 else ""
    said = [f"{pad}{m.content}{pad}</s>" for m in asked.messages if m.role == "assistant"]
    assert learned(chat, encoded) == said
    for i in (1, 3, 5):
        prompt = chat.encode_prompt(asked.until(i))
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.loss_mask[len(prompt)]
        assert not encoded.loss_mask[len(prompt) - 1]
    batch = chat.encode_examples([asked, "one two three"])
    assert isinstance(batch[0], Encoded)
    assert list(batch[0].input_ids) == encoded.input_ids
    assert isinstance(batch[1], Encoded)
    assert chat.decode(batch[1].input_ids) in ("one two three</s>", "one two three </s>")


def test_a_byte_level_tokenizer_with_prefix_space_is_handled_too() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    chat = ChatFormat(tokenizer)
    assert chat._inserts_prefix
    assert learned(chat, chat.encode_example(LONG)) == [f"one{END}", f"two\n\nlines{END}", f"drei{END}"]


def test_tokenizers_without_such_habits_are_left_alone() -> None:
    assert not chat_with(tiny.TEMPLATE)._inserts_prefix


# --- the sandbox


ENDLESS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10**10 }}",
    "{{ ((9**60)**60)**60 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ''.join(['a' * 10**6] * 10**6) }}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}{{ x }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_would_not_end_is_refused_in_one_sentence(template: str) -> None:
    began_s = time.process_time()
    with pytest.raises(ModelError, match="the chat template ") as caught:
        chat_with(template + tiny.TEMPLATE)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began_s < 60


def test_a_template_can_not_reach_out_of_the_sandbox() -> None:
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}",
    ):
        with pytest.raises(ModelError, match="can't be used"):
            chat_with(template + tiny.TEMPLATE)


def test_a_long_conversation_is_no_endless_one() -> None:
    chat = chat_with(tiny.TEMPLATE.replace("m['content']", "m['content'] | trim"))
    asked = turns(*(["x" * 2000, "y" * 2000] * 200))
    assert len(chat._segmenter.cut_example(asked)[0]) == 401


def test_a_template_that_asks_for_the_date_gives_the_same_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Template("{{ strftime_now('%d %b %Y') }}").render([], False).text
    assert text == TODAY.strftime("%d %b %Y") == "26 Jul 2024"


REAL = [
    tiny.TEMPLATE,
    MARKED,
    ZEPHYR,
    LLAMA_2,
    "{% for m in messages %}\n    {%- if loop.last %}{% break %}{% endif %}\n  {{ m | tojson }}{{ loop.length }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + m.content|length %}{{ ns.n }},{% endfor %}",
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.index0 ~ ':' ~ m.content ~ loop.last }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ '%s=%s;' % (k, v) }}{% endfor %}{{ messages | map(attribute='role') | join(', ') }}",
    "{% macro say(m) %}{{ m.role.upper() }}: {{ m.content.strip().split('e')[-1] }}{% endmacro %}{{ say(messages[-1]) }}",
    "{{ 3 * 4 ** 2 % 7 + 1 }} {{ 'ab' * 3 }} {{ undefined_name }}{{ tools is none }}{{ none }}{{ [1, 'a', {'b': none}] }}",
]


@pytest.mark.parametrize("template", REAL)
def test_the_sandbox_writes_what_transformers_writes(template: str) -> None:
    plain = [{"role": m.role, "content": m.content} for m in LONG.messages]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (False, True):
        theirs, _ = chat_template_utils.render_jinja_template(
            conversations=[plain], chat_template=template, add_generation_prompt=prompt, **names
        )
        assert Template(template).render(plain, prompt, **names).text == theirs[0]


def test_the_sandbox_writes_what_transformers_writes_for_a_real_model() -> None:
    assert Path(embedded.resolve(embedded.NAME, storage.cache_directory())).is_dir()
    tokenizer = load_tokenizer(ModelConfig(base=embedded.NAME))
    chat = ChatFormat(tokenizer)
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in LONG.messages], tokenize=False
    )
    assert chat.render(LONG) == whole
