"""The preview shows all of a record, what is learned of it, and lets no text of the data act on the terminal."""

import io
import json
from pathlib import Path

import pytest

from ftray import config
from ftray.chat import ChatFormat, Conversation, Message
from ftray.console import Console
from ftray.data.chunks import streams
from ftray.data.preview import paint, pieces, show_preview
from ftray.errors import DataError
from tests import tiny


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(path: Path, stream: io.StringIO, number: int = 2) -> str:
    data = config.DataConfig.model_validate({"max_seq_len": 256, "train": [{"path": str(path)}]})
    show_preview(streams(data, tiny.make_tokenizer)[0], 1 << 20, number, Console(stream))
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_marks_show_what_is_learned(tmp_path: Path) -> None:
    text = shown(tiny.write_records(tmp_path / "data", 9), io.StringIO())
    assert "\x1b" not in text
    assert text.count("<|im_start|>assistant\n{+") == 2
    assert text.count("<|im_end|>+}") == 2
    assert "--- part-000.jsonl, line 2: " in text
    assert "packed alone, in sequences of 256 tokens: " in text


def test_on_a_terminal_it_is_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write_records(tmp_path / "data", 9)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(path, Terminal())
    assert "\x1b[32m" in text
    assert "{+" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(path, Terminal())


def test_a_bad_record_is_shown_as_one(tmp_path: Path) -> None:
    (tmp_path / "part.jsonl").write_text('{"prompt": "a"}\n')
    assert "--- part.jsonl, line 1: bad (no_answer): completion is missing; the record has prompt" in shown(
        tmp_path, io.StringIO()
    )


def test_bad_records_are_counted_and_a_wrong_column_lists_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "part.jsonl").write_text('{"q": "a", "a": "b"}\n' * 3)
    source = {"path": str(tmp_path), "columns": {"user": "question", "assistant": "a"}}
    data = config.DataConfig.model_validate({"max_seq_len": 256, "train": [source]})
    stream = io.StringIO()
    assert show_preview(streams(data, tiny.make_tokenizer)[0], 1 << 20, 2, Console(stream)) == 2
    assert "bad (missing_field): question is missing; the record has a, q; fill in the field" in stream.getvalue()


def test_a_missing_path_is_all_that_is_said(tmp_path: Path) -> None:
    stream = io.StringIO()
    with pytest.raises(DataError, match="no such file or directory"):
        shown(tmp_path / "nowhere", stream)
    assert stream.getvalue() == ""


def test_the_pieces_together_are_the_whole_text_and_name_what_is_learned() -> None:
    chat = ChatFormat(tiny.make_tokenizer())
    encoded = chat.encode_example(Conversation((Message("user", "日本 🙂"), Message("assistant", "é🙂\nb"))))
    found = pieces(chat, encoded)
    assert "".join(p.text for p in found) == chat.decode(encoded.input_ids)
    assert [(p.text, p.kind) for p in found if p.trained] == [("é🙂\nb", "trained"), ("<|im_end|>", "special")]


def test_control_characters_of_the_data_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    record = {"prompt": "a\x1b]0;title\x07\u202eb\rc", "completion": "\x1b[2J"}
    (tmp_path / "part.jsonl").write_text(json.dumps(record) + "\n")
    text = shown(tmp_path, io.StringIO())
    assert "a\\x1b]0;title\\x07\\u202eb\\rc" in text
    assert not set("\x1b\x07\u202e\r") & set(text)
    chat = ChatFormat(tiny.make_tokenizer())
    painted = paint(pieces(chat, chat.encode_text("\x1b[2J")), color=True)
    assert "\x1b[2J" not in painted
