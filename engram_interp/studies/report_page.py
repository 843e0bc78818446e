"""The report as one HTML file: opens without a network, prints, and reads on a phone.

Everything is inside the page: the style, the drawing library once, the strips as SVG with their text. Figures carry an alternative
text that says what they show; no statement stands on colour alone.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MARKS = {"supported": "✓", "not supported": "–", "opposite": "✗", "refused": "?"}

_STYLE = """
:root { color-scheme: light; --ink: #1c1e21; --muted: #5b6068; --line: #e3e5e8; --accent: #134b73; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 1.2rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p, li, figcaption { max-width: 46rem; } small, figcaption, .quiet { color: var(--muted); font-size: .85rem; }
nav a { margin-right: 1rem; } a { color: var(--accent); }
figure { margin: 1rem 0; } .wide { overflow-x: auto; } .wide > svg { max-width: none; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top; }
.claim { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .7rem 0; break-inside: avoid; }
.claim h3 { font-size: 1rem; margin: 0 0 .3rem; }
.claim dl { margin: 0; display: grid; grid-template-columns: 5rem 1fr; gap: .15rem .8rem; }
.claim dt { color: var(--muted); font-size: .85rem; } .claim dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
.verdict { float: right; font-weight: 600; }
@media (max-width: 600px) { .claim dl { grid-template-columns: 1fr; } .verdict { float: none; display: block; } }
@media print { body { max-width: none; font-size: 11pt; } nav { display: none; } figure, .claim, table { break-inside: avoid; } }
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
        self._figures = 0

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
            f'<section class="claim">{verdict}<h3>{html.escape(claim.claim)}</h3><dl>{terms}</dl></section>'
        )

    def svg(self, picture: str, caption: str) -> None:
        """A picture that describes itself."""
        self._parts.append(
            f'<figure><div class="wide">{picture}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def figure(self, figure: go.Figure, alt: str, caption: str = "") -> None:
        """A Plotly figure; `alt` says what it shows to those who do not see it."""
        self._figures += 1
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"figure{self._figures}",
            config={"displaylogo": False, "responsive": True},
        )  # fmt: skip
        text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure><div role="img" aria-label="{html.escape(alt, quote=True)}">{drawn}</div>{text}</figure>'
        )

    def table(self, frame: pd.DataFrame, caption: str = "") -> None:
        """A table without its index; numbers with four significant digits."""
        text = frame.to_html(index=False, border=0, float_format=lambda x: f"{x:.4g}", na_rep="", escape=True)
        note = f'<p class="quiet">{html.escape(caption)}</p>' if caption else ""
        self._parts.append(f'<div class="wide">{text}</div>{note}')

    def html(self) -> str:
        """The file."""
        from plotly.offline import get_plotlyjs

        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in self._sections)
        body = [self._parts[0], f'<nav aria-label="contents">{links}</nav>', *self._parts[1:]]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
            f"<script>{get_plotlyjs() if self._figures else ''}</script></head>\n<body>{''.join(body)}</body></html>\n"
        )
