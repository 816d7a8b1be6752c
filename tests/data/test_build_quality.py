"""What a question must pass among all others: contradictions, duplicates, priors."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
from PIL import Image

from m4ov.data.production.duplicates import hashes, near_texts, same_answer, similar_images
from m4ov.data.production.quality import judge
from m4ov.data.production.steps import Task, write_rows
from m4ov.data.records import Record, assistant, image, user


def checked(tmp_path, entries):
    """A shard of the check step: (id, image, hashes, question, answer, kind)."""
    path = "steps/check/00000.checked.jsonl"
    values = []
    for id, shown, hashed, question, answer, kind in entries:
        record = Record(id, [user(image("x.png"), question), assistant(answer)], kind=kind, meta={"image_id": shown})
        values.append({"record": record.to_json(), "hashes": hashed})
    return {path: write_rows(tmp_path / path, values)}


def test_contradictions_duplicates_and_priors_are_told_apart(tmp_path):
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    noise, another = random.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    nearly = noise.copy()
    nearly[0, 0] ^= 4
    first, near, other = (hashes(Image.fromarray(pixels)) for pixels in (noise, nearly, another))
    assert first["pixels"] != near["pixels"]
    # Ten images that have nothing in common.
    apart = [{**other, "pixels": f"{n}", "shape": f"{random.integers(2**63):016x}"} for n in range(10)]
    entries = [
        ("a1", "a", first, "What animal is this?", "a cat", "species"),
        ("a2", "a", first, "what animal is this", "A cat.", "species"),
        ("b1", "b", near, "What animal is this here?", "cat", "species"),
        ("c1", "c", other, "What animal is this?", "a cat", "species"),
        ("a3", "a", first, "How many are there?", "2", "counting"),
        ("a4", "a", first, "How many are there?", "3", "counting"),
        *((f"p{n}", f"p{n}", apart[n], "Is it red?", "yes" if n < 9 else "no", "colour") for n in range(10)),
    ]
    settings = {"max_prior": 0.5, "prior_support": 4, "near_text": 0.7, "near_image": 2}
    result = judge(Task(str(tmp_path), "judge", 0, judge, checked(tmp_path, entries), settings))
    verdicts = {row["id"]: row["reason"] for row in result.outputs["00000"]}
    told = {id: reason for id, reason in verdicts.items() if not id.startswith("p")}
    assert told == {"a2": "duplicate", "b1": "near duplicate", "a3": "contradiction", "a4": "contradiction"}
    # Nine of ten say yes: whoever says yes without looking is right in half of what is left.
    assert Counter(reason for id, reason in verdicts.items() if id.startswith("p")) == {"blind": 8}
    assert "p9" not in verdicts
    assert (result.counts["guessed_before"], result.counts["guessed_after"]) == (9, 1)


def test_a_question_that_has_one_answer_whatever_is_shown_is_not_kept(tmp_path):
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    entries = []
    for n in range(6):
        hashed = {"pixels": f"{n}", "shape": f"{random.integers(2**63):016x}", "colour": "0"}
        entries.append((f"x{n}", f"x{n}", hashed, "Is this a flag?", "yes", "object"))
        entries.append((f"y{n}", f"x{n}", hashed, f"What is number {n}?", f"thing {n}", "object"))
    settings = {"max_prior": 0.9, "prior_support": 4, "near_text": 0.9, "near_image": 0}
    result = judge(Task(str(tmp_path), "judge", 0, judge, checked(tmp_path, entries), settings))
    assert {row["id"] for row in result.outputs["00000"]} == {f"x{n}" for n in range(6)}


def test_similar_images_are_those_of_all_pairs():
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    codes = [int(code) for code in random.integers(0, 2**62, 60)]
    for place in range(30):  # neighbours a few bits away
        flipped = random.choice(62, random.integers(0, 6), replace=False)
        codes.append(codes[place] ^ sum(1 << int(bit) for bit in flipped))
    hashed = [{"shape": f"{code:016x}", "colour": "0"} for code in codes]
    for bits in (0, 2, 5):
        expected = list(range(len(codes)))
        for one in range(len(codes)):
            for two in range(one):
                if bin(codes[one] ^ codes[two]).count("1") <= bits:
                    a, b = sorted((expected[one], expected[two]))
                    expected = [a if group == b else group for group in expected]
        assert similar_images(hashed, bits) == expected
    coloured = [{"shape": "0" * 16, "colour": colour} for colour in ("0", "1", "ff")]
    assert similar_images(coloured, 1) == [0, 0, 2]


def test_near_texts():
    texts = ["is there a red shape in the image", "is there a red shape in the image now", "is it blue", "Zürich", ""]
    assert near_texts([*texts, *texts], 0.95)[5:] == [0, 1, 2, 3, 4]
    assert near_texts(texts, 0.75) == [None, 0, None, None, None]
    assert near_texts([], 0.9) == []


def test_near_texts_among_many_are_found_and_nothing_else():
    random = np.random.default_rng(int(os.environ["M4OV_TEST_SEED"]))
    texts = ["".join(random.choice(list("abcdefgh "), 60)) for _ in range(100)]  # of which no two are alike
    near = [f"{text[:-1]}x" for text in texts[:40]]  # 57 of 59 grams are the same
    found = near_texts([*texts, *texts[:20], *near], 0.85)
    assert found[:100] == [None] * 100
    assert found[100:120] == list(range(20))
    assert {place for place in found[120:] if place is not None} <= set(range(40))
    right = sum(place == number for number, place in enumerate(found[120:]))
    assert right >= 38  # hashing may overlook one


def test_answers_that_say_the_same():
    assert same_answer("The United States", "united states.")
    assert same_answer("24", "24.0")
    assert same_answer("1,000", "1000")
    assert not same_answer("24", "25")
    assert not same_answer("a cat", "a dog")
    assert same_answer("the", "The")
