"""What every script shares: one config flag, and mistakes answered in one line."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from specjax import help


def run(main: Callable[[ConfigDict], None], config: str | None = None) -> None:
    """Calls `main` with the config of `--config=FILE` and its overrides, `--config.name=value`.

    What the user got wrong, a `ValueError` or `OSError` of `main` included, ends the process with
    status 1 and one line on stderr; `--verbosity=1` shows the traceback too. `--help` says what the
    script does and what the config has.

    Args:
        main: of a script that lies one directory below the repository's root.
        config: the default file, relative to that root; None if one must be given.
    """
    logging.set_verbosity(logging.WARNING)  # a default: --verbosity overrides it
    script = Path(inspect.getfile(main)).resolve()
    root = script.parent.parent
    # Configs import each other as the root sees them, and decode/profile.py must not stand in for
    # the standard library's profile.
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p).resolve() != script.parent)]
    default = None if config is None else str(root / config)
    if help.wanted(sys.argv[1:]):  # before overrides are looked at: some may be wrong
        print(help.text(main, root, default, sys.argv[1:]))
        sys.exit()
    try:  # with a default, overrides are looked at here already
        flag = config_flags.DEFINE_config_file("config", default, "A Python file's get_config().")
    except Exception as error:  # a config is a program: it may raise anything
        _fail(_readable(error))

    def parse(argv: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(argv)
            if len(left) > 1:
                raise ValueError(f"Unexpected argument {left[1]!r}; need --config.name=value.")
            if flag.value is None:
                raise ValueError("No config was given; need --config=FILE.")
            flag.value.get("")  # a file that could not be read raises only when looked into
        except Exception as error:
            _fail(_readable(error))
        return left

    def guarded(argv: list[str]) -> None:
        del argv
        try:
            main(flag.value)
        except (ValueError, OSError) as error:
            _fail(error)
        except KeyboardInterrupt:
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def progress(console: Console | None = None) -> Progress:
    """Bars of long work: how much is done, time passed and left, what is going on."""
    columns: tuple[ProgressColumn, ...] = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console)


def table(header: list[str], rows: list[list[str]], console: Console, title: str) -> list[str]:
    """Prints a table; returns it in Markdown."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _readable(error: Exception) -> Exception:
    if not isinstance(error, (AttributeError, KeyError)):
        return error
    while error.args and isinstance(error.args[0], Exception):  # each wraps the next
        error = error.args[0]
    return ValueError(f"The config has no entry {error.args[0] if error.args else error}.")


def _fail(error: Exception) -> NoReturn:
    if logging.level_debug():
        raise error
    sys.exit("error: " + " ".join(str(error).split()))
