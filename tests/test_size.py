"""Is every file one idea (at most 400 lines), and every function readable at a glance (at most 60, its docstring aside)?"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for folder in ("engram_interp", "app", "probes", "experiments") for path in (ROOT / folder).rglob("*.py")
)


def too_long(source: str, name: str, *, lines: int = 400, function_lines: int = 60) -> list[str]:
    found = [f"{name}: {n} lines"] if (n := len(source.splitlines())) > lines else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if length > function_lines:
                found.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    return found


def test_files_and_functions_are_short() -> None:
    assert len(FILES) > 100
    sources = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in FILES}
    found = [entry for name, source in sources.items() for entry in too_long(source, name)]
    assert not found, "expected files of at most 400 lines and functions of at most 60, found " + "; ".join(found)


@pytest.mark.parametrize(
    ("lines", "function_lines", "found"), [(3, 3, []), (2, 3, ["a.py: 3 lines"]), (3, 2, ["a.py:1 f: 3 lines"])]
)
def test_the_rule_counts_lines(lines: int, function_lines: int, found: list[str]) -> None:
    assert too_long("def f():\n    a = 1\n    return a\n", "a.py", lines=lines, function_lines=function_lines) == found


def test_a_docstring_is_not_counted() -> None:
    assert not too_long('def f():\n    """What.\n\n    Why.\n    """\n    return 1\n', "a.py", function_lines=2)
