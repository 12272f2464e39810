"""The rewards that are CLIP models, each against its published formula written out, on small weights in the true layouts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import build_reward, hpsv2
from prdp_fast.rewards.aesthetic import build_head, head_tensors
from prdp_fast.rewards.clip import processor_pixels
from prdp_fast.world import TINY

TOKENIZER = TINY / "tokenizer"
CONTEXT, VOCABULARY, SIZE, PATCH, WIDTH = 20, 150, 28, 7, 12
PROMPTS = ["a small red circle", "a large blue square at the top left", "a small red circle", "", "a red " * 40]
SIZES = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1}
VISION = {**SIZES, "hidden_size": 24, "intermediate_size": 96, "image_size": SIZE, "patch_size": PATCH, "projection_dim": WIDTH}
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (len(PROMPTS), 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as save_pretrained writes it: model, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=WIDTH))
    for parameter in model.parameters():  # as drawn, weights are too small for texts and images to differ
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return directory


def score(name: str, images: torch.Tensor, prompts: list[str] = PROMPTS, **options: Any) -> torch.Tensor:
    output = build_reward(name, options).score(images, prompts, [{}] * len(prompts))
    assert output.scores.dtype == torch.float32 and output.scores.device.type == "cpu"
    return output.scores


# ------------------------------------------------------------------------------------------- published formulas, written out


def pil_pixels(image: torch.Tensor) -> torch.Tensor:
    """OpenAI's and open_clip's preprocessing: the shorter side resized (bicubic), the middle cut out, normalised."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = picture.size
    scale = SIZE / min(width, height)
    picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    width, height = picture.size
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    values = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE))) / 255
    return torch.tensor((values - MEAN) / STD).permute(2, 0, 1).float()


