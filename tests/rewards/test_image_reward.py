"""The reward `image_reward` against a transcription of the published model, on small weights under the published names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import image_reward
from prdp_fast.rewards.image_reward import Blip, ImageReward, renamed
from prdp_fast.rewards.registry import build_reward

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "on", "under", "the", "sky", "##s")
VISION = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 32}
TEXT = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 16,
    "encoder_hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
PROMPTS = ["a red circle on the square", "blue squares", "", "the [ENC] sky [DEC] under A Zebra " * 9]


# ---------------------------------------------------------------------------------------------- the published model, written out


class Attention(nn.Module):
    """ImageReward/models/BLIP/vit.py, Attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, dim * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, patch: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (224 // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertEmbeddings(nn.Module):
    """ImageReward/models/BLIP/med.py, from here to BertModel; dropout is off."""

    def __init__(self, vocabulary: int, width: int, positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions).expand((1, -1)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.position_ids[:, : tokens.shape[1]]
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions))


class BertSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(*t.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = split(self.query(x)), split(self.key(source)), split(self.value(source))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        return (scores.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2)


class BertOutput(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.self, self.output = BertSelfAttention(width, heads, source), BertOutput(width, width)

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.output(self.self(x, source, mask), x)


class BertIntermediate(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, encoder_width: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        self.crossattention = BertAttention(width, heads, encoder_width)
        self.intermediate, self.output = BertIntermediate(width, hidden), BertOutput(hidden, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, seen, torch.zeros(()))
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, depth: int, *sizes: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(*sizes) for _ in range(depth))


class BertModel(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = BertEmbeddings(config["vocab_size"], width, config["max_position_embeddings"])
        self.encoder = BertEncoder(
            config["num_hidden_layers"], width, config["num_attention_heads"], config["intermediate_size"],
            config["encoder_hidden_size"],
        )  # fmt: skip

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x, extended = self.embeddings(tokens), (1.0 - mask[:, None, None, :].float()) * -10000.0
        for layer in self.encoder.layer:
            x = layer(x, extended, seen)
        return x


class Pretrain(nn.Module):
    def __init__(self, vision: dict[str, int], text: dict[str, int]) -> None:
        super().__init__()
        width = vision["hidden_size"]
        self.visual_encoder = VisionTransformer(
            vision["patch_size"], width, vision["num_hidden_layers"], vision["num_attention_heads"]
        )
        self.text_encoder = BertModel(text)
        self.vision_proj, self.text_proj = nn.Linear(width, 256), nn.Linear(text["hidden_size"], 256)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


class Published(nn.Module):
    """ImageReward/ImageReward.py."""

    def __init__(self, vision: dict[str, int], text: dict[str, int]) -> None:
        super().__init__()
        self.blip, self.mlp = Pretrain(vision, text), Head(text["hidden_size"])

    @torch.no_grad()
    def score(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> float:
        seen = self.blip.visual_encoder(pixels)
        features = self.blip.text_encoder(tokens, mask, seen)[:, 0, :]
        return ((self.mlp.layers(features) - 0.16717362830052426) / 1.0333394966054072).item()


def preprocess(image: torch.Tensor) -> torch.Tensor:
    """torchvision's Resize(224, bicubic), CenterCrop(224), ToTensor and Normalize, of a (3, H, W) uint8 picture."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = picture.size
    short, long = sorted((width, height))
    size = (224, int(224 * long / short)) if width <= height else (int(224 * long / short), 224)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2.0) for side in picture.size)
    picture = picture.crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def tokenize(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's tokens of the words above: lower case but for the two that were added, cut and filled to 35."""
    known = (*WORDS, "[DEC]", "[ENC]")
    tokens = []
    for word in prompt.split():
        lower = word if word in ("[DEC]", "[ENC]") else word.lower()
        if lower in known:
            tokens.append(known.index(lower))
        elif lower.endswith("s") and lower[:-1] in known:
            tokens += [known.index(lower[:-1]), known.index("##s")]
        else:
            tokens.append(known.index("[UNK]"))
    tokens = [known.index("[CLS]"), *tokens[:33], known.index("[SEP]")]
    padding = 35 - len(tokens)
    return torch.tensor([tokens + [0] * padding]), torch.tensor([[1] * len(tokens) + [0] * padding])


# -------------------------------------------------------------------------------------------------------------------- the reward


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(image_reward, "VISION", image_reward.VISION | VISION)
    monkeypatch.setattr(image_reward, "TEXT", image_reward.TEXT | TEXT)


@pytest.fixture(scope="module")
def published() -> Published:
    """Embeddings as small as real ones, so that what a layer norm adds to a variance shows; the rest large enough to matter."""
    torch.manual_seed(0)
    model = Published(VISION, TEXT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small, wide = "embed" in name or "cls_token" in name, name.startswith("mlp") and parameter.ndim > 1
            parameter.normal_(std=0.01 if small else parameter.shape[1] ** -0.5 if wide else 0.2 if parameter.ndim > 1 else 0.1)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model


@pytest.fixture
def files(small, published, tmp_path) -> dict[str, str]:
    """Options that lead to the small model's files."""
    torch.save(published.state_dict(), tmp_path / "small.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"weights": str(tmp_path / "small.pt"), "tokenizer": str(tmp_path)}


def pictures(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def scores(reward: ImageReward, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return reward.score(images, prompts, [{}] * len(prompts)).scores


def test_the_score_is_the_published_model_s(files, published):
    reward = build_reward("image_reward", files)
    expected = [
        published.score(preprocess(image)[None], *tokenize(prompt)) for image, prompt in zip(pictures(4), PROMPTS, strict=True)
    ]
    got = scores(reward, pictures(4), PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)
    # Neither the picture nor the prompt is without effect.
    assert got.std() > 0.05
    assert (scores(reward, pictures(4)[:1].expand(4, -1, -1, -1), PROMPTS).std() > 0.01).all()
    assert (scores(reward, pictures(4), PROMPTS[:1] * 4).std() > 0.01).all()


def test_batches_order_and_company_do_not_change_a_score(files):
    images, prompts = pictures(8), PROMPTS * 2
    whole = scores(build_reward("image_reward", files), images, prompts)
    for batch in (1, 3):
        parts = scores(build_reward("image_reward", files | {"batch": batch}), images, prompts)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    mixed = scores(build_reward("image_reward", files), images[order], [prompts[index] for index in order])
    torch.testing.assert_close(mixed, whole[order], atol=1e-5, rtol=0)
    assert scores(build_reward("image_reward", files), images[:0], []).shape == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(files, dtype):
    images, prompts = pictures(4), PROMPTS
    whole = scores(build_reward("image_reward", files), images, prompts)
    reward = build_reward("image_reward", files | {"dtype": dtype})
    half = scores(reward, images, prompts)
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0)
    assert {parameter.dtype for parameter in reward.model.vision.parameters()} == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in reward.model.head.parameters()} == {torch.float32}  # differences are small


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (512, 768), (300, 401), (227, 224), (97, 64)])
def test_pixels(size):
    """To the bit what torchvision computes, and what transformers does with CLIP's pictures where both crop alike."""
    images = pictures(2, *size)
    pixels = image_reward.to_pixels(images)
    assert pixels.shape == (2, 3, 224, 224) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.stack([preprocess(image) for image in images]))
    if all(int(224 * side / min(size)) % 2 == 0 for side in size):  # transformers halves an odd margin another way
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        theirs = CLIPImageProcessorPil()(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, theirs, atol=1e-6, rtol=1e-6)


def test_tokens(files):
    reward = build_reward("image_reward", files)
    scores(reward, pictures(1), PROMPTS[:1])
    expected = [torch.cat(pairs) for pairs in zip(*map(tokenize, PROMPTS), strict=True)]
    asked = []
    reward.model.forward = lambda pixels, *tokens: asked.append(tokens) or torch.zeros(len(pixels))
    scores(reward, pictures(4), PROMPTS)
    (tokens,) = asked
    assert torch.equal(tokens[0], expected[0]) and torch.equal(tokens[1], expected[1])
    asked.clear()
    scores(reward, pictures(1), ["a sky"])
    assert asked[0][0].shape == asked[0][1].shape == (1, 35)  # whatever the company: one shape, and one rounding


def layout() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published file: 625, in float32 and int64 the 1.8 GB that it has."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes |= {f"{vision}.cls_token": (1, 1, 1024), f"{vision}.pos_embed": (1, 197, 1024)}
    shapes |= {f"{vision}.patch_embed.proj.weight": (1024, 3, 16, 16), f"{vision}.patch_embed.proj.bias": (1024,)}
    for number in range(24):
        block = f"{vision}.blocks.{number}"
        norm(f"{block}.norm1", 1024)
        linear(f"{block}.attn.qkv", 3072, 1024)
        linear(f"{block}.attn.proj", 1024, 1024)
        norm(f"{block}.norm2", 1024)
        linear(f"{block}.mlp.fc1", 4096, 1024)
        linear(f"{block}.mlp.fc2", 1024, 4096)
    norm(f"{vision}.norm", 1024)
    shapes |= {f"{text}.embeddings.position_ids": (1, 512), f"{text}.embeddings.word_embeddings.weight": (30524, 768)}
    shapes |= {f"{text}.embeddings.position_embeddings.weight": (512, 768)}
    norm(f"{text}.embeddings.LayerNorm", 768)
    for number in range(12):
        layer = f"{text}.encoder.layer.{number}"
        for attention, source in (("attention", 768), ("crossattention", 1024)):
            linear(f"{layer}.{attention}.self.query", 768, 768)
            linear(f"{layer}.{attention}.self.key", 768, source)
            linear(f"{layer}.{attention}.self.value", 768, source)
            linear(f"{layer}.{attention}.output.dense", 768, 768)
            norm(f"{layer}.{attention}.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 3072, 768)
        linear(f"{layer}.output.dense", 768, 3072)
        norm(f"{layer}.output.LayerNorm", 768)
    linear("blip.vision_proj", 256, 1024)
    linear("blip.text_proj", 256, 768)
    for number, (outputs, inputs) in zip((0, 2, 4, 6, 7), ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True):
        linear(f"mlp.layers.{number}", outputs, inputs)
    return shapes


def test_the_published_file_fills_the_model():
    shapes = layout()
    assert len(shapes) == 625
    # 1,786,880,927 bytes on the hub: these, and some 340 of names and records a tensor.
    assert 0 < 1_786_880_927 - sum(math.prod(shape) * (8 if "_ids" in name else 4) for name, shape in shapes.items()) < 625 * 400
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = Blip()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed(tensors).items()} == expected


def test_published_numbers():
    """What no tensor's shape says."""
    assert (image_reward.HUB_ID, image_reward.WEIGHTS) == ("zai-org/ImageReward", "ImageReward.pt")
    assert (image_reward.TOKENIZER, image_reward.VOCABULARY) == ("google-bert/bert-base-uncased", "vocab.txt")
    assert (image_reward.MEAN, image_reward.STD) == (0.16717362830052426, 1.0333394966054072)
    assert image_reward.PROMPT_LENGTH == 35 and image_reward.ADDED_TOKENS == ("[DEC]", "[ENC]")
    with torch.device("meta"):
        model = Blip()
    assert (model.vision.config.num_attention_heads, model.text.config.num_attention_heads) == (16, 12)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {eps for name, eps in norms.items() if name.startswith("vision")} == {1e-6}
    assert {eps for name, eps in norms.items() if name.startswith("text")} == {1e-12}
    assert model.vision.config.hidden_act == model.text.config.hidden_act == "gelu"


def test_nothing_is_loaded_before_the_first_score(files):
    reward = build_reward("image_reward", {"weights": "nowhere.pt", "tokenizer": files["tokenizer"]})
    with pytest.raises(RewardError, match=r"^reward 'image_reward': weights 'nowhere.pt' is no file; expected a copy of Image"):
        scores(reward, pictures(1), ["a circle"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 3}, "reward 'image_reward': weights is 3; expected a path"),
        ({"tokenizer": None}, "reward 'image_reward': tokenizer is None; expected a path"),
        ({"batch": 0}, "reward 'image_reward': batch is 0; expected a whole number from 1"),
        ({"dtype": "int8"}, "reward 'image_reward': dtype is 'int8'; expected float32, float16, bfloat16"),
        ({"device": "abacus"}, "reward 'image_reward': device is 'abacus'; expected auto, cpu or cuda"),
        ({"med_config": "x"}, "reward 'image_reward' has no option 'med_config'; its options: batch, device, dtype, weights,"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError) as caught:
        build_reward("image_reward", options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def changed(state: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(state)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp__layers__7__bias": None}, "small.pt lacks head.7.bias; is it the right model?"),
        ({"blip__itm_head__weight": torch.zeros(2, 16)}, "small.pt has unknown blip.itm_head.weight; is it"),
        (
            {"blip__visual_encoder__pos_embed": torch.zeros(1, 197, 24)},
            "small.pt has vision.embeddings.position_embedding is (1, 197, 24), not (1, 50, 24); is it",
        ),
    ],
)
def test_a_file_of_another_model(files, published, changes, message):
    torch.save(changed(published.state_dict(), **changes), files["weights"])
    with pytest.raises(RewardError) as caught:
        scores(build_reward("image_reward", files), pictures(1), ["a circle"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_checkpoint(files):
    for content, message in [
        (b"<html>not found</html>", "is no file of tensors"),
        (None, "has unknown model"),
    ]:
        if content is None:
            torch.save({"model": {}}, files["weights"])
        else:
            Path(files["weights"]).write_bytes(content)
        with pytest.raises(RewardError, match=message) as caught:
            scores(build_reward("image_reward", files), pictures(1), ["a circle"])
        assert str(caught.value).startswith("reward 'image_reward': ") and "\n" not in str(caught.value)


def test_nothing_in_a_checkpoint_is_run(files, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"mlp.layers.0.weight": Trap()}, files["weights"])
    with pytest.raises(RewardError, match="is no file of tensors"):
        scores(build_reward("image_reward", files), pictures(1), ["a circle"])
    assert not (tmp_path / "sprung").exists()


def test_a_vocabulary_that_is_another_s(files, tmp_path):
    """transformers makes a tokenizer of five words where it finds no vocabulary, and scores would be of prompts nobody wrote."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:5]) + "\n")
    with pytest.raises(RewardError, match=r"vocab.txt has 5 words; expected the 15 of google-bert/bert-base-uncased$"):
        scores(build_reward("image_reward", files), pictures(1), ["a circle"])
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RewardError, match=r"vocab.txt cannot be read .*; fetch it again$"):
        scores(build_reward("image_reward", files), pictures(1), ["a circle"])
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(RewardError, match=r"has no vocab.txt; expected the files of the model"):
        scores(build_reward("image_reward", files), pictures(1), ["a circle"])


def test_without_the_hub(small, monkeypatch):
    """Both files are asked for by name, and a refusal is one line."""
    from prdp_fast.rewards import scoring_model

    asked = []

    def hub_file(what: str, name: str, filename: str, *, lacking: str) -> Path:
        asked.append((name, filename))
        raise UserError(f"{what} is out of reach")

    monkeypatch.setattr(scoring_model, "hub_file", hub_file)
    with pytest.raises(RewardError, match=r"^reward 'image_reward': 'google-bert/bert-base-uncased' is out of reach$"):
        scores(build_reward("image_reward", {}), pictures(1), ["a circle"])
    monkeypatch.setattr(image_reward, "read_vocabulary", lambda *names: {word: number for number, word in enumerate(WORDS)})
    with pytest.raises(RewardError, match=r"^reward 'image_reward': 'zai-org/ImageReward' is out of reach$"):
        scores(build_reward("image_reward", {}), pictures(1), ["a circle"])
    assert asked == [("google-bert/bert-base-uncased", "vocab.txt"), ("zai-org/ImageReward", "ImageReward.pt")]
