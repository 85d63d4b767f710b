"""The smallest things that ftray can train: a tokenizer made on the spot, a random two-layer Llama, records to learn.

Made in a second or two, always the same for the same arguments; nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

VOCAB_SIZE = 512
SHARD_RECORDS = 50
# ChatML. Roles and the generation prompt as SmolLM2 and Qwen write them; no default system turn.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SOUNDS = {
    "cat": "meow",
    "cow": "moo",
    "dog": "woof",
    "duck": "quack",
    "frog": "ribbit",
    "hen": "cluck",
    "horse": "neigh",
    "owl": "hoot",
    "pig": "oink",
    "sheep": "baa",
}
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lou", "Mia", "Ned", "Zoë")
Shape = Literal["messages", "prompt-completion", "alpaca", "text", "sharegpt"]


def make_tokenizer(pad_is_end: bool = True) -> Any:
    """A byte-level BPE tokenizer of 512 entries with ChatML's tokens and template.

    Any text can be written with it. pad_is_end: the pad token is the end token, as in many real models.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["\n".join([*pair, "system", "user", "assistant"]) for pair in _pairs(2000, seed=0)]
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_end else "<|pad|>",
        additional_special_tokens=specials,
        model_max_length=1024,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random Llama for `make_tokenizer`: 2 layers, hidden 64, 4 heads over 2; eval mode, 0.1 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # wide enough apart that greedy answers don't hang on rounding
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        attn_implementation="sdpa",
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype).eval()
    torch.random.set_rng_state(state)
    return model


def write_tiny_model(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Saves model and tokenizer as a directory for `model.base`; returns it."""
    make_model(seed, dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_resized_model(directory: Path, is_tied: bool, vocabulary: int, dtype: torch.dtype = torch.float32) -> Path:
    """As `write_tiny_model`, of a vocabulary that was made larger than its tokenizer's afterwards; head tied or not."""
    from transformers import LlamaForCausalLM

    config = make_model().config
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.resize_token_embeddings(vocabulary)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    model.to(dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_records(directory: Path, number: int, seed: int = 0, shape: Shape = "messages") -> Path:
    """Writes `number` records of about 40 to 100 tokens as .jsonl shards of 50; returns the directory for `path`."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_record(q, a, shape), ensure_ascii=False) + "\n" for q, a in _pairs(number, seed)]
    for n in range(0, len(lines), SHARD_RECORDS):
        shard = directory / f"part-{n // SHARD_RECORDS:03d}.jsonl"
        shard.write_text("".join(lines[n : n + SHARD_RECORDS]), encoding="utf-8")
    return directory


def _pairs(number: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions whose answers follow a rule, so that a few steps lower the loss; each its own, by its number."""
    rng = random.Random(seed)
    for n in range(number):
        name, animals = rng.choice(NAMES), rng.sample(sorted(SOUNDS), rng.randint(1, 4))
        question = f"{name} of farm {seed}-{n} meets {', then '.join(f'a {a}' for a in animals)}. What is heard?"
        yield question, f"{name} hears {', then '.join(SOUNDS[a] for a in animals)}."


def _record(question: str, answer: str, shape: Shape) -> dict[str, Any]:
    if shape == "messages":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if shape == "sharegpt":
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    if shape == "alpaca":
        return {"instruction": "Say what is heard.", "input": question, "output": answer}
    if shape == "prompt-completion":
        return {"prompt": question, "completion": answer}
    return {"text": f"{question} {answer}"}
