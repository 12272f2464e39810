"""Train the embedded model `tiny` from nothing.

    python -m prdp_fast.world.make_model --work runs/make_tiny --output prdp_fast/world/tiny

Three stages, each seeded and each resumed from `--work` when the command is given again:

    tokenizer   byte-pair merges learnt on the world's own vocabulary until every word is one token
    vae         AutoencoderKL, 32x32x3 -> 8x8x4, gated: a checker must read 90% of its reconstructions right
    unet        CLIPTextModel and UNet2DConditionModel together, v-prediction on cached latents

Only scenes of the split "train" are drawn, so the held-out prompts are unseen by the base model too.
The result is a StableDiffusionPipeline directory in float16 safetensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prdp_fast.world import scenes
from prdp_fast.world.making import (
    LATENT_SIZE,
    MAX_TOKENS,
    Trainer,
    draw_dataset,
    encode_dataset,
    report_samples,
    save_pipeline,
    step_generator,
    to_model_range,
    to_uint8,
)
from prdp_fast.world.reader import read_images

TEXT_WIDTH = 128


# ---------------------------------------------------------------------------------------------------------------- models
def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the world one token.

    The merges come from a byte-pair trainer: hand-made left-to-right chains break each other (`r e` of "red" would tear
    "green" apart), learnt merges cannot, because they are applied in the order in which they were learnt.
    """
    words = set(scenes.scene_at(0).prompt().split())
    words.update(itertools.chain(scenes.COLOURS, scenes.SIZES, scenes.SHAPES, scenes.ROWS, scenes.COLUMNS))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    bpe.train_from_iterator([" ".join(sorted(words))], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]], model_max_length=MAX_TOKENS,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    for word in sorted(words):
        ids = tokenizer(word)["input_ids"]
        if len(ids) != 3:
            raise RuntimeError(f"the word {word!r} became {len(ids) - 2} tokens; the byte-pair merges are broken")
    return tokenizer


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=scenes.IMAGE_SIZE,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # the trained VAE is folded to unit variance per channel, see `normalise_latents`
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    # v-prediction: with epsilon the loss hardly depends on the text at the noisy steps, where layout and colour are decided.
    # Trailing spacing starts sampling at the last, noisiest training step, as few-step sampling needs.
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False, steps_offset=1,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- training
def strict_reconstructions(vae: AutoencoderKL, prompts: list[str], images: torch.Tensor) -> float:
    """Share of reconstructions in which the checker reads all seven attributes right."""
    with torch.no_grad():
        latents = vae.encode(to_model_range(images).to(vae.device)).latent_dist.mode()
        return read_images(to_uint8(vae.decode(latents).sample), prompts).strict.float().mean().item()


def train_vae(work: Path, dataset: tuple[list[str], torch.Tensor, torch.Tensor], args: argparse.Namespace) -> AutoencoderKL:
    prompts, images, foreground = dataset
    torch.manual_seed(args.seed)
    vae = build_vae().to(args.device, memory_format=torch.channels_last)  # a quarter faster on a CPU
    trainer = Trainer(vae, work / "vae.pt", steps=args.vae_steps, lr=2e-3, ema=0.998)
    held = slice(len(prompts) - 200, len(prompts))
    while trainer.step < trainer.steps:
        generator = step_generator(args.seed, trainer.step)
        rows = torch.randint(held.start, (16,), generator=generator)
        pixels = to_model_range(images[rows]).to(args.device)
        # A shape covers a fifth of the picture and carries five of the seven attributes.
        weight = 1 + 6 * foreground[rows].to(args.device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pixels
        loss = (weight * (error.abs() + 2 * error.square())).sum() / (weight.sum() * 3)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        trainer.update(loss + 8e-5 * kl)
        if trainer.step % 500 == 0 or trainer.step == trainer.steps:
            strict = strict_reconstructions(trainer.ema, prompts[held], images[held])
            trainer.log(loss=loss.item(), kl=kl.item(), strict=strict)
    return trainer.ema.eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Fold per-channel mean and standard deviation into the 1x1 convolutions around the latent: z -> (z - mean) / std.

    The autoencoder's function is unchanged and `scaling_factor` is exactly 1.
    """
    mean, std = latents.mean((0, 2, 3)).to(vae.device), latents.std((0, 2, 3)).to(vae.device)
    inward, outward, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:channels] /= std[:, None, None, None]
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.bias[channels:] -= 2 * std.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= std[None, :, None, None]
    return (latents - mean.cpu()[:, None, None]) / std.cpu()[:, None, None]


def train_unet(
    work: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL, prompts: list[str], latents: torch.Tensor, args: argparse.Namespace
) -> nn.ModuleDict:
    torch.manual_seed(args.seed + 1)
    modules = nn.ModuleDict({"text_encoder": build_text_encoder(tokenizer), "unet": build_unet()})
    modules.to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(modules, work / "unet.pt", steps=args.unet_steps, lr=1.2e-3, ema=0.997)
    scheduler = build_scheduler()
    tokens = tokenizer(prompts, padding="max_length", return_tensors="pt")["input_ids"]
    empty = tokenizer([""], padding="max_length", return_tensors="pt")["input_ids"]
    while trainer.step < trainer.steps:
        generator = step_generator(args.seed + 1, trainer.step)
        rows = torch.randint(len(latents), (64,), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < 0.1  # classifier-free guidance needs the empty prompt
        noise = torch.randn(len(rows), *latents.shape[1:], generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        target = scheduler.get_velocity(latents[rows], noise, timesteps)
        hidden = modules["text_encoder"](torch.where(dropped, empty, tokens[rows]).to(args.device))[0]
        output = modules["unet"](noisy.to(args.device), timesteps.to(args.device), hidden).sample
        loss = F.mse_loss(output, target.to(args.device))
        trainer.update(loss)
        if trainer.step % 100 == 0:
            trainer.log(loss=loss.item())
        if trainer.step % 1000 == 0:
            report_samples(assemble(tokenizer, vae, trainer.ema), work / f"samples_{trainer.step}.png")
    return trainer.ema.eval()


def assemble(tokenizer: CLIPTokenizer, vae: AutoencoderKL, modules: nn.ModuleDict) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=modules["text_encoder"], tokenizer=tokenizer, unet=modules["unet"], scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the resumable state")
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=49_152, help="training scenes drawn")
    parser.add_argument("--vae-steps", type=int, default=7_000)
    parser.add_argument("--unet-steps", type=int, default=4_500)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    prompts, images, _ = dataset = draw_dataset(args.images, args.seed)
    vae = train_vae(args.work, dataset, args)
    strict = strict_reconstructions(vae, prompts[-200:], images[-200:])
    if strict < 0.9:
        raise SystemExit(f"the checker reads only {strict:.0%} of the VAE's reconstructions right, 90% wanted; raise --vae-steps")
    latents = normalise_latents(vae, encode_dataset(vae, images))
    pipeline = assemble(tokenizer, vae, train_unet(args.work, tokenizer, vae, prompts, latents, args))
    report_samples(pipeline, args.work / "samples.png")
    save_pipeline(pipeline, args.output)


if __name__ == "__main__":
    main()
