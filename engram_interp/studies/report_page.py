"""The report as one HTML file: opens without a network, prints, and reads on a phone.

Everything is inside the page, and nothing in it is a program: figures are SVG, each drawn twice, for a wide and for a narrow
screen, of which the style shows one. Figures carry an alternative text that says what they show; no statement stands on colour
alone. Light or dark as the reader's system is, light on paper.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engram_interp.figures.static_svg import static_svg

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MARKS = {"supported": "✓", "not supported": "–", "opposite": "✗", "refused": "?", "not decided (quick)": "?"}

_WIDE, _NARROW = 720, 350
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --muted: #5b6068; --line: #e3e5e8; --accent: #134b73; --page: #fff; --soft: #f5f6f8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #f2f3f5; --muted: #a7adb7; --line: #2c313a; --accent: #79add2; --page: #0e1117; --soft: #171b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 800px; padding: 1.2rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; border-top: 1px solid var(--line); padding-top: 1.2rem; break-after: avoid; }
figcaption, .quiet { color: var(--muted); font-size: .85rem; } caption { text-align: left; color: var(--muted); padding: .3rem 0; }
nav ul { list-style: none; padding: 0; columns: 2; } a { color: var(--accent); }
figure { margin: 1.2rem 0; break-inside: avoid; } figure svg { display: block; max-width: 100%; height: auto; }
.narrow { display: none; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.35; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
.claim { border: 1px solid var(--line); border-left: 4px solid var(--muted); border-radius: 6px; padding: .6rem .9rem;
  margin: .7rem 0; background: var(--soft); break-inside: avoid; }
.claim.supported { border-left-color: #009e73; } .claim.opposite { border-left-color: #d55e00; }
.claim h3 { font-size: 1rem; margin: 0 0 .3rem; } .verdict { float: right; font-weight: 600; margin-left: 1rem; }
.claim dl { margin: 0; display: grid; grid-template-columns: 4rem 1fr; gap: .15rem .8rem; }
.claim dt { color: var(--muted); font-size: .85rem; } .claim dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
@media screen and (max-width: 600px) {
  body { padding: .9rem; } nav ul { columns: 1; } .wide { display: none; } .narrow { display: block; }
  .claim dl { grid-template-columns: 1fr; } .verdict { float: none; display: block; margin: 0; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } table { font-size: 8pt; }
  tr { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: what it says, what was seen here, against which null, by which rule, and the verdict."""

    claim: str
    paper: str
    here: str
    null: str
    rule: str
    verdict: str


class Page:
    """Sections in the order they are added; `html()` is the whole file."""

    def __init__(self, title: str, lead: Sequence[str]) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lead)]
        self._sections: list[tuple[str, str]] = []

    def section(self, title: str, *paragraphs: str) -> None:
        """A heading that the contents link to, and text below it."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Plain paragraphs."""
        self._parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs]

    def claim(self, claim: Claim) -> None:
        """A claim with its verdict in words."""
        rows = (("paper", claim.paper), ("here", claim.here), ("null", claim.null), ("rule", claim.rule))
        terms = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows)
        verdict = f'<span class="verdict">{_MARKS.get(claim.verdict, "")} {html.escape(claim.verdict)}</span>'
        self._parts.append(
            f'<section class="claim {claim.verdict.split()[0]}">{verdict}<h3>{html.escape(claim.claim)}</h3><dl>{terms}</dl></section>'
        )

    def picture(self, draw: Callable[[int], str], caption: str = "") -> None:
        """A picture that describes itself: `draw` gives the SVG of a width in pixels."""
        text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        both = f'<div class="wide">{draw(_WIDE)}</div><div class="narrow">{draw(_NARROW)}</div>'
        self._parts.append(f"<figure>{both}{text}</figure>")

    def figure(self, figure: go.Figure, alt: str, caption: str = "") -> None:
        """A figure of the project; `alt` says what it shows to those who do not see it."""
        self.picture(lambda width: static_svg(figure, alt, width=width), caption)

    def table(self, frame: pd.DataFrame, caption: str = "", *, folded: str = "") -> None:
        """A table without its index, numbers with four significant digits; `folded`: hidden behind these words."""
        text = frame.to_html(index=False, border=0, float_format=lambda x: f"{x:.4g}", na_rep="", escape=True)
        note = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        text = f'<div class="scroll" tabindex="0">{text.replace(">", ">" + note, 1)}</div>'
        self._parts.append(f"<details><summary>{html.escape(folded)}</summary>{text}</details>" if folded else text)

    def html(self) -> str:
        """The file."""
        links = "".join(f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for anchor, title in self._sections)
        body = [self._parts[0], f'<nav aria-label="contents"><ul>{links}</ul></nav>', *self._parts[1:]]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
        )
