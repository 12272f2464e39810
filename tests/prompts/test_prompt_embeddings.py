from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny_pipelines import build

from prdp_fast import cli
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt, TextEmbeddings
from prdp_fast.prompts import PromptSet, write_index, write_shards
from prdp_fast.prompts.embeddings import MANIFEST, StoredEmbeddings, write_embeddings
from prdp_fast.prompts.verify import verify

LENGTH, WIDTH = 5, 4


def encode(prompts: list[Prompt], scale: float = 1.0) -> TextEmbeddings:
    """An encoder whose rows depend on the text alone."""
    rows = [torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(hash_of(prompt.text))) for prompt in prompts]
    return TextEmbeddings(scale * torch.stack(rows), torch.full((1, LENGTH, WIDTH), 0.5))


def hash_of(text: str) -> int:
    return sum(ord(character) * 257**place for place, character in enumerate(text)) % 2**31


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    train = [Prompt(number, f"creature {number}", {}) for number in range(50)]
    sets = {"train": train, "seen_eval": train[:8], "unseen_eval": [Prompt(n, f"creature {n}", {}) for n in range(900, 907)]}
    entries = {name: write_shards(prompts, tmp_path / "set", name, shard_size=20) for name, prompts in sets.items()}
    write_index(tmp_path / "set", entries, "test")
    return tmp_path / "set"


@pytest.mark.parametrize(("batch", "per_file"), [(64, 1000), (7, 16), (1, 1), (8, 57), (8, 56)])
def test_every_prompt_gets_its_own_row(directory: Path, batch: int, per_file: int) -> None:
    sizes = []

    def counting(prompts: list[Prompt]) -> TextEmbeddings:
        sizes.append(len(prompts))
        return encode(prompts)

    assert StoredEmbeddings.open(directory) is None
    write_embeddings(directory, counting, model="test", batch=batch, per_file=per_file)
    assert sum(sizes) == 57 and max(sizes) <= batch  # a prompt of two sets is encoded once
    stored = StoredEmbeddings.open(directory)
    assert stored is not None and len(stored) == 57
    for name in ("train", "seen_eval", "unseen_eval"):
        prompts = list(reversed(PromptSet.open(directory, name).draw(7, seed=3)))
        rows = stored.rows([*prompts, prompts[0]])
        assert rows.prompt_embeds.dtype == torch.float16
        torch.testing.assert_close(rows.prompt_embeds.float(), encode([*prompts, prompts[0]]).prompt_embeds, rtol=2**-11, atol=0)
        assert torch.equal(rows.negative_prompt_embeds, torch.full((1, LENGTH, WIDTH), 0.5, dtype=torch.float16))
    assert verify(directory) == []


def test_prompts_that_were_not_encoded_are_refused(directory: Path) -> None:
    write_embeddings(directory, encode, model="test")
    stored = StoredEmbeddings.open(directory)
    assert stored is not None
    for prompt in (Prompt(50, "creature 50", {}), Prompt(10_000, "creature 1", {}), Prompt(1, "creature 2", {})):
        with pytest.raises(UserError, match=f"no embedding of prompt {prompt.index}, '{prompt.text}'"):
            stored.rows([Prompt(0, "creature 0", {}), prompt])


def test_another_model_is_noticed(directory: Path) -> None:
    write_embeddings(directory, encode, model="first")
    stored = StoredEmbeddings.open(directory)
    prompts = list(PromptSet.open(directory, "train"))
    assert stored is not None
    stored.check(encode, prompts)
    stored.check(lambda some: TextEmbeddings(*(tensor.bfloat16() for tensor in encode(some)[:2])), prompts)
    for other in (
        lambda some: encode(some, scale=1.1),
        lambda some: encode([Prompt(0, prompt.text + "!", {}) for prompt in some]),
        lambda some: TextEmbeddings(encode(some).prompt_embeds, torch.zeros(1, LENGTH, WIDTH)),
        lambda some: TextEmbeddings(encode(some).prompt_embeds[:, :3], torch.zeros(1, LENGTH, WIDTH)),
        lambda some: encode(some, scale=float("nan")),
    ):
        with pytest.raises(UserError, match=r"made with 'first', and this model's (negative_)?prompt_embeds differ"):
            stored.check(other, prompts)


