"""Conversations of all kinds, tokenizers for any chat template, and the promises that each must keep together."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from tokenizers import AddedToken, normalizers

from ftray.chat import ChatFormat, Conversation, Message, ToolCall
from ftray.chat.renderer import is_shown, shared_length
from ftray.chat.template import TODAY
from ftray.errors import DataError
from tests import tiny

SPECIAL = re.compile(
    r"<[|｜][^<>{}' |｜]{1,40}[|｜]>|<\|[a-z_\"]+\|?>|<[a-z_]+\|>|\[/?[A-Z_]{2,30}\]|</s>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
PLAIN = ("<think>", "</think>")  # in most vocabularies tokens, but no special ones


def weather(name: str = "get_weather") -> dict[str, Any]:
    properties = {"city": {"type": "string", "description": "The city's name."}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "Looks it up.", "parameters": parameters}}


TOOLS = (weather(), weather("get_time"))
SYSTEM = Message("system", "Be brief.")


def user(text: str = "How is the weather in Oslo?") -> Message:
    return Message("user", text)


def answer(text: str = "It is sunny.", **more: Any) -> Message:
    return Message("assistant", text, **more)


def call(city: str = "Oslo", name: str = "get_weather", text: str = "", **more: Any) -> Message:
    return answer(text, tool_calls=(ToolCall(name, {"city": city, "days": 3}),), **more)


def result(text: str = '{"sky": "sunny", "deg": 21}', **more: Any) -> Message:
    return Message("tool", text, **more)


PARALLEL = answer(
    "", tool_calls=(ToolCall("get_weather", {"city": "Oslo"}, "a1"), ToolCall("get_time", {"city": "Rome"}, "b2"))
)
THOUGHT = "The user wants the weather."
CONVERSATIONS = {
    name: Conversation(tuple(messages), tools)
    for name, tools, messages in (
        ("one turn", (), [user(), answer()]),
        ("system", (), [SYSTEM, user(), answer()]),
        ("developer", (), [Message("developer", "Be brief."), user(), answer()]),
        (
            "three turns",
            (),
            [user("a?"), answer("one"), user("b?"), answer("two\n\nlines"), user("c?"), answer("drei")],
        ),
        (
            "system, three turns",
            (),
            [SYSTEM, user("a?"), answer("one"), user("b?"), answer("two"), user("c?"), answer("drei")],
        ),
        ("first not trained", (), [user("a?"), answer("one", train=False), user("b?"), answer("two")]),
        ("last not trained", (), [user("a?"), answer("one"), user("b?"), answer("two", train=False)]),
        ("ends with a question", (), [user("a?"), answer("one"), user("b?")]),
        ("NFC", (), [user("Cafe\u0301?"), answer("Oui, cafe\u0301.")]),
        ("many scripts", (), [user("日本語 🙂?"), answer("はい 👩‍👩‍👧, naïve")]),
        ("code", (), [user("Code?"), answer("```py\nif x < 1:\n    print('{{ x }}')\n```")]),
        ("white space around", (), [user("  a?\n"), answer("one\n")]),
        ("JSON answer", (), [user("JSON?"), answer('{"a": [1, 2], "b": "é"}')]),
        ("reasoning", (), [user(), answer(reasoning=THOUGHT)]),
        (
            "reasoning in every turn",
            (),
            [user("a?"), answer("one", reasoning="1st."), user("b?"), answer("two", reasoning="2nd.")],
        ),
        (
            "reasoning in the last turn",
            (),
            [SYSTEM, user("a?"), answer("one"), user("b?"), answer("two", reasoning="2nd.")],
        ),
        ("reasoning in the text", (), [user(), answer(f"<think>\n{THOUGHT}\n</think>\n\nIt is sunny.")]),
        (
            "reasoning in both texts",
            (),
            [user("a?"), answer("<think>\n1st.\n</think>\n\none"), user("b?"), answer("two")],
        ),
        ("tools, no call", TOOLS, [user(), answer()]),
        ("tools and system", TOOLS, [SYSTEM, user(), answer()]),
        ("call", TOOLS, [user(), call()]),
        ("call and answer", TOOLS, [user(), call(), result(), answer()]),
        ("call with text", TOOLS, [user(), call(text="I will look."), result(), answer()]),
        ("call with reasoning", TOOLS, [user(), call(reasoning=THOUGHT), result(), answer(reasoning="It is done.")]),
        (
            "call, question, call",
            TOOLS,
            [SYSTEM, user(), call(), result(), answer(), user("Rome?"), call("Rome"), result(), answer()],
        ),
        ("two calls in a row", TOOLS, [user(), call(), result(), call("Rome"), result("rain"), answer("Rain.")]),
        (
            "parallel calls",
            TOOLS,
            [user(), PARALLEL, result(tool_call_id="a1"), result("12:00", tool_call_id="b2"), answer()],
        ),
        (
            "ids and names",
            TOOLS,
            [
                user(),
                answer("", tool_calls=(ToolCall("get_time", {"city": "São Paulo"}, "call_x1"),)),
                result("12:00", tool_call_id="call_x1", name="get_time"),
                answer("Noon."),
            ],
        ),
        (
            "nested arguments",
            TOOLS,
            [user(), answer("", tool_calls=(ToolCall("get_weather", {"city": "Oslo", "o": {"a": [1.5, "é"]}}),))],
        ),
        ("empty result", TOOLS, [user(), call(), result(""), answer()]),
    )
}


def tokenizer_for(template: str) -> Any:
    """A small tokenizer that has the special tokens of a template, and composes characters as Qwen's do."""
    tokenizer = tiny.make_tokenizer()
    strips = "Phi-3" in template or "<|end|>\\n' + " in template
    tokens = sorted(set(SPECIAL.findall(template)) - {"<|im_start|>", "<|im_end|>"})
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=strips) for t in tokens], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>" if "<|im_end|>" not in template else "<|im_end|>"}
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.chat_template = template
    return tokenizer


