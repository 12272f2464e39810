"""Tables: the text that a terminal, a model card and evaluation.md show of fixed records, character by character."""

from __future__ import annotations

import io
import json
import math
from typing import Any

from rich.console import Console

from prdp_fast.cli import main
from prdp_fast.reporting.evaluation_page import evaluation_page
from prdp_fast.reporting.tables import Table, before_after, in_standard_errors, left_out, number, percent, print_summary

# Before and after


def summary(strict: bool = True) -> dict[str, Any]:
    def part(mean: float, rate: float) -> dict[str, float]:
        return {"mean": mean, "stderr": 0.0123, "n": 96} | ({"strict": rate} if strict else {})

    return {
        "evaluation": {
            "seen": {
                "before": part(0.512, 0.25),
                "after": part(0.701, 0.5),
                "difference": {"mean": 0.189, "stderr": 0.021, "n": 96},
            },
            "unseen": {"before": part(0.5, 0.2), "after": part(0.44, 0.1), "difference": {"mean": -0.06, "stderr": 0.0, "n": 96}},
        },
        "epochs": 60,
        "images": 15360,
        "wall_s": 412.0,
        "unet_forwards": {"rollout": 614400, "reference": 583680, "update": 583680},
    }


def printed(value: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(value, Console(file=stream, width=width))
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


TERMINAL = """\
reward   n         before          after      difference  s.e.      all right
─────────────────────────────────────────────────────────────────────────────
seen    96  0.512 ± 0.012  0.701 ± 0.012  +0.189 ± 0.021  +9.0  25.0% > 50.0%
unseen  96  0.500 ± 0.012  0.440 ± 0.012  -0.060 ± 0.000     -  20.0% > 10.0%
60 epochs, 15,360 images, 6.9 min
denoiser rows: rollout 614,400, reference 583,680, update 583,680
"""

MARKDOWN = """\
| reward | n | before | after | difference | s.e. | all right |
|---|---:|---:|---:|---:|---:|---:|
| seen | 96 | 0.5120 ± 0.0123 | 0.7010 ± 0.0123 | +0.1890 ± 0.0210 | +9.0 | 25.0% > 50.0% |
| unseen | 96 | 0.5000 ± 0.0123 | 0.4400 ± 0.0123 | -0.0600 ± 0.0000 | - | 20.0% > 10.0% |"""


def test_the_last_table_of_training():
    assert printed(summary()) == TERMINAL


def test_the_same_table_in_a_model_card():
    assert before_after(summary()["evaluation"], digits=4).markdown() == MARKDOWN


def test_prdp_report_prints_the_same_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "reward": 0.5}\n')
    assert main(["report", str(tmp_path)]) == 0
    *table, page, path = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert "\n".join(table) + "\n" == TERMINAL and (page, path) == (
        str(tmp_path / "report.html"), str(tmp_path / "curves.png")
    )  # fmt: skip


def test_images_without_a_score_are_counted_below_the_table():
    """One of them was its prompt's only image: n is of before, after and difference."""
    value = summary(strict=False)
    value["evaluation"]["seen"]["before"] |= {"unscored": 0}
    value["evaluation"]["seen"]["after"] |= {"unscored": 2, "n": 95}
    value["evaluation"]["seen"]["difference"] |= {"n": 95}
    value["evaluation"]["unseen"]["before"] |= {"unscored": 0}
    text = printed(value)
    assert text.splitlines()[2].startswith("seen    96/95/95  0.512 ± 0.012") and text.splitlines()[3].startswith(
        "unseen        96  "
    )
    assert left_out(value["evaluation"]) == (
        "Images without a score are left out: seen 0 before and 2 after; the difference is over those that have one both times."
    )
    assert "Images without a score are left out: seen 0 before and 2 after" in text and "60 epochs" in text


def test_without_verdicts_there_is_no_column_of_them():
    assert "all right" not in printed(summary(strict=False))


def test_a_narrow_terminal_cuts_no_figure():
    text = printed(summary(), width=48)
    assert max(map(len, text.splitlines())) <= 48
    for cell in ("0.512", "0.012", "+0.189", "0.021", "25.0%", "50.0%"):
        assert cell in text


def test_what_a_summary_lacks_is_a_dash_or_nothing():
    bare = {"evaluation": {"seen": {"before": {"mean": 0.5}, "after": {}, "difference": {"mean": 0.1, "stderr": None}}}}
    assert printed(bare).splitlines()[2].split() == ["seen", "-", "0.500", "-", "+0.100", "-"]
    assert printed({}) == "" and printed({"evaluation": {}, "epochs": 3}) == ""


