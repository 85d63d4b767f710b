"""A conversation → token ids and loss mask: the one place that knows chat templates.

Training, evaluation and serving all come through here, so that they give a conversation the same ids. Takes a
tokenizer, loads none; knows nothing of files, rows, models or HTTP. Read: messages, turns, format.

How ids are made: the template is rendered once for the whole conversation and once up to each assistant turn with the
generation prompt. Where these texts end, the whole text is cut into segments (`turns`), and each segment is tokenized by
itself (`format`). A prompt of the endpoint therefore is, id for id, the beginning of the training example with the same
turns: no token ever spans the border between what was asked and what is to be answered.
"""

from ftray.chat.encode import ChatFormat, Encoded, template_of
from ftray.chat.messages import Message, read_messages
from ftray.chat.template_trial import try_template

__all__ = ["ChatFormat", "Encoded", "Message", "read_messages", "template_of", "try_template"]
