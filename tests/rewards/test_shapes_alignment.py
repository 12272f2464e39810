from __future__ import annotations

import math

import pytest
import torch

from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards.shapes_alignment import ShapesAlignment
from prdp_fast.world import reader, scenes
from prdp_fast.world.reader import read_images

COUNT = 96


@pytest.fixture(scope="module")
def drawn() -> tuple[list[scenes.Scene], torch.Tensor]:
    """COUNT scenes from all over the world and their pictures, with jittered centres."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randperm(scenes.NUM_SCENES, generator=generator)[:COUNT].tolist()
    chosen = [scenes.scene_at(number) for number in numbers]
    return chosen, scenes.render(chosen, generator)


def test_right_pictures(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    chosen, images = drawn
    reading = read_images(images, [scene.prompt() for scene in chosen])
    assert reading.scores.shape == (COUNT,) and reading.scores.dtype == torch.float32
    assert reading.attribute_scores.shape == reading.attribute_right.shape == (COUNT, 7)
    assert reading.scores.mean() > 0.9 and reading.scores.min() > 0.8
    assert reading.strict.float().mean() >= 0.98
    assert reading.attribute_scores.min() >= 0 and reading.attribute_scores.max() <= 1


def _values(attribute: str, scene: scenes.Scene) -> list[str]:
    """What the attribute could be instead; the three colours of a scene differ."""
    everything = {"size": scenes.SIZES, "shape": scenes.SHAPES, "row": scenes.ROWS, "column": scenes.COLUMNS}
    taken = {scene.fill, scene.outline, scene.background} if attribute not in everything else {getattr(scene, attribute)}
    return [value for value in everything.get(attribute, scenes.COLOURS) if value not in taken]


@pytest.mark.parametrize("attribute", scenes.ATTRIBUTES)
def test_one_wrong_attribute_is_found(drawn: tuple[list[scenes.Scene], torch.Tensor], attribute: str) -> None:
    chosen, images = drawn
    others = []
    for number, scene in enumerate(chosen):
        values = _values(attribute, scene)
        others.append(scene._replace(**{attribute: values[number % len(values)]}))
    right = read_images(images, [scene.prompt() for scene in chosen])
    wrong = read_images(images, [scene.prompt() for scene in others])
    column = scenes.ATTRIBUTES.index(attribute)
    assert wrong.strict.float().mean() <= 0.02
    assert wrong.attribute_right[:, column].float().mean() <= 0.02
    assert (wrong.attribute_scores[:, column] < right.attribute_scores[:, column]).float().mean() >= 0.98
    assert (wrong.scores < right.scores).float().mean() >= 0.98
    # The reading does not depend on the prompt: the other six attributes say what they said.
    rest = [other for other in range(7) if other != column]
    assert torch.equal(wrong.attribute_scores[:, rest], right.attribute_scores[:, rest])
    assert torch.equal(wrong.attribute_right[:, rest], right.attribute_right[:, rest])


def test_swapped_colours_are_found() -> None:
    """Binding: the right words in the wrong places."""
    scene = scenes.Scene("large", "red", "square", "blue", "middle", "center", "white")
    images = scenes.render([scene])
    swapped = read_images(images, [scene._replace(fill="blue", outline="red").prompt()])
    assert swapped.attribute_right.tolist() == [[True, False, True, False, True, True, True]]
    assert swapped.scores < 0.8


def test_mismatched_prompts_score_low(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    chosen, images = drawn
    reading = read_images(images, [scene.prompt() for scene in chosen[1:] + chosen[:1]])
    assert 0.1 < reading.scores.mean() < 0.35
    assert not reading.strict.any()


def test_noise_scores_low(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    noise = torch.randint(0, 256, (COUNT, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    reading = read_images(noise, [scene.prompt() for scene in drawn[0]])
    assert reading.scores.mean() < 0.5 and reading.scores.max() < 0.65 and not reading.strict.any()


def test_an_empty_picture_earns_its_background_and_no_more(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    """An empty picture contradicts no shape, size or place; a policy must not live on that."""
    chosen, _ = drawn
    colours = torch.tensor([scenes.PALETTE[scene.background] for scene in chosen], dtype=torch.uint8)
    empty = read_images(colours[:, :, None, None].expand(-1, 3, 32, 32), [scene.prompt() for scene in chosen])
    torch.testing.assert_close(empty.scores, torch.full((COUNT,), 1 / 7), atol=0.01, rtol=0)
    assert not empty.strict.any()


def test_every_drawn_shape_is_believed() -> None:
    smallest = [scenes.Scene("small", "gray", shape, "cyan", "middle", "center", "pink") for shape in scenes.SHAPES]
    reading = read_images(scenes.render(smallest), [scene.prompt() for scene in smallest])
    geometry = [scenes.ATTRIBUTES.index(attribute) for attribute in ("shape", "size", "row", "column")]
    assert reading.strict.all() and reading.attribute_scores[:, geometry].min() > 0.99


def _read_plainly(image: torch.Tensor, scene: scenes.Scene) -> tuple[list[float], list[bool]]:
    """The module's docstring in float64, one template after the other."""
    palette = torch.tensor(list(scenes.PALETTE.values()), dtype=torch.float64) / 255
    pixels = image.double().permute(1, 2, 0) / 255
    distance = (pixels[:, :, None] - palette).square().sum(-1)
    shares = torch.softmax(-distance / (2 * reader.COLOUR_SIGMA**2), dim=-1)
    found: dict[tuple[str, ...], float] = {}
    best: tuple[float, torch.Tensor, torch.Tensor, tuple[str, ...]] | None = None
    for shape in scenes.SHAPES:
        for size in scenes.SIZES:
            for row, y in zip(scenes.ROWS, scenes.CENTRES, strict=True):
                for column, x in zip(scenes.COLUMNS, scenes.CENTRES, strict=True):
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            masks = scenes.region_masks(shape, size, y + dy, x + dx).double()
                            pixels_of = masks.flatten(1) @ shares.flatten(0, 1)
                            explained = float(pixels_of.amax(1).sum())
                            labels = (shape, size, row, column)
                            found[labels] = max(found.get(labels, 0.0), explained)
                            if best is None or explained > best[0]:
                                best = (explained, pixels_of, masks.sum((1, 2)), labels)
    assert best is not None
    gained = best[0] - float(shares.sum((0, 1)).max())
    scores, right = [], []
    for attribute in scenes.ATTRIBUTES:
        value = getattr(scene, attribute)
        if attribute in ("fill", "outline", "background"):
            region, colour = ("fill", "outline", "background").index(attribute), scenes.COLOURS.index(value)
            scores.append(float(best[1][region, colour] / best[2][region].clamp(min=1)))
            right.append(int(best[1][region].argmax()) == colour)
        else:
            axis = ("shape", "size", "row", "column").index(attribute)
            forced = max(explained for labels, explained in found.items() if labels[axis] == value)
            lost = best[0] - forced
            scores.append(math.exp(-lost / reader.PIXELS) * (1 - math.exp(-gained / reader.PIXELS)))
            right.append(best[3][axis] == value)
    return scores, right


