"""Captions of any text: every character drawn or marked, lines of their width, quickly however long a word is."""

from __future__ import annotations

import time

import pytest
import torch
from PIL import Image, ImageFont

from prdp_fast.reporting import captions
from prdp_fast.reporting.captions import MOST_LINES, Face, Typeface, wrap
from prdp_fast.reporting.images import comparison_grid, image_grid, note

CJK = "樱花山坡雪山湖泊"
WIDTH = 128


class Counting:
    """A font of characters that are 6 pixels wide."""

    measured = 0

    def getlength(self, text: str) -> float:
        self.measured += len(text)
        return 6.0 * len(text)


def typeface(search: bool = False) -> Typeface:
    return Typeface(12, search=search)


@pytest.mark.parametrize("most", [None, 20])
def test_wrapping_a_long_word_measures_a_few_times_its_length(most) -> None:
    font, text = Counting(), (CJK * 1250)[:10_000]
    lines = wrap(text, font, WIDTH, most)
    assert font.measured < 20 * len(text), "not its square"
    if most is None:
        assert "".join(lines) == text and {len(line) for line in lines[:-1]} == {WIDTH // 6}
    else:
        assert font.measured < 20 * most * WIDTH, "what is cut off is not measured"
        assert len(lines) == most and "".join(lines) == text[: most * (WIDTH // 6) - 3] + "..."


def test_lines_are_those_of_a_search_from_the_end() -> None:
    """The widest prefix that fits, found by trying every one."""
    font = ImageFont.load_default(12)
    for text in ("a medium orange triangle " * 4, "W" * 50 + "i" * 50, "x", "ab c" * 30):
        expected, current = [], ""
        for word in text.split():
            joined = f"{current} {word}".strip()
            if font.getlength(joined) <= WIDTH:
                current = joined
                continue
            expected += [current] if current else []
            while font.getlength(word) > WIDTH:
                cut = max(n for n in range(1, len(word)) if font.getlength(word[:n]) <= WIDTH)
                expected.append(word[:cut])
                word = word[cut:]
            current = word
        assert wrap(text, font, WIDTH) == expected + [current]


def test_two_prompts_of_a_thousand_characters_take_no_time(tmp_path) -> None:
    start = time.perf_counter()
    path = image_grid(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tmp_path / "grid.png", captions=[CJK * 125, "x" * 100_000])
    assert time.perf_counter() - start < 5, "minutes before"
    with Image.open(path) as picture:
        assert picture.height < 128 + 16 * (MOST_LINES + 2)


def test_a_letter_keeps_its_marks_and_a_family_stays_together() -> None:
    font = Counting()
    marked = "x\u0332" * 40  # no single character: what NFC cannot compose
    assert all(line[0] == "x" for line in wrap(marked, font, WIDTH))
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    assert all(line == family * (len(line) // 5) for line in wrap(family * 20, font, WIDTH))
    assert all(len(line) <= WIDTH // 6 + captions.MOST_JOINED for line in wrap("a\u200d" * 500, font, WIDTH)), "no endless one"
    assert len(wrap("\u0301" * 90, font, WIDTH)) < 10 and wrap("ab", font, 1) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat", "a cat"), ("", ""), (" a\x00b\x1b[31mc\r\nnew\tline ", "a b [31mc new line"), ("a\u202eb\u200eb", "abb"),
        ("e\u0301tude", "étude"), ("кошка قطة γάτα", "кошка قطة γάτα"), ("\u2764\ufe0f", "\u2764"),
        (CJK * 3 + " x", "[24 x no font] x"), ("a🦩🦩b", "a[2 x no font]b"), ("\ud800 lone", "[1 x no font] lone"),
    ],
)  # fmt: skip
def test_what_no_font_has_gets_a_mark(text: str, shown: str) -> None:
    assert typeface().shown(text) == shown


def test_a_word_is_drawn_in_one_font_and_so_are_words_from_right_to_left() -> None:
    letters = typeface()
    assert [run for run, _ in letters.runs("a café in Rome")] == ["a ", "café ", "in Rome"]
    assert [run for run, _ in letters.runs("قطة تجلس، 3 على")] == ["قطة تجلس، 3 على"]


def test_a_font_of_the_system_is_found_for_what_the_others_lack(monkeypatch) -> None:
    """Here it is one that is at hand, under the name of one that fontconfig gives for the character."""
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    asked = []
    monkeypatch.setattr(captions, "matching_files", lambda character: asked.append(character) or [("/no/such.ttc", 0), (path, 0)])
    plain = Typeface(12, [Face(ImageFont.load_default(12), lambda number: number < 127)])
    assert plain.shown("кошка") == "кошка" and asked == ["к"]
    assert plain.shown(CJK) == "[8 x no font]" and len(asked) == captions.SEARCHES, "a bounded number of searches"
    assert plain.getlength("кошка") > 20


@pytest.mark.parametrize("program", ["exit 1", "echo nonsense", "printf '/no/such\\tx\\n'", "sleep 60"])
def test_a_broken_fontconfig_is_no_fault(monkeypatch, tmp_path, program: str) -> None:
    script = tmp_path / "fc-match"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(captions, "SEARCH_S", 0.5)
    monkeypatch.setattr(captions, "KNOWN", ())
    assert typeface(search=True).shown("樱") == "[1 x no font]"


def test_scores_below_pictures_say_when_there_is_none(tmp_path) -> None:
    assert [note(score) for score in (0.5, -3.25, float("nan"), float("inf"), 1e38)] == [
        "reward 0.50", "reward -3.25", "no score", "no score", "reward 1.00e+38",
    ]  # fmt: skip
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    comparison_grid(black, black, ["x"], tmp_path / "pair.png", [float("nan")], [1e38])