def features(clip: Path, images: torch.Tensor, prompts: list[str]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model and unit features, one image and one text at a time, the text padded to the whole context."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        seen = [model.get_image_features(pil_pixels(image)[None]).pooler_output[0] for image in images]
        read = []
        for prompt in prompts:
            tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
            read.append(model.get_text_features(**tokens).pooler_output[0])
    return model, *(torch.stack([f / f.norm() for f in part]) for part in (seen, read))


def test_pickscore(clip: Path, images: torch.Tensor) -> None:
    model, seen, read = features(clip, images, PROMPTS)
    expected = torch.stack([model.logit_scale.exp() * (t @ i) for t, i in zip(read, seen)]).detach()
    torch.testing.assert_close(score("pickscore", images, model=str(clip)), expected, rtol=1e-5, atol=1e-5)
    cosine = score("pickscore", images, model=str(clip), logit_scale=False)
    torch.testing.assert_close(cosine, (read * seen).sum(1), rtol=1e-5, atol=1e-5)
    assert cosine.std() > 0.01, "scores too alike to tell a mistake by"


def test_clip_score(clip: Path, images: torch.Tensor) -> None:
    _, seen, read = features(clip, images, ["A photo depicts " + prompt for prompt in PROMPTS])
    expected = 2.5 * (seen * read).sum(1).clamp(min=0)
    torch.testing.assert_close(score("clip_score", images, model=str(clip)), expected, rtol=1e-5, atol=1e-5)
    _, seen, read = features(clip, images, PROMPTS)
    expected = 100 * (seen * read).sum(1).clamp(min=0)
    found = score("clip_score", images, model=str(clip), prefix="", scale=100)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert expected.std() > 1


class Mlp(nn.Module):
    """improved-aesthetic-predictor, simple_inference.py, at a width of our own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


def test_aesthetic(clip: Path, images: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = Mlp(WIDTH).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    _, seen, _ = features(clip, images, PROMPTS)
    expected = head.layers(seen)[:, 0].detach()
    found = score("aesthetic", images, model=str(clip), weights=str(tmp_path / "head.pth"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-3


class Block(nn.Module):
    """open_clip, transformer.py, ResidualAttentionBlock."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, image: int, patch: int, out: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip, model.py, CLIP, with the names that its checkpoints have."""

    def __init__(self, text: dict[str, Any], vision: dict[str, Any], out: int) -> None:
        super().__init__()
        width, self.context = text["hidden_size"], text["max_position_embeddings"]
        self.positional_embedding = nn.Parameter(torch.randn(self.context, width))
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.visual = Visual(
            vision["hidden_size"], vision["num_hidden_layers"], vision["num_attention_heads"], vision["image_size"],
            vision["patch_size"], out,
        )  # fmt: skip
        self.transformer = Transformer(width, text["num_hidden_layers"], text["num_attention_heads"])
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.ln_final = nn.LayerNorm(width)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = torch.full((self.context, self.context), -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        # There the end of text is the highest number of the vocabulary; in this tokenizer it is 1.
        end = (tokens == TEXT["eos_token_id"]).int().argmax(-1)
        return x[torch.arange(len(x)), end] @ self.text_projection


def hps_pixels(image: torch.Tensor) -> torch.Tensor:
    """HPSv2's transform.py: ToTensor, ResizeMaxSize with black bars, Normalize; PIL's filter, but on floats."""
    channels = []
    for channel in image:
        height, width = channel.shape
        scale = SIZE / max(height, width)
        new = round(width * scale), round(height * scale)
        floats = Image.fromarray((channel.numpy() / 255).astype(np.float32))  # mode F is not rounded
        resized = np.asarray(floats.resize(new, Image.Resampling.BICUBIC))
        left, top = (SIZE - new[0]) // 2, (SIZE - new[1]) // 2
        square = np.zeros((SIZE, SIZE))
        square[top : top + new[1], left : left + new[0]] = resized
        channels.append(square)
    return torch.tensor((np.stack(channels) - MEAN[:, None, None]) / STD[:, None, None]).float()


@pytest.fixture
def hps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[OpenClip, dict[str, Any]]:
    """The published model at small sizes, its checkpoint and the reward's options."""
    for name, value in {"TEXT": {**hpsv2.TEXT, **TEXT}, "VISION": {**hpsv2.VISION, **VISION}, "PROJECTION": WIDTH}.items():
        monkeypatch.setattr(hpsv2, name, value)
    monkeypatch.setattr(hpsv2.square, "__defaults__", (SIZE,))
    torch.manual_seed(2)
    model = OpenClip(TEXT, VISION, WIDTH).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    return model, {"weights": str(tmp_path / "hps.pt"), "tokenizer": str(TOKENIZER)}


@pytest.mark.parametrize("shape", [(40, 40), (28, 28), (30, 50), (61, 33)], ids=str)
def test_hpsv2(hps: tuple[OpenClip, dict[str, Any]], shape: tuple[int, int]) -> None:
    from transformers import CLIPTokenizer

    model, options = hps
    images = torch.randint(0, 256, (len(PROMPTS), 3, *shape), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        seen = model.visual(torch.stack([hps_pixels(image) for image in images]))
        read = model.encode_text(tokens)
        expected = torch.diagonal(nn.functional.normalize(seen, dim=-1) @ nn.functional.normalize(read, dim=-1).T)
    torch.testing.assert_close(score("hpsv2", images, **options), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


# ------------------------------------------------------------------------------------------------------- preprocessing, layouts


@pytest.mark.parametrize("shape", [(28, 28), (40, 40), (29, 57), (224, 130)], ids=str)
def test_pixels_are_the_processors(clip: Path, shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = torch.randint(0, 256, (3, 3, *shape), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = CLIPImageProcessorPil.from_pretrained(clip)(pictures, return_tensors="pt")["pixel_values"]
    found = processor_pixels("reward 'pickscore'", str(clip))(images)
    assert torch.equal(found, expected)
    written_out = torch.stack([pil_pixels(image) for image in images])
    torch.testing.assert_close(found, written_out, rtol=0, atol=2e-6)  # float32 against float64, of values up to 2.7


def vit_h_14() -> dict[str, tuple[int, ...]]:
    """Every tensor of an open_clip ViT-H-14 checkpoint, from model_configs/ViT-H-14.json."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),  # 16 x 16 patches of 14 pixels and the class
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "token_embedding.weight": (49408, 1024),
    }
    for name, width in (("ln_final", 1024), ("visual.ln_pre", 1280), ("visual.ln_post", 1280)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, layers in (("", 1024, 24), ("visual.", 1280, 32)):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}."
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
            shapes |= {
                f"{block}attn.in_proj_weight": (3 * width, width),
                f"{block}attn.in_proj_bias": (3 * width,),
                f"{block}attn.out_proj.weight": (width, width),
                f"{block}attn.out_proj.bias": (width,),
                f"{block}mlp.c_fc.weight": (4 * width, width),
                f"{block}mlp.c_fc.bias": (4 * width,),
                f"{block}mlp.c_proj.weight": (width, 4 * width),
                f"{block}mlp.c_proj.bias": (width,),
            }
    return shapes


def test_the_whole_checkpoint_of_hpsv2_has_its_place() -> None:
    checkpoint = {name: torch.empty(shape, device="meta") for name, shape in vit_h_14().items()}
    assert sum(tensor.numel() for tensor in checkpoint.values()) == 986_109_441  # as open_clip counts ViT-H-14
    tensors = hpsv2.transformers_tensors(checkpoint)
    own = hpsv2.empty_model().state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: tensor.shape for name, tensor in own.items()}


def test_the_whole_head_of_aesthetic_has_its_place() -> None:
    own = {f"layers.{name}": tuple(tensor.shape) for name, tensor in build_head(768).state_dict().items()}
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert own == {
        f"layers.{number}.{kind}": shape if kind == "weight" else shape[:1]
        for number, shape in widths.items()
        for kind in ("weight", "bias")
    }
    assert list(head_tensors({name: torch.empty(0) for name in own})) == list(build_head(768).state_dict())


def test_where_the_weights_come_from(monkeypatch: pytest.MonkeyPatch, clip: Path, tmp_path: Path) -> None:
    from prdp_fast.core import hub

    asked: list[tuple[str, str]] = []

    def download(name: str, filename: str) -> str:
        asked.append((name, filename))
        raise ConnectionError

    monkeypatch.setattr(hub, "hf_hub_download", download)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    wanted = {
        "hpsv2": ("xswu/HPSv2", "HPS_v2_compressed.pt"),
        "pickscore": ("yuvalkirstain/PickScore_v1", "config.json"),
        "clip_score": ("openai/clip-vit-base-patch32", "config.json"),
        "aesthetic": ("openai/clip-vit-large-patch14", "config.json"),
    }
    for name, file in wanted.items():
        with pytest.raises(RewardError, match=f"reward '{name}': '{file[0]}' .*check the network"):
            score(name, images, ["x"])
        assert asked[-1] == file
    for name, options, file in (
        ("hpsv2", {"version": "v2.1"}, ("xswu/HPSv2", "HPS_v2.1_compressed.pt")),
        ("aesthetic", {"model": str(clip)}, ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")),
    ):
        with pytest.raises(RewardError):
            score(name, images, ["x"], **options)
        assert asked[-1] == file
    processor = build_reward("pickscore", {}).processor  # type: ignore[attr-defined]
    assert processor == hpsv2.TOKENIZER == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


# --------------------------------------------------------------------------------------------------------------- how it is used


def test_batches_and_order_change_nothing(clip: Path, images: torch.Tensor) -> None:
    whole = score("pickscore", images, model=str(clip))
    for batch in (1, 2, 3):
        torch.testing.assert_close(score("pickscore", images, model=str(clip), batch=batch), whole, rtol=1e-5, atol=1e-5)
    turned = score("pickscore", images.flip(0), PROMPTS[::-1], model=str(clip))
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-5, atol=1e-5)
    assert score("pickscore", images[:0], [], model=str(clip)).shape == (0,)


def test_an_equal_prompt_is_read_once(clip: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = build_reward("clip_score", {"model": str(clip)})
    reward.score(images, PROMPTS, [{}] * len(PROMPTS))
    rows = []
    text_model = reward.clip.model.text_model  # type: ignore[attr-defined]
    forward = text_model.forward
    monkeypatch.setattr(text_model, "forward", lambda tokens: rows.append(len(tokens)) or forward(tokens))
    reward.score(images, ["the same"] * len(images), [{}] * len(images))
    assert rows == [1]


def test_half_precision_is_near(clip: Path, images: torch.Tensor) -> None:
    exact = score("pickscore", images, model=str(clip), logit_scale=False)
    rough = score("pickscore", images, model=str(clip), logit_scale=False, dtype="bfloat16")
    assert 0 < (rough - exact).abs().max() < 0.03  # a cosine, through two layers of 8-bit mantissas


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hpsv2", {"version": "v3"}, "version is 'v3'; expected v2.0 or v2.1"),
        ("hpsv2", {"device": "gpu"}, "device is 'gpu'; expected auto, cpu or cuda"),
        ("hpsv2", {"device": "cuda:7"}, "torch sees 0 GPUs"),
        ("pickscore", {"dtype": "half"}, "dtype is 'half'; expected float32, float16, bfloat16"),
        ("pickscore", {"batch": 0}, "batch is 0; expected a whole number from 1"),
        ("pickscore", {"logit_scale": 100}, "logit_scale is 100; expected true or false"),
        ("clip_score", {"scale": -1}, "scale is -1; expected a number above 0"),
        ("aesthetic", {"wieghts": "x"}, "did you mean 'weights'?"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError) as caught:
        build_reward(name, options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_files(hps: tuple[OpenClip, dict[str, Any]], clip: Path, images: torch.Tensor, tmp_path: Path) -> None:
    model, options = hps
    state = model.state_dict()

    def refusal(content: Any, name: str = "hpsv2", **changed: Any) -> str:
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(RewardError) as caught:
            score(name, images, **{**options, "weights": str(tmp_path / "wrong.pt"), **changed})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no 'state_dict'" in refusal(state)
    assert "holds a list" in refusal([1])
    lacking = {name: tensor for name, tensor in state.items() if "ln_1.weight" not in name}
    assert "lacks text_model.encoder.layers.0.layer_norm1.weight" in refusal({"state_dict": lacking})
    assert "and 1 more" in refusal({"state_dict": lacking})
    assert "has unknown visual.extra" in refusal({"state_dict": {**state, "visual.extra": torch.ones(1)}})
    cut = {**state, "visual.proj": state["visual.proj"][:-1]}
    assert "visual_projection.weight is (12, 23), not (12, 24)" in refusal({"state_dict": cut})
    assert "is no file of tensors" in refusal({"state_dict": Path("x")})  # would run code
    assert "is no file; expected a copy of HPS_v2_compressed.pt of xswu/HPSv2" in refusal({}, weights="nowhere.pt")
    assert "has no tokenizer_config.json" in refusal({"state_dict": state}, tokenizer=str(tmp_path))
    (tmp_path / "words").mkdir()
    shutil.copy(TOKENIZER / "tokenizer_config.json", tmp_path / "words")
    assert "knows 2 words, the model 150" in refusal({"state_dict": state}, tokenizer=str(tmp_path / "words"))
    with pytest.raises(RewardError, match=r"has no config\.json"):
        score("pickscore", images, model=str(tmp_path))
    torch.save({"visual": torch.ones(1)}, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=r"lacks 0\.weight.* and 7 more; has unknown visual"):
        score("aesthetic", images, model=str(clip), weights=str(tmp_path / "head.pth"))