def test_batched_reading_equals_the_plain_one(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    chosen, images = drawn
    noisy = images[:2].float() + 60 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = torch.cat([images[:1], noisy.clamp(0, 255).to(torch.uint8)])
    wanted = [chosen[0], chosen[0], chosen[3]]
    reading = read_images(images, [scene.prompt() for scene in wanted])
    for number, scene in enumerate(wanted):
        scores, right = _read_plainly(images[number], scene)
        assert reading.attribute_scores[number].tolist() == pytest.approx(scores, abs=1e-4)
        assert reading.attribute_right[number].tolist() == right


def test_bands_of_rows_leave_no_covered_pixel_out() -> None:
    templates = reader._templates(torch.device("cpu"))
    whole = templates.masks[:, :2].double().sum((0, 2))  # pixels of all fills, and of all outlines
    bands = [block.masks.double().sum(0).chunk(2) for block in templates.blocks]
    read = torch.stack([torch.stack([half.sum() for half in band]) for band in bands]).sum(0)
    torch.testing.assert_close(read, whole, rtol=1e-12, atol=0)
    assert all(block.masks.shape[0] == block.band.stop - block.band.start for block in templates.blocks)


def test_batch_size_does_not_matter(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    chosen, images = drawn
    prompts = [scene.prompt() for scene in chosen]
    together = read_images(images[:11], prompts[:11])
    for number in range(11):
        alone = read_images(images[number : number + 1], prompts[number : number + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[number], atol=1e-5, rtol=0)
        assert torch.equal(alone.attribute_right[0], together.attribute_right[number])
    assert read_images(images[:0], []).scores.shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 3, 32, 32\) torch.uint8"):
        read_images(images, [scenes.scene_at(0).prompt()])


def test_as_a_reward(drawn: tuple[list[scenes.Scene], torch.Tensor]) -> None:
    chosen, images = drawn
    prompts = [scene.prompt() for scene in chosen[:4]]
    output = ShapesAlignment().score(images[:4], prompts, [{}] * 4)
    reading = read_images(images[:4], prompts)
    assert torch.equal(output.scores, reading.scores)
    assert set(output.details) == {"strict", "seven", *scenes.ATTRIBUTES}
    assert torch.equal(output.details["strict"], reading.strict.float())
    assert torch.equal(output.details["row"], reading.attribute_scores[:, scenes.ATTRIBUTES.index("row")])
    some = ShapesAlignment(attributes=["fill", "outline"]).score(images[:4], prompts, [{}] * 4)
    assert torch.equal(some.scores, (some.details["fill"] + some.details["outline"]) / 2)
    assert torch.equal(some.details["seven"], reading.scores)
    with pytest.raises(UserError, match=r"'colour'.*size, fill, shape"):
        ShapesAlignment(attributes=["colour"])
    with pytest.raises(RewardError, match=r"'shapes_alignment'.*'a cat' is not a scene.*scenes. only"):
        ShapesAlignment().score(images[:1], ["a cat"], [{}])