def test_other_prompts_and_damage_are_noticed(directory: Path) -> None:
    write_embeddings(directory, encode, model="test", per_file=16, batch=16)
    file = directory / "embeddings-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert verify(directory) == [f"{file.name}: SHA-256 differs from the one in {MANIFEST}"]
    file.write_bytes(bytes(data[:-1]))
    with pytest.raises(UserError, match=r"embeddings-00001.safetensors is missing or has another size.*run 'prdp embed' again"):
        StoredEmbeddings.open(directory)
    write_embeddings(directory, encode, model="test")  # what was there before is gone
    assert len(list(directory.glob("embeddings-*"))) == 3 and verify(directory) == []
    index = (directory / "index.json").read_text()
    (directory / "index.json").write_text(index.replace('"version": "test"', '"version": "other"'))
    with pytest.raises(UserError, match="is of prompts test, the shards are other"):
        StoredEmbeddings.open(directory)
    (directory / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"embeddings.json cannot be read"):
        StoredEmbeddings.open(directory)


def test_what_float16_cannot_hold_is_refused(directory: Path) -> None:
    with pytest.raises(UserError, match="prompt_embeds has values that float16 cannot hold"):
        write_embeddings(directory, lambda some: encode(some, scale=1e6), model="test")
    assert StoredEmbeddings.open(directory) is None


def test_the_embedded_model(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, against the encoder that training uses."""
    from prdp_fast.models.pipeline import Pipeline
    from prdp_fast.models.text import TextEncoder

    assert cli.main(["embed", str(directory), "--model", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(directory / MANIFEST)
    encoder = TextEncoder(Pipeline.load("tiny", torch.device("cpu"), frozen_dtype=torch.float32), torch.float32)
    stored = StoredEmbeddings.open(directory)
    prompts = PromptSet.open(directory, "train").draw(16, seed=0)
    assert stored is not None
    stored.check(encoder.encode, prompts)
    fresh = encoder.encode(prompts).prompt_embeds
    error = (stored.rows(prompts).prompt_embeds.float() - fresh).abs().max() / fresh.abs().max()
    assert error < 2**-10
    assert cli.main(["embed", str(directory / "absent"), "--model", "tiny"]) == 2


@pytest.mark.parametrize("family", ["tiny", "sdxl"])
def test_training_reads_them_instead_of_encoding(directory: Path, tmp_path: Path, family: str) -> None:
    """One epoch's text phase, both ways, through what the trainer chooses."""
    from prdp_fast.config.load import load_recipe
    from prdp_fast.models.pipeline import Pipeline
    from prdp_fast.models.text import TextEncoder
    from prdp_fast.planning.job import Job
    from prdp_fast.prompts.embeddings import choose_encoder

    model = family if family == "tiny" else str(build(family, tmp_path / family))
    assert cli.main(["embed", str(directory), "--model", model]) == 0
    cpu = torch.device("cpu")
    encoder = TextEncoder(Pipeline.load(model, cpu, frozen_dtype=torch.float32), torch.float32)

    def chosen(stored: bool):
        settings = load_recipe(
            "smoke", [f"prompts={{source: {directory}, stored_embeddings: {stored}}}", f"model.pretrained={model}"]
        )
        job = Job.prepare(settings, "zero2.json", world_size=1, cuda=False)
        return job, choose_encoder(encoder.encode, job.train_prompts, stored=stored, device=cpu, dtype=torch.float32)

    assert chosen(False)[1] == encoder.encode
    job, encode = chosen(True)
    prompts = job.evaluation_prompts["unseen"]
    rows, fresh = encode(prompts), encoder.encode(prompts)
    assert (rows.pooled_prompt_embeds is None) == (rows.time_ids is None) == (family == "tiny")
    assert not torch.equal(rows.prompt_embeds, fresh.prompt_embeds)  # but rounded to float16
    for row, expected in zip(rows, fresh, strict=True):
        assert (row is None) == (expected is None)
        if row is not None:
            assert row.dtype == torch.float32 and torch.equal(row, expected.half().float())
