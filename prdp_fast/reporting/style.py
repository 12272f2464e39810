"""The style of the report: both themes, paper, and the charts' colours. All of it is in the page; nothing is fetched."""

from __future__ import annotations

# Text has a contrast of at least 4.5 to 1 with both backgrounds, lines and marks of at least 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11).
LIGHT = {
    "paper": "#ffffff", "raised": "#f3f5f7", "ink": "#15191d", "quiet": "#4a545e", "rule": "#78828c", "faint-rule": "#d5dae0",
    "focus": "#0b57d0", "s0": "#1f5fbf", "s1": "#b3420c", "s2": "#0b6e4f", "s3": "#7a3fb0", "s4": "#7a5c00", "s5": "#4d5560",
}  # fmt: skip
DARK = {
    "paper": "#14171a", "raised": "#1f2429", "ink": "#eceff2", "quiet": "#b4bdc6", "rule": "#87919b", "faint-rule": "#3a4149",
    "focus": "#8ab4f8", "s0": "#82b1ff", "s1": "#ffa867", "s2": "#5fd4a4", "s3": "#cfa4ff", "s4": "#e3c35a", "s5": "#b8c0c8",
}  # fmt: skip
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 4")  # a line is told from another without its colour, on paper too


def variables(theme: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{colour}" for name, colour in theme.items()) + "}"


def stylesheet() -> str:
    lines = "".join(
        f".s{number}{{stroke:var(--s{number});fill:var(--s{number})}}.line.s{number}{{stroke-dasharray:{dash}}}"
        for number, dash in enumerate(DASHES)
    )
    return (
        f"{variables(LIGHT)}\n:root{{color-scheme:light dark}}\n"
        f"@media (prefers-color-scheme:dark){{{variables(DARK)}}}\n{lines}\n{RULES}\n"
        f"@media print{{{variables(LIGHT)}:root{{color-scheme:light}}{PRINT}}}\n"
    )


RULES = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem 1.25rem 3rem;background:var(--paper);color:var(--ink);
  font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--faint-rule)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
p,li{max-width:60rem}
.lead{font-size:1.1rem}
.note,.prompt{color:var(--quiet);font-size:.9rem}
a{color:var(--focus)}
:focus-visible{outline:3px solid var(--focus);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;margin:.75rem 0;padding:0}
nav a{display:inline-block;padding:.25rem 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.25rem}
figure{margin:0}
figcaption{font-size:.9rem}
.panel{background:var(--raised);border-radius:.4rem;padding:.75rem}
.chart{display:block;width:100%;height:auto}
.chart text{fill:var(--quiet);font-size:12px}
.grid,.axis,.level,.line{fill:none}
.grid{stroke:var(--faint-rule)}
.axis{stroke:var(--rule)}
.level{stroke:var(--rule);stroke-width:1.5;stroke-dasharray:3 2}
.line{fill:none!important;stroke-width:2;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.55;stroke-dasharray:none}
.band{stroke:none!important;opacity:.2}
.bar{fill:var(--s0)}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1rem;list-style:none;margin:.25rem 0 0;padding:0}
.swatch{width:34px;height:12px;margin-right:.35rem;vertical-align:middle}
.share{width:6rem;height:.8rem;vertical-align:middle;margin-left:.5rem}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.25rem 0}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint-rule);
  overflow-wrap:normal}
thead th{border-bottom-color:var(--rule)}
tbody th{font-weight:500;min-width:min(11rem,30vw)}
.number{text-align:right}
th.number,.number span{white-space:nowrap}
fieldset{border:1px solid var(--faint-rule);border-radius:.4rem;display:inline-flex;flex-wrap:wrap;gap:.25rem 1.25rem;
  margin:.25rem 0 .75rem;padding:.25rem .9rem .5rem}
fieldset label{display:inline-flex;align-items:center;gap:.4rem;padding:.3rem 0}
input{accent-color:var(--focus);width:1.1rem;height:1.1rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.25rem}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.4rem}
.two img,.one img{display:block;width:100%;height:auto;border-radius:.2rem}
.pixels{image-rendering:pixelated}
.prompt{margin:.25rem 0 0}
.pictures:has(.only-before:checked) .after,.pictures:has(.only-after:checked) .before{display:none}
.pictures:has(.only-before:checked) .two,.pictures:has(.only-after:checked) .two{grid-template-columns:1fr}
pre{background:var(--raised);border-radius:.4rem;padding:.75rem;overflow-x:auto;font-size:.85rem;line-height:1.4;
  overflow-wrap:normal}
summary{cursor:pointer;padding:.3rem 0}
""".strip()

# Paper: no controls, no scrolling, both pictures whatever was chosen, nothing torn apart.
PRINT = """
body{max-width:none;padding:0;font-size:10pt}
nav,fieldset{display:none}
.panels{grid-template-columns:1fr 1fr}
.pairs{grid-template-columns:1fr 1fr 1fr}
.pictures .two{grid-template-columns:1fr 1fr!important}
.pictures .two .before,.pictures .two .after{display:block!important}
.panel,.pair,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.share{display:none}
.scroll,pre{overflow:visible}
pre{white-space:pre-wrap;columns:2}
th.number,.number span{white-space:normal}
""".strip()
