"""Copies are found however they are disguised, and what only looks alike is not: equal, near and leaked records."""

import random
from itertools import pairwise

import numpy as np
import pytest

from ftray.chat import Message, ToolCall
from ftray.data.checks import contamination
from ftray.data.checks.contamination import Keys, NgramHashes, eval_fingerprints, find_leaks, fingerprints
from ftray.data.checks.dedup import (
    NUM_PERM,
    find_equal,
    find_near,
    find_near_to,
    join_signatures,
    record_keys,
    signature,
    spoken_text,
)

LETTERS = random.Random(99)
WORDS = ["".join(LETTERS.choice("abcdefghijklmnoprstuvwz") for _ in range(LETTERS.randint(3, 9))) for _ in range(3000)]
TEMPLATE = (
    "You are a careful clerk of a bank. Read the letter of the customer and name the product it speaks of. Letter: "
)


def chat(question: str, answer: str = "an answer", system: str | None = None) -> list[Message]:
    head = [Message("system", system)] if system else []
    return [*head, Message("user", question), Message("assistant", answer)]


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + "."


def disguise(rng: random.Random, text: str) -> str:
    """The same with other casing, punctuation, two words swapped, or one word edited."""
    words = text.split()
    at = rng.randrange(len(words) - 1)
    way = rng.randrange(4)
    if way == 0:
        return text.upper()
    if way == 1:
        return text.replace(".", "!").replace(" ", ", ", 1)
    if way == 2:
        words[at], words[at + 1] = words[at + 1], words[at]
    else:
        words[at] = rng.choice(WORDS)
    return " ".join(words)


def signatures(texts: list[str]) -> np.ndarray:
    return np.stack([signature(spoken_text(chat(text))) for text in texts])


def test_records_are_equal_but_for_white_space_and_in_nothing_else() -> None:
    base = record_keys(chat("How much?\n  Two", "three"))
    assert record_keys(chat(" How  much? Two ", "three ")) == base
    others = [
        chat("how much? two", "three"),
        chat("How much? Two", "four"),
        chat("How much? Two", "three", "s"),
        [Message("user", "How much? Two three")],
        [Message("assistant", "How much? Two"), Message("user", "three")],
    ]
    assert len({record_keys(turns).whole for turns in others} | {base.whole}) == len(others) + 1
    other = record_keys(chat("How much? Two", "four"))
    assert (other.prompt, other.answer == base.answer) == (base.prompt, False)
    assert record_keys([Message("assistant", "plain text")]).prompt == 0


def test_records_with_other_tools_or_other_trained_turns_are_no_copies() -> None:
    base = record_keys(chat("Weather?"))
    tools = [record_keys(chat("Weather?"), [{"function": {"name": name}}]) for name in ("f", "g")]
    assert len({keys.whole for keys in (base, *tools)}) == len({keys.prompt for keys in (base, *tools)}) == 3
    untrained = record_keys([*chat("Weather?")[:1], Message("assistant", "an answer", train=False)])
    assert untrained.whole != base.whole
    assert (untrained.prompt, untrained.answer) == (base.prompt, base.answer)  # the model reads the same


def test_records_that_differ_in_a_call_or_in_reasoning_are_no_copies() -> None:
    def record(city: str, reasoning: str = "") -> list[Message]:
        call = ToolCall("get_weather", {"city": city})
        return [Message("user", "How is it?"), Message("assistant", "", reasoning=reasoning, tool_calls=(call,))]

    assert record_keys(record("Oslo")) == record_keys(record("Oslo"))
    keys = [record_keys(each) for each in (record("Oslo"), record("Rome"), record("Oslo", "I look."))]
    assert len({each.whole for each in keys}) == len({each.answer for each in keys}) == 3
    assert len({each.prompt for each in keys}) == 1