def test_the_table_is_printed_to_the_terminal_by_default(capsys):
    print_summary(summary())
    assert "unseen" in capsys.readouterr().out


def test_a_name_that_looks_like_markup_is_shown_as_it_is():
    table = Table(("a|b", "n"), (("[red]x[/red]", "1"),))
    stream = io.StringIO()
    Console(file=stream, width=80).print(table.terminal())
    assert "[red]x[/red]" in stream.getvalue()
    assert table.markdown() == "| a\\|b | n |\n|---|---:|\n| [red]x[/red] | 1 |"


def test_cells():
    assert number({"mean": 0.12345, "stderr": 0.01, "low": 0.1, "high": 0.2}, 3, "+") == "+0.123 ± 0.010 [+0.100, +0.200]"
    assert number({"mean": 2.0, "stderr": math.nan, "low": None, "high": None}, 2) == "2.00"
    for absent in ({}, {"mean": None}, {"mean": math.nan, "stderr": 0.1}):
        assert number(absent, 3) == "-" and in_standard_errors(absent) == "-"
    assert in_standard_errors({"mean": -0.3, "stderr": 0.2}) == "-1.5" and in_standard_errors({"mean": 1.0, "stderr": 0.0}) == "-"
    assert (percent(0.125), percent(None), percent(math.nan)) == ("12.5%", "-", "-")


# The page of `prdp evaluate`


def estimate(mean: float, stderr: float, low: float, high: float, n: int = 96) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "low": low, "high": high, "n": n}


NONE = estimate(math.nan, math.nan, math.nan, math.nan, 0)


def compared() -> dict[str, Any]:
    """Two models, three rewards on many prompts, and one reward on a single prompt whose finetuned images have no score."""

    def reward(trained: str, *estimates: dict[str, Any], unscored: tuple[int, int]) -> dict[str, Any]:
        named = zip(("base", "finetuned", "difference", "win_rate"), estimates, strict=True)
        return {"trained": trained, **dict(named), "unscored": dict(zip(("base", "finetuned"), unscored, strict=True))}

    rewards = {
        "shapes:attributes=[fill,outline]": reward(
            "yes", estimate(0.52531, 0.01412, 0.49761, 0.55312), estimate(0.65152, 0.01203, 0.62784, 0.67461),
            estimate(0.12621, 0.00928, 0.10832, 0.14437), estimate(0.82214, 0.01754, 0.78801, 0.85512), unscored=(0, 0),
        ),
        "shapes": reward(
            "other options", estimate(0.7277, 0.0074, 0.7128, 0.7419), estimate(0.7684, 0.0062, 0.756, 0.7801),
            estimate(0.0407, 0.0044, 0.0323, 0.0496), estimate(0.7656, 0.0211, 0.7241, 0.8059), unscored=(0, 2),
        ),
        "a|b": reward(
            "no", estimate(-1.0857, 0.0102, -1.1058, -1.066), estimate(-1.1019, 0.0109, -1.1237, -1.0807),
            estimate(-0.0162, 0.0023, -0.0208, -0.0119), estimate(0.249, 0.023, 0.205, 0.294), unscored=(1, 0),
        ),
    }  # fmt: skip
    lone = reward("yes", estimate(0.5, math.nan, math.nan, math.nan, 1), NONE, NONE, NONE, unscored=(0, 2))
    spread = {
        "base": estimate(0.15901, 0.002, 0.1551, 0.1629), "finetuned": estimate(0.16451, 0.0021, 0.1604, 0.1686),
        "ratio": estimate(1.03412, 0.0091, 1.0163, 1.0522),
    }  # fmt: skip
    return {
        "settings": {
            "models": {
                "base": {"name": "tiny", "scheduler": "DDPMScheduler"},
                "finetuned": {"name": "my|run", "scheduler": "DDIMScheduler"},
            },
            "sampler": {"guidance_scale": 5.0, "guidance_interval": (1, 600), "num_inference_steps": 50, "eta": 1.0},
            "samples": 8, "seed": 0, "features": {"name": "colours averaged over an 8 x 8 grid"},
        },
        "sets": {
            "unseen": {"prompts": ["p"] * 96, "rewards": rewards, "details": {}, "diversity": spread},
            "mine": {
                "prompts": ["p"], "rewards": {"shapes": lone}, "details": {},
                "diversity": {"base": NONE, "finetuned": NONE, "ratio": NONE},
            },
        },
    }  # fmt: skip