def transformers_ids(chat: ChatFormat, conversation: Conversation, **more: Any) -> Any:
    """What transformers makes of a conversation, on the day that our templates see."""
    from transformers.utils import chat_template_utils

    class Today(chat_template_utils.datetime):  # type: ignore[misc,name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return TODAY

    shape, plain = chat._segmenter.renderer.shape, chat_template_utils.datetime
    chat_template_utils.datetime = Today
    try:
        return chat._tokenizer.apply_chat_template(
            shape.turns(conversation), tools=list(conversation.tools) or None, tokenize=True, return_dict=True, **more
        )
    finally:
        chat_template_utils.datetime = plain


def broken_promises(chat: ChatFormat, conversation: Conversation) -> list[str]:
    """What is wrong with the ids and the mask of a conversation. Raises DataError if it is refused."""
    encoded = chat.encode_example(conversation)
    (quick,) = chat.encode_examples([conversation])
    broken = []
    if isinstance(quick, DataError) or (list(quick.input_ids), list(quick.loss_mask)) != (
        encoded.input_ids,
        encoded.loss_mask,
    ):
        broken.append("many at once")
    turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.train]
    documents = encoded.documents()
    if len(documents) > 1 and len(documents) != len(turns):
        return [*broken, f"{len(documents)} documents of {len(turns)} answers"]
    for n, (ids, mask) in enumerate(documents):
        texts = _runs(chat, ids, mask)
        answers = [turns[n]] if len(documents) > 1 else turns
        for i in answers:
            prompt = chat.encode_prompt(conversation.until(i))
            if list(ids[: len(prompt)]) != prompt:
                broken.append(f"prompt of turn {i}")
        joined = unicodedata.normalize("NFC", "".join(texts))
        for i, message in enumerate(conversation.messages):
            parts = [*message.content.replace("<think>", "</think>").split("</think>"), message.reasoning]
            parts += [part for each in message.tool_calls for part in (each.name, each.arguments["city"])]
            missing = [p for p in parts if not is_shown(unicodedata.normalize("NFC", p), joined)]
            if i in answers and missing:
                broken.append(f"turn {i} lacks {missing}: {joined!r}")
            if i not in answers and message.content.strip() and not missing and message.role == "user":
                broken.append(f"turn {i} is trained on: {joined!r}")
        ends = [t for t, after in zip(range(len(ids)), [*mask[1:], False], strict=True) if mask[t] and not after]
        if [t for t in ends if ids[t] not in chat.stop_token_ids] and not chat.uses_marks:
            broken.append(f"no end token: {texts!r}")
    return broken


def differences(chat: ChatFormat, conversation: Conversation) -> tuple[str, str]:
    """How ids and mask compare with transformers': '' (equal), 'documents' (there is no single text), 'ids' or 'mask'."""
    encoded = chat.encode_example(conversation)
    turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.train]
    last = conversation.until(turns[-1] + 1)
    if len(encoded.starts) > 1 or not chat.render(last).startswith(chat.render(last.until(-1), True)):
        return "documents", "documents"
    has_marks, ours = chat._segmenter.has_marks, list(encoded.input_ids)
    for each in (conversation, last):  # some documents end with the only trained answer
        theirs = transformers_ids(chat, each, return_assistant_tokens_mask=has_marks)
        wanted = list(theirs["input_ids"])
        is_same = ours == wanted or (ours[:-1] == wanted and ours[-1] in chat.stop_token_ids)
        if is_same:
            conversation = each
            break
    if not is_same:
        return "ids", "ids"
    if not has_marks:
        return "", "no marks"
    learned = {i for i, m in enumerate(encoded.loss_mask) if m}
    marked = {i for i, m in enumerate(theirs["assistant_masks"]) if m}
    untrained = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and not m.train]
    extra = [
        i for i in marked - learned - _headers(chat, conversation) if i < len(ours) and chat.decode([ours[i]]).strip()
    ]
    return "", "" if learned <= marked | {len(wanted)} and (not extra or untrained) else "mask"


def _headers(chat: ChatFormat, conversation: Conversation) -> set[int]:
    """The places of the generation prompts' ids, which some templates mark, too."""
    places: set[int] = set()
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            prompt, before = chat.render(conversation.until(i), True), chat.render(conversation.until(i))
            header, ids = prompt[shared_length(prompt, before) :], chat.encode_prompt(conversation.until(i))
            first = next(k for k in range(len(ids), -1, -1) if chat.decode(ids[k:]).rstrip().endswith(header.rstrip()))
            places |= set(range(first, len(ids)))
    return places


def _runs(chat: ChatFormat, ids: Any, mask: Any) -> list[str]:
    edges = [i for i in range(len(ids) + 1) if (i < len(ids) and mask[i]) != (i > 0 and mask[i - 1])]
    return [chat.decode(ids[a:b], before=ids[:a]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
