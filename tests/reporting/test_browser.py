"""The HTML report in a real browser: Chromium, at the width of a phone, a desk and paper, light and dark, under the rules of axe.

`make browser` installs what that takes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT
from made_runs import a_run

from prdp_fast.cli import main

BROWSER = ROOT / "tests" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("node") and (BROWSER / "node_modules").is_dir()),
    reason="needs Chromium, Node.js and the packages of tests/browser: make browser",
)


def look(page: Path, screenshots: Path) -> dict[str, dict[str, Any]]:
    """What look.mjs found in each view."""
    words = ["node", "look.mjs", str(CHROMIUM), str(page), str(screenshots)]
    done = subprocess.run(words, cwd=BROWSER, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("several", [False, True], ids=["one run", "several runs"])
def test_the_report(several: bool, tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "first", side=64)
    if several:
        a_run(tmp_path / "runs" / "second", seed=1)
        a_run(tmp_path / "runs" / "third", kl_weight=2.0)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs" / ("" if several else "first")), "--output", str(page)]) == 0
    found = look(page, tmp_path)
    assert set(found) == {"phone", "desk", "night", "paper"}
    for name, view in found.items():
        assert view.pop("rules") > 30, f"{name}: few rules of axe found something to look at"
        assert view == {"requests": [], "errors": [], "overflow": 0, "broken": 0, "violations": []}, name
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_look_finds_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<!DOCTYPE html><html><body><img src="missing.png"><p style="color: #999; width: 2000px">pale and wide</p></body></html>'
    )
    for name, view in look(page, tmp_path).items():
        rules = {line.split(":")[0] for line in view["violations"]}
        assert {"html-has-lang", "image-alt", "color-contrast"} <= rules, name
        assert view["overflow"] > 500 and view["broken"] == 1 and view["errors"], name
        assert view["requests"] == [(tmp_path / "missing.png").as_uri()], name