def test_of_equal_records_the_first_stays() -> None:
    pairs = find_equal(np.array([5, 7, 5, 9, 7, 5], np.uint64))
    assert [(p.place, p.of) for p in pairs] == [(2, 0), (4, 1), (5, 0)]
    assert list(find_equal(np.zeros(0, np.uint64))) == []


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    rng = random.Random(0)
    texts = [sentence(rng, rng.randint(20, 40)) for _ in range(1500)]
    planted = {}
    for _ in range(200):
        of = rng.randrange(1500)
        planted[len(texts)] = of
        texts.append(disguise(rng, texts[of]))
    found = {p.place: p for p in find_near(signatures(texts))}
    right = [place for place in found if place in planted]
    assert len(right) / len(planted) >= 0.98
    assert len(found) - len(right) == 0
    for place in right:
        assert found[place].of in (planted[place], *[p for p, of in planted.items() if of == planted[place]])


def test_what_stays_is_never_named_as_gone_and_the_earlier_stays() -> None:
    rng = random.Random(1)
    base = sentence(rng, 30)
    texts = [base, *[disguise(rng, base) for _ in range(30)], sentence(rng, 30)]
    pairs = find_near(signatures(texts))
    gone = {p.place for p in pairs}
    assert all(p.of < p.place and p.of not in gone for p in pairs)
    assert 0 not in gone
    assert 31 not in gone


def test_a_template_that_all_records_share_makes_nothing_alike() -> None:
    rng = random.Random(2)
    template = sentence(rng, 60)  # three quarters of each record
    texts = [f"{template} {sentence(rng, 10)}" for _ in range(300)]
    texts.append(texts[7].upper())
    pairs = find_near(signatures(texts))
    assert [(p.place, p.of) for p in pairs] == [(300, 7)]


def test_a_record_that_is_only_near_to_one_that_goes_stays() -> None:
    rng = random.Random(8)
    first = [rng.choice(WORDS) for _ in range(40)]
    second = [*first[:36], *(rng.choice(WORDS) for _ in range(4))]
    third = [*(rng.choice(WORDS) for _ in range(4)), *second[4:]]
    found = signatures([" ".join(words) for words in (first, second, third)])
    assert [(p.place, p.of) for p in find_near(found[:2])] == [(1, 0)]
    assert [(p.place, p.of) for p in find_near(found[1:])] == [(1, 0)]
    assert [(p.place, p.of) for p in find_near(found)] == [(1, 0)]


def test_signatures_estimate_how_much_is_shared() -> None:
    rng = random.Random(3)
    a, b = sentence(rng, 400), sentence(rng, 400)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        cut = int(len(a) * share)
        mixed = a[:cut] + b[cut:]
        sets = [{spoken_text(chat(t))[i : i + 5] for i in range(len(t) - 5)} for t in (a, mixed)]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        one, other = signatures([a, mixed])
        assert abs(float((one == other).mean()) - true) <= 0.15
    assert signatures(["", "é", "🙂🙂"]).shape == (3, NUM_PERM)


def test_near_duplicates_do_not_depend_on_the_process_or_on_what_else_there_is() -> None:
    assert signature("the same text everywhere")[:4].tolist() == [4986, 37087, 54351, 39181]


def test_records_near_to_held_out_ones_are_found_and_named() -> None:
    rng = random.Random(4)
    train, heldout = [sentence(rng, 25) for _ in range(400)], [sentence(rng, 25) for _ in range(60)]
    train[100], train[200] = disguise(rng, heldout[10]), heldout[20]
    pairs = find_near_to(join_signatures([signatures(heldout), signatures(train)]), len(heldout))
    assert [(p.place, p.of) for p in pairs] == [(100, 10), (200, 20)]
    assert list(find_near_to(signatures(train), 0)) == []


def test_joined_signatures_are_those_that_are_wanted_in_their_order() -> None:
    parts = [np.arange(n * NUM_PERM, dtype=np.uint16).reshape(n, NUM_PERM) + n for n in (3, 0, 2)]
    wanted = np.array([True, False, True, False, True])
    assert np.array_equal(join_signatures(parts), np.concatenate(parts))
    assert np.array_equal(join_signatures(parts, wanted), np.concatenate(parts)[wanted])
    assert join_signatures(parts, ~np.ones(5, bool)).shape == (0, NUM_PERM)


