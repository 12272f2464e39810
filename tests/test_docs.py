"""README and docs/: every link, path, command, option and recipe key that a page names exists."""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/results/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)  # fmt: skip
# Rooms of prdp_fast/, which CONTRIBUTING.md names without the folder above them.
ROOMS = (
    "core", "config", "world", "prompts", "models", "acceleration", "sampling", "rewards", "objectives", "planning", "evaluation",
    "reporting", "doctor", "training", "commands",
)  # fmt: skip
FOLDERS = ("prdp_fast", "prdp_kernels", "kernels", "benchmarks", "configs", "docs", "examples", "tests", ".ci")
FILES_AT_THE_TOP = re.compile(r"(README|CONTRIBUTING)\.md|setup\.py|constraints\.txt|mkdocs\.yml|pyproject\.toml|Makefile")
PROGRAMS = ("make", "prdp", "deepspeed", "torchrun", "python")
# Options of the launchers that pages use, and how many words follow each. The word after the options is a script or a module.
LAUNCHERS = {
    "deepspeed": {"--num_gpus": 1, "--num_nodes": 1, "--hostfile": 1, "--log_level": 1, "--no_local_rank": 0, "--module": 0},
    "torchrun": {"--nproc_per_node": 1, "--nnodes": 1, "--standalone": 0, "-m": 0},
}


class Fault(Exception):
    """What a page says that is not so."""


# ------------------------------------------------------------------------------------------------------------ what a page holds
class Block(NamedTuple):
    language: str  # as the fence says; "" of an indented block
    text: str


class Page(NamedTuple):
    prose: str  # without blocks and code spans, whose place is kept
    spans: list[str]  # `code`
    blocks: list[Block]
    anchors: frozenset[str]


def read(text: str) -> Page:
    prose: list[str] = []
    blocks: list[Block] = []
    fence: str | None = None
    language, held = "", []
    for line in [*text.split("\n"), ""]:
        if fence is None and (match := re.match(r"(`{3,})(\w*)", line)):
            fence, language, held = match[1], match[2], []
        elif fence is not None and line.startswith(fence):
            blocks.append(Block(language, "\n".join(held)))
            fence = None
        elif fence is not None:
            held.append(line)
        elif line.startswith("    ") and (not prose[-1].strip() or prose[-1] == "\0"):  # not the second line of a list's item
            if prose[-1] == "\0":
                blocks[-1] = Block("", f"{blocks[-1].text}\n{line[4:]}")
            else:
                blocks.append(Block("", line[4:]))
                prose.append("\0")
        else:
            prose.append(line)
    assert fence is None, "a fence is open at the end"
    plain = "\n".join(prose)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", plain)]
    return Page(re.sub(r"`[^`]+`", "`code`", plain), spans, blocks, frozenset(anchors(prose)))


def anchors(lines: Sequence[str]) -> Iterator[str]:
    """Of the headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    for line in lines:
        if match := re.match(r"#{1,6} (.+)", line):
            anchor = re.sub(r"[^\w\- ]", "", match[1].strip().lower()).replace(" ", "-")
            yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
            seen[anchor] += 1


@cache
def page(name: str) -> Page:
    return read((ROOT / name).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- links and paths
def check_link(name: str, target: str) -> None:
    """A relative link of the page `name`."""
    path, _, anchor = target.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    if not file.exists():
        raise Fault(f"{target}: no such file")
    if anchor and anchor not in page(str(file.resolve().relative_to(ROOT))).anchors:
        raise Fault(f"{target}: no such heading")


def links(prose: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def path_of(span: str) -> str | None:
    """The path from the top of the repository that a code span means, which may be a pattern; None if it means no such path."""
    if re.search(r"[^\w./*-]", span):
        return None
    first, slash, rest = span.partition("/")
    if slash and first in FOLDERS:
        return f"kernels/{span}" if first == "prdp_kernels" else span
    if slash and first in ROOMS and (not rest or rest.endswith((".py", "/"))):
        return f"prdp_fast/{span}"
    if re.fullmatch(r"zero\w+\.json", span):
        return f"configs/{span}"
    return span if FILES_AT_THE_TOP.fullmatch(span) else None


def check_path(path: str) -> None:
    if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
        raise Fault(f"{path}: no such path")


# ------------------------------------------------------------------------------------------------------------------- commands
class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Fault(message)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a block that this file knows, continued lines joined."""
    for line in text.replace("\\\n", " ").split("\n"):
        if not re.match(rf"\s*(--|.*\b({'|'.join(PROGRAMS)})\b)", line):
            continue  # formulas and Python have quotes of their own
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for operator, words in itertools.groupby(lexer, lambda word: word in ("&&", "||", "|", ";", ">")):
            listed = list(words)
            if not operator and (listed[0] in PROGRAMS or listed[0].startswith("--")):
                yield listed


