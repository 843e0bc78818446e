"""Which part of a page is written by a command? What stands between `<!-- NAME: ... -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re


def replace_marked(page: str, name: str, body: str) -> str:
    """The page with another text, which ends with a line break, between the marks of a name; all else stays.

    Raises: ValueError when the page does not hold the marks exactly once.
    """
    pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if (found := len(pattern.findall(page))) != 1:
        raise ValueError(f"expected a page with one pair of marks {name!r}, found {found}")
    return pattern.sub(lambda marks: f"{marks[1]}{body}{marks[2]}", page)