def pieces(records: list[Keys], sizes: list[int]) -> list[NgramHashes]:
    """Records' hashes in pieces of so many records."""
    cuts = np.cumsum([0, *sizes])
    return [
        NgramHashes(np.concatenate(records[a:b]), np.cumsum([0, *map(len, records[a:b])]), int(a))
        for a, b in pairwise(cuts)
        if b > a
    ]


def leaks(train: list[list[Message]], heldout: list[list[Message]], num_pieces: int = 1) -> list[tuple[int, int]]:
    grams = [fingerprints(turns) for turns in train]
    sizes = [len(part) for part in np.array_split(np.arange(len(train)), num_pieces)]
    held = [eval_fingerprints(turns) for turns in heldout]
    found = [
        find_leaks(pieces([h[kind] for h in held], [1, len(held) - 1]), pieces(grams, sizes)) if held else []
        for kind in (0, 1)
    ]
    return sorted({(leak.place, leak.of) for kind in found for leak in kind})


def test_leaks_are_the_same_whatever_is_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    heldout = [chat(sentence(rng, 20), sentence(rng, 12)) for _ in range(80)]
    train = [chat(sentence(rng, 20), sentence(rng, 12)) for _ in range(300)]
    for place in range(0, 300, 30):
        train[place] = heldout[place // 5]
    once = leaks(train, heldout)
    assert [place for place, _ in once] == list(range(0, 300, 30))
    monkeypatch.setattr(contamination, "PART_HASHES", 97)
    assert leaks(train, heldout, num_pieces=7) == once


def test_leaked_records_are_found_alone_inside_longer_ones_and_with_another_answer() -> None:
    rng = random.Random(5)
    heldout = [chat(sentence(rng, 20), sentence(rng, 12)) for _ in range(100)]
    train = [chat(sentence(rng, 20), sentence(rng, 12)) for _ in range(1000)]
    question = heldout[3][0].content
    train[10] = heldout[1]
    train[20] = chat(f"{sentence(rng, 50)} {heldout[2][0].content} {sentence(rng, 50)}", heldout[2][1].content)
    train[30] = chat(question.upper().replace(".", " ?"), sentence(rng, 12))
    heldout.append(chat("Can I use my card in Japan and Korea?", "card_use"))
    for n, length in ((40, 10), (50, 100)):  # a short question in a short message, and in a long one
        train[n] = chat(f"{sentence(rng, length)} {heldout[-1][0].content} Thanks.", "other")
    assert leaks(train, heldout) == [(10, 1), (20, 2), (30, 3), (40, 100)]


@pytest.mark.parametrize("num_heldout", [5, 100])
def test_a_template_is_no_leak(num_heldout: int) -> None:
    rng = random.Random(6)
    heldout = [chat(TEMPLATE + sentence(rng, 12), "yes") for _ in range(num_heldout)]
    train = [chat(TEMPLATE + sentence(rng, 12), "yes") for _ in range(1000)]
    assert leaks(train, heldout) == []


def test_short_turns_give_nothing_away_and_any_script_is_read() -> None:
    assert len(fingerprints(chat("Yes please.", "Thank you very much."))) == 0
    assert len(fingerprints(chat("What is the capital of France?", "Paris"))) == 2
    assert contamination.words("Привет, мир") == ["привет", "мир"]
    assert contamination.words("东京 is big") == ["东", "京", "is", "big"]


def test_a_shared_passage_of_seven_words_always_shares_a_hash_however_long_the_texts() -> None:
    rng = random.Random(7)
    for _ in range(200):
        passage = sentence(rng, contamination.NGRAM + contamination.WINDOW - 1)
        texts = [f"{sentence(rng, rng.randint(0, n))} {passage} {sentence(rng, n)}" for n in (99, rng.randint(0, 99))]
        long, held = fingerprints(chat(texts[0], "x")), eval_fingerprints(chat(texts[1], "x"))
        assert set(long.tolist()) & set(held[1].tolist()) & set(held[0].tolist())
