"""Build, describe and verify directories of prompts.

    prdp shards build --source hpdv2 --input HPDv2/ --unseen-split benchmark --output prompts/hpdv2
    prdp shards build --source pickapic --input pickapic_v1/data --unseen-split test_unique --eval 500 --output prompts/pickapic
    prdp shards build --source csv --input captions.csv --column caption --output prompts/mine
    prdp shards info prompts/mine
    prdp shards verify prompts/mine

A recipe uses such a directory with `prompts.source: prompts/mine`; its sets train, seen_eval and unseen_eval are the ones that
recipes name by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import check_output
from prdp_fast.core.visible import visible
from prdp_fast.prompts import clean
from prdp_fast.prompts.curate import REPORT, CountTokens, curate
from prdp_fast.prompts.sources import KINDS, Source
from prdp_fast.prompts.verify import describe, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|info|verify")
    build = actions.add_parser("build", help="clean prompts, remove duplicates, hold some out, write shards", allow_abbrev=False)
    build.add_argument("--source", required=True, metavar="KIND", help=f"{', '.join(KINDS)}, or hf:DATASET (streamed)")
    build.add_argument("--input", type=Path, nargs="+", default=[], metavar="PATH", help="files or directories; .gz is read too")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    build.add_argument("--column", help="of the text; default: prompt, caption or text, whichever is there")
    build.add_argument("--split", help="files or data of this split; default: train where the source has splits")
    build.add_argument("--subset", help="hf: the data set's configuration")
    build.add_argument(
        "--unseen", type=Path, nargs="+", metavar="PATH", help="unseen prompts are these, which train then never holds"
    )
    build.add_argument("--unseen-split", metavar="SPLIT", help="unseen prompts are this split; for hpdv2 'benchmark' or 'test'")
    build.add_argument("--eval", type=int, metavar="N", help="prompts in each evaluation set; default: 2048, at most a tenth")
    build.add_argument("--min-chars", type=int, default=1, metavar="N", help="leave out shorter prompts (default: %(default)s)")
    build.add_argument(
        "--max-chars", type=int, default=clean.MAX_CHARS, metavar="N", help="leave out longer prompts (default: %(default)s)"
    )
    build.add_argument("--max-tokens", type=int, metavar="N", help="leave out prompts of more tokens, special ones counted")
    build.add_argument("--tokenizer", metavar="MODEL", help="a tokenizer, or a pipeline that has one; needed for --max-tokens")
    build.add_argument("--seed", type=int, default=0, help="of the hash that holds out and shuffles (default: %(default)s)")
    for name, summary in (("info", "sets, sizes and first prompts"), ("verify", "check every byte; status 1 and a line a fault")):
        action = actions.add_parser(name, help=summary, allow_abbrev=False)
        action.add_argument("directory", metavar="DIR", help="a directory, or its URL")


def run(args: argparse.Namespace) -> int:
    return {"build": _build, "info": _info, "verify": _verify}[args.action](args)


def _token_counter(name: str) -> CountTokens:
    import transformers

    folder = Path(name) / "tokenizer"
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder if folder.is_dir() else name)}
    if not Path(name).is_dir():
        where["subfolder"] = "tokenizer"  # on the hub a pipeline keeps it there
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError) as first:
        if not where.pop("subfolder", None):
            raise _no_tokenizer(name, first) from first
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        except (OSError, ValueError) as error:
            raise _no_tokenizer(name, error) from error
    return lambda texts: [len(ids) for ids in tokenizer(texts)["input_ids"]]


def _no_tokenizer(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return UserError(f"--tokenizer {name} cannot be loaded ({reason}); expected a tokenizer or a pipeline, by directory or name")


def _build(args: argparse.Namespace) -> int:
    if (args.max_tokens is None) != (args.tokenizer is None):
        raise UserError("--max-tokens and --tokenizer go together; give both or neither")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}; expected at least 1")
    check_output("--output", args.output)
    source = Source(args.source, tuple(args.input), args.split, args.column, args.subset)
    held_out = None
    if args.unseen or args.unseen_split:
        held_out = source._replace(paths=tuple(args.unseen or args.input), split=args.unseen_split)
    report = curate(
        source,
        args.output,
        held_out=held_out,
        limits=clean.Limits(args.min_chars, args.max_chars),
        max_tokens=args.max_tokens,
        count_tokens=_token_counter(args.tokenizer) if args.tokenizer else None,
        evaluation=args.eval,
        seed=args.seed,
    )
    _print_source("rows", report)
    if "unseen" in report:
        _print_source("rows of the unseen source", report["unseen"])
    for name, count in report["sets"].items():
        print(f"set {name}: {count:,} prompts")
    print(f"the same as JSON: {args.output / REPORT}")
    print(args.output)
    return 0


def _print_source(what: str, report: Mapping[str, Any]) -> None:
    print(f"{report['rows']:,} {what}, {report['kept']:,} prompts kept")
    for reason, count in report["dropped"].items():
        print(f"  {count:,} left out: {clean.REASONS[reason]}")
        for example in report["examples"][reason]:
            print(f"      {visible(example)}")


def _info(args: argparse.Namespace) -> int:
    version, sets = describe(args.directory)
    print(f"{args.directory}, version {visible(version)}")
    for summary in sets:
        print(
            f"set {visible(summary.name)}: {summary.prompts:,} prompts in {summary.shards} shards, {summary.bytes / 1e6:.1f} MB"
        )
        for text in summary.examples:
            print(f"    {visible(text)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    faults = verify(args.directory)
    print("\n".join(map(visible, faults)) or f"{args.directory}: all right")
    return 1 if faults else 0