def is_placeholder(word: str) -> bool:
    """RUN, DIR_OR_HUB_ID; and my.yaml, a file that the reader would write."""
    return re.fullmatch(r"[A-Z][A-Z_]*", word) is not None or word.startswith("my")


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def literal_options(*files: Path) -> set[str]:
    """Options in the `add_argument` calls of source files, whoever parses them."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and str(arg.value).startswith("-")}
    return found


def module_file(module: str) -> Path | None:
    """Of a module of this repository; None if it belongs to another one."""
    top, *rest = module.split(".")
    if top not in ("prdp_fast", "benchmarks", "prdp_kernels"):
        return None
    path = (ROOT / "kernels" if top == "prdp_kernels" else ROOT).joinpath(top, *rest)
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if (path / "__main__.py").is_file():
        return path / "__main__.py"
    raise Fault(f"{module}: no such module")


@cache
def subcommand(name: str) -> Parser:
    from prdp_fast import cli

    if name not in cli.SUBCOMMANDS:
        raise Fault(f"prdp has no subcommand {name!r}")
    parser = Parser(prog=f"prdp {name}", allow_abbrev=False)
    import_module(cli.SUBCOMMANDS[name].module).add_arguments(parser)
    return parser


def parsers_below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


@cache
def all_options() -> frozenset[str]:
    """Of every `prdp` subcommand, training among them, and of the launchers."""
    from prdp_fast import cli

    found: set[str] = set()
    for name in cli.SUBCOMMANDS:
        for parser in (subcommand(name), *parsers_below(subcommand(name)).values()):
            found |= set(parser._option_string_actions)
    return frozenset(found.union(*LAUNCHERS.values()))


def check_prdp(words: Sequence[str], *, whole: bool) -> None:
    """What follows `prdp`. whole: a command that could be typed, and not one named in passing, which may lack arguments."""
    name, *rest = words
    if is_placeholder(name):
        return
    if name == "train":
        return check_training(rest)
    parser: argparse.ArgumentParser = subcommand(name)
    if whole:
        parser.parse_args(rest)
        return
    below = parsers_below(parser)
    if below and rest:
        if rest[0] not in below:
            raise Fault(f"prdp {name} has no {rest[0]!r}")
        parser = below[rest[0]]
    for word in rest:
        if word.startswith("-") and word not in parser._option_string_actions:
            raise Fault(f"prdp {name} has no option {word}")


def check_training(words: Sequence[str]) -> None:
    """Arguments of training: options, the config, the recipe, and the keys that --set names."""
    args = subcommand("train").parse_args(["1" if word == "N" else word for word in words])
    if not is_placeholder(str(args.config)) and not (ROOT / "configs" / args.config).is_file():
        raise Fault(f"--config {args.config}: not in configs/")
    check_overrides(args.overrides, None if is_placeholder(args.recipe) or "--recipe" not in words else args.recipe)


def check_overrides(overrides: Sequence[str], recipe: str | None) -> None:
    """recipe: None if the words do not say which; then any shipped one that takes them will do."""
    overrides = [override for override in overrides if not override.startswith("SECTION.KEY=")]
    from prdp_fast.config.load import load_recipe
    from prdp_fast.core.errors import UserError

    faults = []
    for name in [recipe] if recipe else sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")):
        try:
            load_recipe(name, list(overrides))
            return
        except UserError as error:
            faults.append(str(error))
    raise Fault(faults[-1])


def check_command(words: Sequence[str], *, whole: bool = True) -> None:
    program, *rest = words
    if program.startswith("--set") and whole:
        check_training(words)
    elif program.startswith("--"):
        unknown = [word for word in words if word.startswith("--") and word not in all_options()]
        if unknown:
            raise Fault(f"{' '.join(unknown)}: no command has it")
        check_overrides([rest[i] for i, word in enumerate(words[:-1]) if word == "--set" and "=" in rest[i]], None)
    elif program == "make":
        for word in rest:
            if word.startswith("ARGS=") and rest[0] == "train":
                check_training(shlex.split(word.removeprefix("ARGS=")))
            elif "=" not in word and word not in make_targets():
                raise Fault(f"make has no target {word!r}")
    elif program == "prdp" and rest:
        check_prdp(rest, whole=whole)
    elif program == "python" and rest:
        if rest[0] == "-m":
            file = module_file(rest[1])
            check_program(file, rest[1], rest[2:], whole) if file else None
        elif rest[0] != "-c" and not is_placeholder(Path(rest[0]).stem):
            check_path(rest[0])
    elif program in LAUNCHERS and rest:
        options, words = LAUNCHERS[program], list(rest)
        as_module = False
        while words and words[0].startswith("-"):
            if words[0] not in options:
                raise Fault(f"{program} {words[0]}: not known here")
            as_module |= words[0] in ("-m", "--module")
            del words[: 1 + options[words[0]]]
        if not words:
            raise Fault(f"{program} starts nothing")
        file = module_file(words[0]) if as_module else ROOT / words[0]
        check_path(words[0]) if not as_module else None
        check_program(file, words[0], words[1:], whole) if file else None


def check_program(file: Path, name: str, words: Sequence[str], whole: bool) -> None:
    if name in ("prdp_fast/train.py", "prdp_fast.train"):
        check_training(words)
    elif name in ("prdp_fast/cli.py", "prdp_fast.cli"):
        check_prdp(words, whole=whole)
    else:
        shared = (ROOT / "benchmarks" / "lib").glob("*.py") if "benchmarks" in file.parts else ()
        for word in words:
            if word.startswith("-") and word not in literal_options(file, *shared):
                raise Fault(f"{name} has no option {word}")


# ---------------------------------------------------------------------------------------------------------------- recipe keys
@cache
def recipe_keys() -> dict[str, Any]:
    """Every key of the schema with its default; ... where it has none. Items of the list of rewards are `rewards.N`."""
    from prdp_fast.config import recipe
    from prdp_fast.config.objectives import OBJECTIVES
    from prdp_fast.config.tracking import MlflowSettings, PrometheusSettings, WandbSettings

    found: dict[str, Any] = {}

    def walk(section: Any, prefix: str) -> None:
        for name, field in section.model_fields.items():
            key, default = f"{prefix}{name}", ... if field.is_required() else field.default
            if isinstance(default, recipe.Section):
                walk(type(default), f"{key}.")
            else:
                found.setdefault(key, list(default) if isinstance(default, tuple) else default)

    for section, prefix in (
        (recipe.Settings, ""), (recipe.LoraSettings, "model.lora."), (recipe.RewardSettings, "rewards.N."),
        (WandbSettings, "tracking.wandb."), (MlflowSettings, "tracking.mlflow."), (PrometheusSettings, "tracking.prometheus."),
        (recipe.RandomSteps, "sampler.stochastic_steps."),
        *((section, "objective.") for section in OBJECTIVES.values()),
    ):  # fmt: skip
        walk(section, prefix)
    return found


def check_span(span: str) -> None:
    """A code span of prose that is a path, a command, options, or a key of the recipe."""
    path = path_of(span)
    if path is not None:
        return check_path(path)
    if span.split()[0] in PROGRAMS or span.startswith("--"):
        return check_command(shlex.split(span), whole=False)
    key, equals, _ = span.partition("=")
    sections = {known.split(".")[0] for known in recipe_keys() if "." in known}
    is_file = Path(key).suffix in (".json", ".jsonl", ".md", ".py", ".txt")
    if re.fullmatch(r"[a-z]+(\.\w+)+", key) and key.split(".")[0] in sections and not is_file:
        if equals:
            check_overrides([span], None)
        elif key not in recipe_keys():
            raise Fault(f"the recipe has no key {key}")


# ----------------------------------------------------------------------------------------------------------------------- tests
def faults_of(checks: Iterator[tuple[str, Any]]) -> list[str]:
    found = []
    for what, check in checks:
        try:
            check()
        except Fault as fault:
            found.append(f"{what}\n    {fault}")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors(name: str) -> None:
    faults = faults_of((link, lambda link=link: check_link(name, link)) for link in links(page(name).prose))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_what_stands_in_backticks(name: str) -> None:
    faults = faults_of((span, lambda span=span: check_span(span)) for span in page(name).spans)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_commands(name: str) -> None:
    listed = [words for block in page(name).blocks if block.language in ("", "sh") for words in commands(block.text)]
    faults = faults_of((shlex.join(words), lambda words=words: check_command(words)) for words in listed)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_python_compiles_and_yaml_is_a_recipe(name: str, tmp_path: Path) -> None:
    blocks = page(name).blocks
    for block in blocks:
        if block.language == "python":
            compile(block.text, name, "exec")
    recipes = [yaml.safe_load(block.text) for block in blocks if block.language == "yaml"]
    if recipes:
        from prdp_fast.config.load import load_recipe

    for number, recipe in enumerate(recipes):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump({"rewards": [{"name": "jpeg_size"}]} | recipe))
        load_recipe(str(file))


def test_the_extras_that_pip_is_asked_for() -> None:
    asked = {extra for name in PAGES for extras in re.findall(r"'[\w.-]+\[([\w,]+)\]'", (ROOT / name).read_text())
             for extra in extras.split(",")}  # fmt: skip
    (call,) = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
               if isinstance(node, ast.keyword) and node.arg == "extras_require")  # fmt: skip
    assert isinstance(call.value, ast.Dict)
    assert asked and asked <= {key.value for key in call.value.keys if isinstance(key, ast.Constant)}


# README


def test_readme_is_short_and_names_the_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert 110 <= len(text.splitlines()) <= 130 and len(text.split()) <= 1200
    for command in ("make train", "make test", "make test-fast", "deepspeed prdp_fast/train.py --config zero2.json"):
        assert re.search(rf"^{re.escape(command)}(\s|$)", text, re.MULTILINE), command


def test_the_reward_of_the_readme_scores_images() -> None:
    (block,) = (block for block in page("README.md").blocks if block.language == "python")
    assert len(block.text.splitlines()) == 5
    names: dict[str, Any] = {}
    exec(block.text, names)
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).to(torch.uint8)
    assert names["brightness"](images, ["a", "b"]).tolist() == [0.0, 1.0]


# Tables that must be whole


def rows_of(name: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, its head left out."""
    text = (ROOT / name).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def test_the_recipe_page_has_every_key_and_its_default() -> None:
    from prdp_fast.config.load import parse_value

    written = {key.strip("`"): default.strip("`") for key, default, *_ in rows_of("docs/recipe.md", "Every key")}
    assert set(written) == set(recipe_keys())
    for key, default in recipe_keys().items():
        if default is ...:
            assert not written[key] or key == "objective.name", key
        else:
            assert parse_value(written[key]) == default, key


