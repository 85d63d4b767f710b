"""P3, the right loss: packing, micro-batches and padding change neither the loss nor its gradient."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ftray import config
from ftray.chat import ChatFormat, Conversation, Message
from ftray.data.packing import IGNORE_INDEX, PackedSequence, pack_examples
from ftray.model import embedded
from ftray.model.load import load_base, load_tokenizer
from ftray.model.lora import add_adapters
from ftray.train.batch import Batch, collate
from ftray.train.objectives import sft as loss_module
from ftray.train.objectives.base import ObjectiveModel
from ftray.train.objectives.sft import LinearCrossEntropy, LossHead, Sft
from tests import tiny

Document = tuple[list[int], list[bool]]
LENGTHS = [17, 40, 1, 3, 64, 29, 2, 11, 33, 8, 50, 1, 22, 5]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model(seed=3)


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, tiny.VOCAB_SIZE, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in lengths]


def micro_batch(rows: Sequence[PackedSequence]) -> Batch:
    def matrix(name: str) -> Any:
        return np.stack([getattr(row, name) for row in rows])

    num_tokens = np.array([row.num_tokens for row in rows], dtype=np.int32)
    return collate(matrix("input_ids"), matrix("labels"), matrix("position_ids"), num_tokens)


def packed_loss(model: Any, rows: Sequence[PackedSequence]) -> torch.Tensor:
    loss: torch.Tensor = ObjectiveModel(model, Sft())(micro_batch(rows))[0]
    return loss


def plain_loss(model: Any, document: Document) -> torch.Tensor:
    """A document by itself, by the textbook: all logits, in float64, summed where the next token is supervised."""
    ids, mask = document
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    chosen = [-logits[t, ids[t + 1]] for t in range(len(ids) - 1) if mask[t + 1]]
    return torch.stack(chosen).sum() if chosen else logits.sum() * 0


def gradients(model: Any, losses: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("max_seq_len", [64, 100, 1024])
@pytest.mark.parametrize("packing", [True, False])
def test_packed_loss_is_the_sum_of_the_documents_losses(model: Any, max_seq_len: int, packing: bool) -> None:
    documents = random_documents(LENGTHS)
    rows = pack_examples(documents, max_seq_len, 1, packing)
    with torch.no_grad():
        alone = sum(float(plain_loss(model, document)) for document in documents)
        packed = float(packed_loss(model, rows))
    assert alone > 500
    assert packed == pytest.approx(alone, rel=1e-5)


def test_packed_gradients_are_those_of_the_documents_one_by_one(model: Any) -> None:
    documents = random_documents(LENGTHS, seed=1)
    rows = pack_examples(documents, 100, 1)
    packed = gradients(model, iter([packed_loss(model, rows)]))
    alone = gradients(model, (plain_loss(model, document) for document in documents))
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        assert (gradient - alone[name]).norm() <= 1e-5 * alone[name].norm(), name


def test_packed_loss_is_the_sum_of_the_documents_losses_on_a_real_model() -> None:
    base = config.ModelConfig(base=embedded.NAME)
    chat, model = ChatFormat(load_tokenizer(base)), load_base(base, torch.float32).eval()
    asked = [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Count to five.", "One, two, three, four, five."),
        ("Name a colour.", "Blue"),
    ]
    encoded = [chat.encode_example(Conversation((Message("user", q), Message("assistant", a)))) for q, a in asked]
    documents = [(e.input_ids, e.loss_mask) for e in encoded]
    (row,) = pack_examples(documents, 256, chat._tokenizer.pad_token_id)
    with torch.no_grad():
        alone = sum(float(plain_loss(model, document)) for document in documents)
        packed = float(packed_loss(model, [row]))
    assert row.num_trained_tokens == sum(sum(mask) for _, mask in documents)
    assert 0.1 < alone / row.num_trained_tokens < 3  # it knows what it is talking about
    assert packed == pytest.approx(alone, rel=1e-5)


def test_no_document_sees_another_one_of_its_row_or_batch(model: Any) -> None:
    documents = random_documents([20, 1, 30, 14, 40], seed=2)
    rows = pack_examples(documents, 65, 1)
    order = [d for row in rows for d in row.documents]
    ends = np.cumsum([0, *(n for row in rows for n in row.lengths)])
    spans = {d: slice(a, b) for d, (a, b) in zip(order, pairwise(ends.tolist()), strict=True)}

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        return found

    batch = micro_batch(rows)
    before = logits(batch.input_ids)
    for document, span in spans.items():
        changed = batch.input_ids.clone()
        changed[0, span] = (changed[0, span] + 7) % tiny.VOCAB_SIZE
        after = logits(changed)
        assert not torch.allclose(after[span], before[span])
        for other, elsewhere in spans.items():
            if other != document:
                assert (after[elsewhere] - before[elsewhere]).abs().max() <= 1e-6


def test_the_mean_over_a_global_batch_does_not_depend_on_the_micro_batch(model: Any) -> None:
    rows = pack_examples(random_documents([60, 50, 55, 9, 6, 3, 64], seed=4), 64, 1)[:4]
    assert len({row.num_trained_tokens for row in rows}) > 1  # a mean of means would differ
    total = sum(row.num_trained_tokens for row in rows)

    def step(size: int) -> tuple[float, dict[str, torch.Tensor]]:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        with torch.no_grad():
            mean = sum(float(packed_loss(model, part)) for part in parts) / total
        return mean, gradients(model, (packed_loss(model, part) / total for part in parts))

    mean, gradient = step(4)
    for size in (2, 1):
        other_mean, other = step(size)
        assert other_mean == pytest.approx(mean, rel=1e-6)
        for name in gradient:
            assert (other[name] - gradient[name]).norm() <= 1e-5 * gradient[name].norm(), name


def test_padding_never_reaches_the_model(model: Any) -> None:
    documents = random_documents([10, 20], seed=5)
    batch = micro_batch(pack_examples(documents, 512, 1, packing=False))
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 30)
    assert batch.input_ids[0].tolist() == documents[0][0] + documents[1][0]
    assert batch.position_ids[0].tolist() == [*range(10), *range(20)]
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}


def test_documents_are_told_by_where_they_begin() -> None:
    rows = pack_examples(random_documents([10, 1, 20, 1, 1]), 24, 1)
    batch = micro_batch(rows)
    lengths = [n for row in rows for n in row.lengths]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert (batch.cu_seqlens.dtype, batch.max_length) == (torch.int32, 20)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 30])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_fused_cross_entropy_is_the_plain_one_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, is_frozen: bool
) -> None:
    monkeypatch.setattr(loss_module, "piece_tokens", lambda vocabulary: 7)
    torch.manual_seed(num_tokens)
    hidden, weight = torch.randn(num_tokens, 16) * 3, torch.randn(50, 16)
    targets = torch.randint(50, (num_tokens,))

    def run(fused: bool) -> list[torch.Tensor | None]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not is_frozen)
        plain = torch.nn.functional.cross_entropy
        loss = LinearCrossEntropy.apply(h, w, targets) if fused else plain(h @ w.T, targets, reduction="sum")
        (loss * 0.25).backward()  # as divided by the tokens of a global batch
        return [loss.detach(), h.grad, w.grad]

    for found, wanted in zip(run(fused=True), run(fused=False), strict=True):
        if found is None or wanted is None:
            assert found is wanted is None
        else:
            assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_logits_are_computed_at_supervised_positions_only(model: Any) -> None:
    rows = pack_examples(random_documents([30, 20], seed=6), 64, 1)
    loss, seen = ObjectiveModel(model, Sft()), []
    loss.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    loss(micro_batch(rows))
    assert seen == [torch.Size([sum(row.num_trained_tokens for row in rows), model.config.hidden_size])]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_without_gradients_the_loss_is_the_same_and_none_are_made(
    monkeypatch: pytest.MonkeyPatch, smoothing: float
) -> None:
    monkeypatch.setattr(loss_module, "piece_tokens", lambda vocabulary: 7)
    torch.manual_seed(0)
    hidden, targets = torch.randn(30, 16) * 3, torch.randint(50, (30,))
    head = LossHead(torch.nn.Linear(16, 50, bias=False))
    wanted = head(hidden, targets, smoothing)
    monkeypatch.setattr(loss_module, "LinearCrossEntropy", None)
    with torch.no_grad():
        assert float(head(hidden, targets, smoothing)) == pytest.approx(float(wanted), rel=1e-6)


def test_an_adapter_on_the_head_is_part_of_the_loss() -> None:
    method = config.MethodConfig(rank=4, target_modules=["lm_head"])
    model = add_adapters(tiny.make_model(), method, seed=0)
    rows = pack_examples(random_documents([30, 20], seed=6), 64, 1)
    before = float(packed_loss(model, rows))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss = packed_loss(model, rows)
    assert abs(float(loss) - before) > 1
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_" in name)


def test_a_batch_without_supervised_tokens_gives_zero_and_no_nan(model: Any) -> None:
    ids = [5, 6, 7, 8]
    rows = pack_examples([(ids, [True, False, False, False])], 16, 1)  # the first token is never predicted
    assert rows[0].num_trained_tokens == 0
    loss = packed_loss(model, rows)
    assert float(loss.detach()) == 0
    for name, gradient in gradients(model, iter([packed_loss(model, rows)])).items():
        assert gradient.abs().max() == 0, name


def test_the_loss_is_a_float32_sum_also_in_bf16() -> None:
    rows = pack_examples(random_documents([40, 40], seed=7), 64, 1)
    with torch.no_grad():
        exact = float(packed_loss(tiny.make_model(seed=3), rows))
        loss = packed_loss(tiny.make_model(seed=3, dtype=torch.bfloat16), rows)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(exact, rel=2e-2)


def test_an_untrained_model_s_loss_is_that_of_guessing() -> None:
    """Absolute scale: a model that says nothing pays log(vocabulary) for each supervised token."""
    silent = tiny.make_model()
    torch.nn.init.zeros_(silent.lm_head.weight)
    rows = pack_examples(random_documents(LENGTHS), 64, 1)
    total = sum(row.num_trained_tokens for row in rows)
    assert total == sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    with torch.no_grad():
        mean = float(packed_loss(silent, rows)) / total
    assert mean == pytest.approx(np.log(tiny.VOCAB_SIZE), rel=1e-6)
