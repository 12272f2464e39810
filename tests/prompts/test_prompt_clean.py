from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prdp_fast.prompts import clean
from prdp_fast.prompts.clean import Limits, check, comparable, tidy

GOOD = [
    "a cat",
    "A painting of an ant",
    "猫",
    "一只戴着红色帽子的小猫坐在窗台上，看着外面的雨。",  # no spaces
    "एक छोटी लड़की नदी के किनारे खड़ी है",  # vowel signs are marks, not letters
    "صورة قطة ترتدي قبعة حمراء",
    "портрет кота, масло, холст",
    "dog 🐕, 8k, uhd",
    "👨‍👩‍👧 family portrait",  # joined by zero-width joiners
    "((masterpiece)), (red hat:1.3), [blurry], <lora:film:0.8>, 1girl, --ar 16:9",
    "a very very very very very old tree",  # five in a row
    "hmmmmmmmmmm, a cake",
    "see https://example.org for a photo of a red house with a blue roof at the lake",
    "R2-D2 & C-3PO, 35mm f/1.8, $100 bill",
    "1girl",
    "portrait\tof\r\na\u2003queen",
]
BAD = [
    ("", "empty"),
    (" \t\n\u3000", "empty"),
    ("a\x00cat", "control"),
    ("a cat\x1b[31m", "control"),
    ("caf\ufffd at night", "control"),
    ("half \ud83d a pair", "control"),
    ("12345", "no letters"),
    ("!!! ... ???", "no letters"),
    ("🐕🐕", "no letters"),
    ("a ---///***", "symbols"),
    ("#$%&* x #$%&*", "symbols"),
    ("https://example.org/some/long/path.png", "url"),
    ("look: WWW.EXAMPLE.ORG/some/long/path", "url"),
    ("aaaaaaaaaaaaaaaaaah", "repetition"),
    ("cat cat cat Cat CAT cat", "repetition"),
    ("猫猫猫猫猫猫猫猫猫猫猫猫", "repetition"),
    ("big red dog " * 10, "repetition"),
    ("word " * 300, "too long"),
]


@pytest.mark.parametrize("text", GOOD)
def test_prompts_of_any_language_pass(text: str) -> None:
    tidied, reason = check(text, Limits())
    assert reason is None
    assert tidied == " ".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_noise_is_named(text: str, reason: str) -> None:
    assert check(text, Limits())[1] == reason
    assert reason in clean.REASONS


def test_lengths_are_those_of_the_tidied_text() -> None:
    assert check("  a   cat  ", Limits(5, 5)) == ("a cat", None)
    assert check("a cat", Limits(6, 9))[1] == "too short"
    assert check("a cat", Limits(1, 4))[1] == "too long"


def test_the_same_but_for_case_space_and_composition() -> None:
    one, other = "Bär im  ZUG ", "ba\u0308r\nIM zug"
    assert tidy(one) == "Bär im ZUG" and comparable(tidy(one)) == comparable(tidy(other))
    assert comparable(tidy("STRASSE")) == comparable(tidy("straße"))
    assert comparable(tidy("a cat")) != comparable(tidy("a cat."))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_text_gets_an_answer_that_can_be_written(text: str) -> None:
    tidied, reason = check(text, Limits())
    assert reason is None or reason in clean.REASONS
    if reason is None:
        assert tidied.encode() and check(tidied, Limits()) == (tidied, None)  # tidying twice changes nothing
        assert comparable(comparable(tidied)) == comparable(tidied)
