"""Pictures of the right size with the right pixels, and curves from an unfinished run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from prdp_fast.reporting.curves import plot_curves, read_metrics
from prdp_fast.reporting.images import FONT_SIZE, PADDING, comparison_grid, file_name, image_grid, model_grid, wrap

COLOURS = ((200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200))
PROMPT = "a medium orange triangle with a purple outline at the middle center on a yellow background"


def plain_images(count: int, side: int = 8) -> torch.Tensor:
    """(count, 3, side, side) uint8, each of one colour."""
    colours = torch.tensor(COLOURS, dtype=torch.uint8)[torch.arange(count) % len(COLOURS)]
    return colours[:, :, None, None].expand(count, 3, side, side)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_image_grid_places_images_row_by_row(tmp_path):
    path = image_grid(plain_images(5), tmp_path / "deep" / "grid.png", columns=3, scale=4)
    picture = pixels(path)
    side = 8 * 4
    assert picture.shape[1] == 3 * side + 4 * PADDING
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, 3)
        y, x = PADDING + row * (side + PADDING), PADDING + column * (side + PADDING)
        assert (picture[y : y + side, x : x + side] == colour).all()
    assert not (tmp_path / "deep" / ".grid.png.partial").exists()


def test_image_grid_magnifies_without_blur(tmp_path):
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = pixels(image_grid(images, tmp_path / "grid.png", scale=3))
    inside = picture[PADDING : PADDING + 24, PADDING : PADDING + 24]
    assert (inside == images[0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)).all()


@pytest.mark.parametrize(("side", "width"), [(32, 128), (100, 200), (512, 512)])
def test_image_grid_magnifies_small_images_only(tmp_path, side, width):
    assert pixels(image_grid(plain_images(1, side), tmp_path / "grid.png")).shape[1] == width + 2 * PADDING


def test_captions_are_drawn_below_and_stay_in_their_cell(tmp_path):
    images = plain_images(2, side=32)
    captions = [PROMPT, "donaudampfschifffahrtsgesellschaftskapitaenskajuete"]
    picture = pixels(image_grid(images, tmp_path / "grid.png", columns=2, scale=4, captions=captions))
    bare = pixels(image_grid(images, tmp_path / "bare.png", columns=2, scale=4))
    assert picture.shape[0] > bare.shape[0] + 4 * FONT_SIZE
    below = picture[PADDING + 128 :]
    first, gap, second = (
        below[:, PADDING : PADDING + 128],
        below[:, PADDING + 128 : 2 * PADDING + 128],
        below[:, 2 * PADDING + 128 : -PADDING],
    )
    assert (first < 128).any() and (second < 128).any()
    assert (gap == 255).all() and (below[:, -PADDING:] == 255).all(), "a caption runs out of its cell"


def test_wrap_loses_nothing():
    font = ImageFont.load_default(12)
    for text in (PROMPT, "x" * 200, "word " * 30, "", "tiny"):
        lines = wrap(text, font, 90)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(font.getlength(line) <= 90 for line in lines)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)]
)
def test_image_grid_refuses_other_tensors(tmp_path, bad):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\) uint8"):
        image_grid(bad, tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())


def test_image_grid_refuses_captions_that_do_not_match(tmp_path):
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        image_grid(plain_images(2), tmp_path / "grid.png", captions=["one"])


def test_comparison_grid_pairs_rows(tmp_path):
    before, after = plain_images(4, side=32), plain_images(5, side=32)[1:]
    path = comparison_grid(before, after, [PROMPT] * 4, tmp_path / "pair.png", [0.25] * 4, [0.75] * 4, columns=3)
    picture = pixels(path)
    side = 32 * 5  # the smallest magnification that a caption fits under
    gutter = picture.shape[1] - 3 * (side + PADDING)
    assert gutter > 2 * PADDING, "no room for the labels"
    columns = picture[:, gutter + side // 2]
    found = [tuple(colour) for colour in columns.tolist() if tuple(colour) in COLOURS]
    order = [colour for index, colour in enumerate(found) if index == 0 or colour != found[index - 1]]
    assert order == [COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[4]], "before above after, then the next pair"
    assert (picture[:, :gutter] < 128).any(), "the labels"


def test_comparison_grid_works_without_scores_and_at_full_size(tmp_path):
    picture = pixels(comparison_grid(plain_images(1, 256), plain_images(1, 256), ["x"], tmp_path / "pair.png"))
    assert 256 < picture.shape[1] < 256 + 100 and 512 < picture.shape[0] < 600


def test_comparison_grid_refuses_what_does_not_pair(tmp_path):
    with pytest.raises(ValueError, match="one image before, one after, one prompt"):
        comparison_grid(plain_images(4), plain_images(4), ["x"] * 2, tmp_path / "pair.png")
    with pytest.raises(ValueError, match="one image before"):
        comparison_grid(plain_images(2), plain_images(2), ["x"] * 2, tmp_path / "pair.png", scores_after=[1.0])
    assert not any(tmp_path.iterdir())


def test_pairs_of_two_models_stand_side_by_side(tmp_path):
    """Base left, finetuned right, with white between; a third prompt that has no images yet is left out."""
    left, right = plain_images(2, side=32), plain_images(4, side=32)[2:]
    picture = pixels(model_grid([left, right], ["x", "y", "z"], tmp_path / "pairs.png"))
    side, gap = 32 * 4, 2 * 4
    for number in range(2):
        x = PADDING + number * (2 * side + gap + PADDING)
        cells = (x, x + side, left[number]), (x + side + gap, x + 2 * side + gap, right[number])
        for start, end, image in cells:
            assert (picture[PADDING : PADDING + side, start:end] == image[:, 0, 0].numpy()).all()
        assert (picture[PADDING : PADDING + side, x + side : x + side + gap] == 255).all()
    assert picture.shape[1] == 2 * (2 * side + gap) + 3 * PADDING


def test_one_model_is_a_grid_and_models_of_two_sizes_are_none(tmp_path):
    alone = pixels(model_grid([plain_images(7, side=32)], ["x"] * 7, tmp_path / "alone.png"))
    assert alone.shape[1] == 6 * 128 + 7 * PADDING
    with pytest.raises(ValueError, match="pairs are of equal shapes"):
        model_grid([plain_images(2, side=32), plain_images(2, side=64)], ["x"] * 2, tmp_path / "pairs.png")


def test_a_set_s_label_is_a_file_s_name():
    labels = ["animals:unseen_eval", "../my prompts", "ä:ö", "-"]
    assert [file_name(label) for label in labels] == ["animals-unseen_eval", "my-prompts", "set", "set"]


def test_curves_from_an_unfinished_run(tmp_path):
    lines = []
    for epoch in range(4):
        row = {"epoch": epoch, "reward": 0.1 * epoch, "reward/a": 0.2, "reward_std": 0.1, "loss": 10.0 - epoch, "drift": 1e-6,
               "drift/step_000": 1e-6, "grad_norm": None, "reward/$^$": None if epoch else 1, "images_per_s": 30.0,
               "seconds/rollout": 2.0, "other": 1.0}  # fmt: skip
        lines.append(json.dumps(row))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"epoch": 4, "rew')
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert pixels(path).std() > 5, "an empty picture"
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_curves_need_an_epoch(tmp_path):
    with pytest.raises(FileNotFoundError, match="a run directory"):
        plot_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished epoch"):
        plot_curves(tmp_path)
