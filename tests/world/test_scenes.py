from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prdp_fast.world import scenes


@settings(max_examples=200, deadline=None)
@given(st.integers(0, scenes.NUM_SCENES - 1))
def test_scene_and_prompt_are_one(index: int) -> None:
    scene = scenes.scene_at(index)
    assert scenes.parse(scene.prompt()) == scene
    assert len({scene.fill, scene.outline, scene.background}) == 3


def test_enumeration_has_no_repeats() -> None:
    step = 7  # the whole of it costs a second
    numbers = range(0, scenes.NUM_SCENES, step)
    assert len({scenes.scene_at(index) for index in numbers}) == len(numbers)
    assert scenes.NUM_SCENES == 160_380


@pytest.mark.parametrize("index", [-1, scenes.NUM_SCENES])
def test_index_outside_the_world(index: int) -> None:
    with pytest.raises(IndexError, match=str(index)):
        scenes.scene_at(index)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a huge red circle with a blue outline at the top left on a white background",
        "a small red circle with a blue outline at the top left on a white background, photo",
    ],
)
def test_other_sentences_are_refused_with_the_grammar(prompt: str) -> None:
    with pytest.raises(ValueError, match="expected 'a SIZE COLOUR SHAPE"):
        scenes.parse(prompt)


def test_masks_cover_every_pixel_once() -> None:
    for shape in scenes.SHAPES:
        for size in scenes.SIZES:
            masks = scenes.region_masks(shape, size, 16, 16)
            torch.testing.assert_close(masks.sum(0), torch.ones(scenes.IMAGE_SIZE, scenes.IMAGE_SIZE))
            assert masks.min() >= 0 and masks.flatten(1).sum(1).min() > 8  # every region can be seen


def test_render_is_seeded() -> None:
    drawn = [scenes.scene_at(index) for index in (0, 40_000, 160_000)]
    first, second = (scenes.render(drawn, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (3, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, second)