def test_the_recipe_page_has_every_shipped_recipe() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text().split("\n## ")[0]
    assert {path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")} == {
        name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


def test_the_rewards_page_has_every_reward() -> None:
    from prdp_fast.rewards.registry import REWARDS

    assert {name.strip("`") for name, *_ in rows_of("docs/rewards.md", "Built-in rewards")} == set(REWARDS)


def test_contributing_has_every_room() -> None:
    floors = rows_of("CONTRIBUTING.md", "How the house is built")[:6]
    named = re.findall(r"`([\w./]+)`", " ".join(rooms for _, rooms, _ in floors))
    package = ROOT / "prdp_fast"
    there = [f"{path.name}/" for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    there += [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)


class _AnyTag(yaml.SafeLoader):
    """Of mkdocs.yml, where a tag makes Python objects that this test has no use for."""


_AnyTag.add_multi_constructor("", lambda loader, suffix, node: None)


def test_the_site_has_every_page() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=_AnyTag)

    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(inner)

    beside = re.findall(r'"([\w/]+\.md)"', (ROOT / "docs" / "hooks.py").read_text())
    assert sorted(files(config["nav"])) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), *beside])
    assert config["theme"]["font"] is False, "fonts would be fetched from the network"


# The checks themselves


@pytest.mark.parametrize(
    "span", ["prdp_fast/surprise.py", "configs/zero9.json", "zero9.json", "training/surprise.py", "tests/*.txt"]
)
def test_a_wrong_path_is_caught(span: str) -> None:
    path = path_of(span)
    assert path is not None
    with pytest.raises(Fault, match="no such path"):
        check_path(path)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("docs/surprise.md", "no such file"), ("docs/performance.md#surprise", "no such heading"), ("#surprise", "no such heading")],
)
def test_a_broken_link_is_caught(target: str, expected: str) -> None:
    check_link("README.md", "docs/performance.md#on-a-gpu")
    with pytest.raises(Fault, match=expected):
        check_link("README.md", target)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make surprise", "no target 'surprise'"),
        ("prdp surprise RUN", "no subcommand 'surprise'"),
        ("prdp report RUN --surprise", "unrecognized arguments"),
        ("prdp shards surprise DIR", "invalid choice"),
        ("deepspeed prdp_fast/train.py --surprise", "unrecognized arguments"),
        ("prdp train --surprise", "unrecognized arguments"),
        ("deepspeed prdp_fast/train.py --config zero9.json", "not in configs/"),
        ("deepspeed prdp_fast/train.py --recipe surprise", "surprise"),
        ("deepspeed prdp_fast/train.py --set schedule.surprise=1", "unknown key 'surprise'"),
        ("--set schedule.surprise=1", "unknown key 'surprise'"),
        ("deepspeed prdp_fast/surprise.py", "no such path"),
        ("torchrun --nproc_per_node 8 -m prdp_fast.cli report", "required"),
        ("python -m benchmarks.epoch.surprise", "no such module"),
        ("python -m prdp_fast.world.make_model --surprise", "no option --surprise"),
        ("python benchmarks/surprise.py", "no such path"),
    ],
)
def test_a_wrong_command_is_caught(command: str, expected: str) -> None:
    ((*words,),) = commands(f"\n{command}   # a comment\n")
    with pytest.raises(Fault, match=expected):
        check_command(words)


@pytest.mark.parametrize(
    "span", ["schedule.surprise", "schedule.epochs=many", "prdp shards surprise", "--surprise", "make surprise"]
)
def test_a_wrong_span_is_caught(span: str) -> None:
    with pytest.raises(Fault):
        check_span(span)


A_PAGE = """# A `b` c

See `make x` and
[d](e.md).

    prdp a \\
      --b 'c d' && prdp e | head

- f
    g

```sh
make y  # world's
```
# A `b` c
"""


def test_how_a_page_is_read() -> None:
    parsed = read(A_PAGE)
    assert parsed.anchors == {"a-b-c", "a-b-c-1"}
    assert parsed.spans == ["b", "make x", "b"]
    assert list(links(parsed.prose)) == ["e.md"]
    listed = [words for block in parsed.blocks for words in commands(block.text)]
    assert listed == [["prdp", "a", "--b", "c d"], ["prdp", "e"], ["make", "y"]]
