"""Small chat templates, one per way in which families of models write tool calls and reasoning.

Each writes turns, tools and results as simply as the format allows. They are not copies of any model's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

CHATML = ("<|im_start|>", "<|im_end|>")
_TOOLS = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
_TURN = "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_ASSISTANT = "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
_CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
_JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
_THINK = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"


def _chatml(answer: str, prompt: str = _PROMPT) -> str:
    return _TOOLS + _ASSISTANT + answer + "<|im_end|>\n" + _TURN + prompt


_XML = (
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n<function={{ f.name }}>\n"
    "{% for k, v in f.arguments | items %}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>{% endfor %}"
)
_GLM = (
    "{{ '\n' if m.content or not loop.first }}<tool_call>{{ f.name }}\n{% for k, v in f.arguments | items %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}"
)
_MISTRAL_IDS = (
    "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content or '' }}{% if m.tool_calls %}"
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>CALL<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_HARMONY = (
    "<|start|>system<|message|>{% for t in tools or [] %}{{ t | tojson }}{% endfor %}<|end|>{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}{% if m.tool_calls %}"
    "{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ messages[loop.index0 - 1].tool_calls[0].function.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.first %}[AVAILABLE_TOOLS]"
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]"
    "{{ m.content }}[/TOOL_RESULTS]{% else %}" + _MISTRAL_IDS + "{{ m.content or '' }}CALLS</s>{% endif %}{% endfor %}"
)
_MISTRAL_LIST = (
    "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS][' if loop.first else ', ' }}{\"name\": \"{{ c.function.name }}\", "
    '"arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{{ \']\' if loop.last }}{% endfor %}'
)

_CONTENT = "{{ m.content or '' }}"
_HERMES = _CALLS + "{{ '\n' if m.content or not loop.first }}<tool_call>\n" + _JSON + "\n</tool_call>{% endfor %}"
_LIST = _CALLS + "{{ ', ' if not loop.first }}" + _JSON + "{% endfor %}]"
_LLAMA = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call') }}{% endif %}{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL_ARGS = _CALLS + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}"
_FENCED = "function<｜tool▁sep｜>{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```"
_UNFENCED = "{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments | tojson }}"

LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
MISTRAL_TOKENS = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
DEEPSEEK_TOKENS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
HARMONY_TOKENS = ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")

TEMPLATES: dict[str, tuple[str, Sequence[str]]] = {  # name → template, special tokens
    "hermes": (_chatml(_CONTENT + _HERMES), CHATML),
    "qwen3": (_chatml(_THINK + _CONTENT + _HERMES), CHATML),
    "qwen3_xml": (
        _chatml(_THINK + _CONTENT + _CALLS + _XML, _PROMPT.replace("assistant\n", "assistant\n<think>\n")),
        CHATML,
    ),
    "glm4": (_chatml(_THINK + _CONTENT + _CALLS + _GLM), CHATML),
    "granite": (
        _chatml(_CONTENT + "{% if m.tool_calls %}<|tool_call|>[" + _LIST + "{% endif %}"),
        (*CHATML, "<|tool_call|>"),
    ),
    "nemotron": (_chatml(_CONTENT + "{% if m.tool_calls %}<TOOLCALL>[" + _LIST + "</TOOLCALL>{% endif %}"), CHATML),
    "llama3_json": (_LLAMA, LLAMA_TOKENS),
    "mistral_list": (_MISTRAL.replace("}}CALLS</s>", "}}" + _MISTRAL_LIST + "</s>"), MISTRAL_TOKENS),
    "mistral_args": (_MISTRAL.replace("}}CALLS</s>", "}}" + _MISTRAL_ARGS + "</s>"), MISTRAL_TOKENS),
    "deepseek_v3": (_DEEPSEEK.replace("CALL", _FENCED), DEEPSEEK_TOKENS),
    "deepseek_v31": (
        _DEEPSEEK.replace("CALL", _UNFENCED),
        (*DEEPSEEK_TOKENS, "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    ),
    "harmony": (_HARMONY, HARMONY_TOKENS),
}
SINGLE = ("llama3_json", "harmony")  # templates with one call per turn
THINKING = ("qwen3", "qwen3_xml", "glm4", "harmony")  # templates with reasoning


def with_template(tokenizer: Any, name: str) -> Any:
    """The tokenizer with one of TEMPLATES and its special tokens. The last turn's end is its end token."""
    template, specials = TEMPLATES[name]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.chat_template = template
    ends = ("<|im_end|>", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>", "<|return|>")
    tokenizer.eos_token = next(token for token in ends if token in specials)
    return tokenizer
