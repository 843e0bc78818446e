"""`engram-interp`: the command line. Every command is a thin call into the library; nothing heavy is imported for `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro

from engram_interp.cli import reading, studying, training  # their commands join `app` when imported
from engram_interp.cli.output import app

__all__ = ["main", "reading", "studying", "training"]


def _group(name: str) -> dict[str, Callable[..., int]]:
    """The actions of a command that has several."""
    if name == "memory":
        from engram_interp.probes import memory_commands as actions
    else:
        from engram_interp.runs import commands as actions
    return {key.removeprefix("run_"): value for key, value in vars(actions).items() if key.startswith("run_")}


def _dispatch() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ("memory", "runs"):
        return app.cli(prog="engram-interp", description=__doc__)
    return tyro.extras.subcommand_cli_from_dict(_group(name), prog=f"engram-interp {name}", args=sys.argv[2:])


def main() -> None:
    """Run a command; what a user can mend is one line on standard error and exit code 2."""
    try:
        sys.exit(_dispatch())
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, KeyError, ArithmeticError, NotImplementedError) as error:
        if os.environ.get("ENGRAM_INTERP_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"engram-interp: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("engram-interp: interrupted", file=sys.stderr)
        sys.exit(130)
