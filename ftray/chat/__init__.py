"""Turns a conversation into token ids and a loss mask: the only package that knows chat templates.

Training, evaluation and serving use it, so a conversation has the same ids everywhere. It receives a tokenizer, loads none,
and knows no files, models or HTTP. To read the package, start with messages, then segments, then encode.

The template is rendered once for the whole conversation and once up to each assistant message with the generation prompt. The
whole text is cut into segments where these texts end (`segments`), and each segment is tokenized separately (`encode`). A
prompt of the endpoint is therefore, id for id, the beginning of the training example with the same messages: no token spans the
border between the prompt and the answer.
"""

from ftray.chat.encode import ChatFormat
from ftray.chat.encoded import Encoded, ExpectedDocument
from ftray.chat.messages import Conversation, Message, ToolCall, read_messages, read_tools
from ftray.chat.renderer import template_of
from ftray.chat.template_trial import try_template
from ftray.chat.train_on import TrainOn

__all__ = [
    "ChatFormat",
    "Conversation",
    "Encoded",
    "ExpectedDocument",
    "Message",
    "ToolCall",
    "TrainOn",
    "read_messages",
    "read_tools",
    "template_of",
    "try_template",
]