PAGE = """\
# Evaluation: my|run against tiny

| model | unseen: shapes:attributes=[fill,outline] (trained on) | unseen: shapes (trained on with other options) | unseen: a\\|b \
| mine: shapes (trained on) |
|---|---:|---:|---:|---:|
| tiny (base) | 0.5253 ± 0.0141 [0.4976, 0.5531] \
| 0.7277 ± 0.0074 [0.7128, 0.7419] | -1.0857 ± 0.0102 [-1.1058, -1.0660] | 0.5000 |
| my\\|run (finetuned) | 0.6515 ± 0.0120 [0.6278, 0.6746] | 0.7684 ± 0.0062 [0.7560, 0.7801] \
| -1.1019 ± 0.0109 [-1.1237, -1.0807] | - |
| difference | +0.1262 ± 0.0093 [+0.1083, +0.1444] \
| +0.0407 ± 0.0044 [+0.0323, +0.0496] | -0.0162 ± 0.0023 [-0.0208, -0.0119] | - |
| win rate | 0.822 ± 0.018 [0.788, 0.855] | 0.766 ± 0.021 [0.724, 0.806] | 0.249 ± 0.023 [0.205, 0.294] | - |

Diversity: mean distance of a prompt's images in features of colours averaged over an 8 x 8 grid.

| model | unseen | mine |
|---|---:|---:|
| tiny (base) | 0.1590 ± 0.0020 [0.1551, 0.1629] | - |
| my\\|run (finetuned) | 0.1645 ± 0.0021 [0.1604, 0.1686] | - |
| ratio | 1.034 ± 0.009 [1.016, 1.052] | - |

Prompts: unseen 96, mine 1; 8 images each, seed 0, the same noise for both models.
DDPMScheduler and DDIMScheduler, 50 steps, eta 1, guidance 5 at timesteps 1 to 600.
Means over the images of a prompt, then over prompts; ± standard error over prompts; [95% bootstrap interval over prompts].
Win rate: share of image pairs, of one prompt and one noise, that the finetuned model wins; a tie is half.
5 scores were not finite and are left out. unseen, shapes: 0 of tiny (base) (n = 96 prompts) and 2 of my|run (finetuned) \
(n = 96 prompts), compared on n = 96; unseen, a|b: 1 of tiny (base) (n = 96 prompts) and 0 of my|run (finetuned) \
(n = 96 prompts), compared on n = 96; mine, shapes: 0 of tiny (base) (n = 1 prompts) and 2 of my|run (finetuned) \
(n = 0 prompts), compared on n = 0.
"""


def test_the_page_of_two_models():
    assert evaluation_page(compared(), 0.95) == PAGE


def test_the_page_of_a_record_that_was_read_again():
    """In evaluation.json a number that is not finite is null."""
    text = json.dumps(compared()).replace("NaN", "null")
    assert evaluation_page(json.loads(text), 0.95) == PAGE


ALONE = """\
# Evaluation: tiny

| model | mine: jpeg_size |
|---|---:|
| tiny | -1.2500 ± 0.5000 [-1.7500, -0.7500] |

Diversity: mean distance of a prompt's images in features of the CLIP model clip.

| model | mine |
|---|---:|
| tiny | - |

Prompts: mine 2; 1 images each, seed 3.
DDPMScheduler, 2 steps, eta 0.5, without guidance.
Means over the images of a prompt, then over prompts; ± standard error over prompts; [95% bootstrap interval over prompts].
"""


def test_the_page_of_one_model():
    sampler = {"guidance_scale": None, "guidance_interval": None, "num_inference_steps": 2, "eta": 0.5}
    reward = {"trained": "no", "model": estimate(-1.25, 0.5, -1.75, -0.75, 2), "unscored": {"model": 0}}
    record = {
        "settings": {
            "models": {"model": {"name": "tiny", "scheduler": "DDPMScheduler"}}, "sampler": sampler, "samples": 1, "seed": 3,
            "features": {"name": "the CLIP model clip"},
        },
        "sets": {
            "mine": {"prompts": ["a", "b"], "details": {}, "rewards": {"jpeg_size": reward}, "diversity": {"model": NONE}},
        },
    }  # fmt: skip
    assert evaluation_page(record, 0.95) == ALONE
