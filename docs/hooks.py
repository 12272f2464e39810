"""For mkdocs: pages that lie beside the code become pages of the site, at the path they have in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
BESIDE_THE_CODE = ("kernels/README.md", "benchmarks/results/README.md", "CONTRIBUTING.md")


def on_files(files: Any, config: Any) -> Any:
    for path in BESIDE_THE_CODE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Relative links are the repository's. The site has the pages of docs/ at its top, so the step out of or into docs/ goes."""
    if page.file.src_uri in BESIDE_THE_CODE:
        return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    return markdown.replace("](../", "](")
