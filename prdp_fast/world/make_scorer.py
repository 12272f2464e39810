"""Train `tiny_scorer`, a CLIP of the embedded world: a learnt reward that can be over-optimised, beside the programmed one.

    python -m prdp_fast.world.make_scorer --work runs/make_scorer --output prdp_fast/world/tiny_scorer

It learns, as published CLIPs do, which caption belongs to which picture: drawn scenes with their descriptions, and pictures that
`tiny` has made with the prompts that it was given, right or wrong. It never sees the programmed reader, nor a held-out prompt.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from prdp_fast.core.files import write_tensors
from prdp_fast.world import TINY, scenes
from prdp_fast.world.making import MAX_TOKENS, Trainer, draw_dataset, step_generator, to_model_range

WIDTH = 96
NEGATIVES = 2  # captions of a picture with one attribute changed: what a batch of random scenes does not teach
CHOICES = {
    "size": scenes.SIZES, "shape": scenes.SHAPES, "row": scenes.ROWS, "column": scenes.COLUMNS, "fill": scenes.COLOURS,
    "outline": scenes.COLOURS, "background": scenes.COLOURS,
}  # fmt: skip


def build_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": 64,
    }  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2, **shape,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=scenes.IMAGE_SIZE, patch_size=8, num_hidden_layers=4, **shape)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def build_processor() -> CLIPImageProcessorPil:
    side = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def other_scene(scene: scenes.Scene, attribute: str, chooser: random.Random) -> scenes.Scene:
    """The scene with one attribute changed, its three colours still different."""
    taken = {scene.fill, scene.outline, scene.background} if attribute in ("fill", "outline", "background") else set()
    others = [value for value in CHOICES[attribute] if value != getattr(scene, attribute) and value not in taken]
    return scene._replace(**{attribute: chooser.choice(others)})


@torch.no_grad()
def generated(work: Path, prompts: list[str]) -> torch.Tensor:
    """(N, 3, 32, 32) uint8: what `tiny` makes of the prompts. Kept in `work`."""
    path = work / "generated.pt"
    if path.exists():
        return torch.load(path, weights_only=True)["images"]
    pipeline = StableDiffusionPipeline.from_pretrained(
        TINY, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator, images = torch.Generator().manual_seed(7), []
    for start in range(0, len(prompts), 128):
        pixels = pipeline(
            prompts[start : start + 128], num_inference_steps=5, guidance_scale=1.0, output_type="pt", generator=generator
        ).images
        images.append((pixels * 255).round().to(torch.uint8))
    made = torch.cat(images)
    write_tensors(path, {"images": made})
    return made


def contrastive_loss(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Right caption among those of the batch and of one's own changed ones, and right picture among those of the batch.

    Args: pixels: (N, 3, H, W); tokens: (N, L); others: (N * NEGATIVES, L), each picture's changed captions one after the other.
    """
    image, text = (
        F.normalize(features, dim=-1)
        for features in (
            model.visual_projection(model.vision_model(pixels).pooler_output),
            model.text_projection(model.text_model(torch.cat([tokens, others])).pooler_output),
        )
    )
    scale, count = model.logit_scale.clamp(max=4.6).exp(), len(pixels)
    logits = scale * image @ text[:count].T
    changed = scale * torch.einsum("nd,nkd->nk", image, text[count:].view(count, -1, text.shape[-1]))
    right = torch.arange(count, device=logits.device)
    return (F.cross_entropy(torch.cat([logits, changed], 1), right) + F.cross_entropy(logits.T, right)) / 2


@torch.no_grad()
def right_captions(model: CLIPModel, tokenizer: CLIPTokenizer, count: int = 512) -> dict[str, float]:
    """Share of held-out pictures that are nearer to their caption than to one with this attribute changed."""
    chooser = random.Random(1)
    held: list[scenes.Scene] = []
    while len(held) < count:
        scene = scenes.scene_at(chooser.randrange(scenes.NUM_SCENES))
        if scenes.split_of(scene) != "train":
            held.append(scene)
    pixels = to_model_range(scenes.render(held, torch.Generator().manual_seed(1)))
    image = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)

    def similarity(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
        return (image * F.normalize(model.text_projection(model.text_model(tokens).pooler_output), dim=-1)).sum(-1)

    own = similarity([scene.prompt() for scene in held])
    changed = {name: similarity([other_scene(scene, name, chooser).prompt() for scene in held]) for name in scenes.ATTRIBUTES}
    return {name: float((own > other).float().mean()) for name, other in changed.items()}


def train(work: Path, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> CLIPModel:
    prompts, drawn, _ = draw_dataset(args.images, args.seed)
    images = torch.cat([drawn, generated(work, prompts[: args.generated])])
    prompts = [*prompts, *prompts[: args.generated]]
    torch.manual_seed(args.seed)
    model = build_scorer(tokenizer)
    trainer = Trainer(model, work / "scorer.pt", steps=args.steps, lr=1e-3, ema=0.998)

    def encode(captions: list[str]) -> torch.Tensor:
        return tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]

    tokens = encode(prompts)
    while trainer.step < trainer.steps:
        generator = step_generator(args.seed, trainer.step)
        rows = torch.randint(len(images), (args.batch,), generator=generator)
        chooser = random.Random(args.seed * 1_000_003 + trainer.step)
        described = [scenes.parse(prompts[row]) for row in rows.tolist()]
        others = [
            other_scene(scene, name, chooser).prompt()
            for scene in described
            for name in chooser.sample(scenes.ATTRIBUTES, NEGATIVES)
        ]
        pixels = to_model_range(images[rows])
        # Generated pictures are not as crisp as drawn ones: noise keeps the model from reading that alone.
        pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=generator)
        loss = contrastive_loss(model, pixels, tokens[rows], encode(others))
        trainer.update(loss)
        if trainer.step % 200 == 0 or trainer.step == trainer.steps:
            trainer.log(loss=loss.item(), **right_captions(trainer.ema, tokenizer))
    return trainer.ema.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the resumable state")
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=49_152, help="scenes drawn")
    parser.add_argument("--generated", type=int, default=4_096, help="pictures of `tiny`")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    model = train(args.work, tokenizer, args)
    model.to(torch.float16).save_pretrained(args.output, safe_serialization=True)
    tokenizer.save_pretrained(args.output)
    build_processor().save_pretrained(args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*.safetensors"))
    print(f"{args.output}: {size / 1e6:.1f} MB of safetensors", flush=True)


if __name__ == "__main__":
    main()
