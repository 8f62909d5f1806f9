"""The text of `--help`: what a script does, and every entry of its config with what it is for.

What entries are for stands in comments of the config's source and of the configs it builds on. They
are read from there; an entry without a comment is listed without.
"""

import ast
import io
import runpy
import shlex
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

_ASKED = {"--help", "-help", "--h", "-h", "--helpshort", "-helpshort", "--?", "-?"}
_Row = tuple[str, str]  # an option, and what there is to say about it


class _Item(NamedTuple):
    """An entry where it is assigned."""

    name: str
    first: int  # line
    last: int
    apart: bool  # by a statement of its own, not as a part of a dict


def wanted(arguments: Sequence[str]) -> bool:
    """Whether these arguments of a script ask for help, whatever else they say."""
    return not _ASKED.isdisjoint(_options(arguments))


def text(main: Callable, root: Path, config: str | None, arguments: Sequence[str]) -> str:
    """What `--help` prints, at most as wide as the terminal but for the script's own words.

    Args:
        main: the script's.
        root: where `configs` is imported from.
        config: the default file; None if one must be given.
        arguments: the script's, of which only `--config=FILE` matters here.
    """
    width = max(min(shutil.get_terminal_size().columns, 100), 40)
    script = sys.modules[main.__module__]
    others = [("--config=FILE", "a Python file with get_config()")]
    others.append(("--verbosity=1", "shows the traceback of a mistake"))
    for flag in flags.FLAGS.get_flags_for_module(script):
        is_switch = flag.boolean and not flag.value
        option = f"--{flag.name}" if is_switch else f"--{flag.name}={_shown(flag.value)}"
        others.append((option, " ".join((flag.help or "").split())))
    others.append(("--help", "this text; --helpfull lists the flags of every module"))
    parts = [
        (script.__doc__ or "").strip("\n"),
        _described(_given(arguments) or config, root, width),
        "Other flags\n" + _table(others, width),
    ]
    return "\n\n".join(part for part in parts if part)


def comments(file: Path, root: Path) -> dict[str, str]:
    """What the source of a config says about its entries.

    Args:
        file: of the config.
        root: where `configs` is imported from.

    Returns:
        By name, such as "seed" or "eval.every", the comments right above its assignment and beside
        it; those below too where they go on in lower case or in the same column. Entries of a
        config that this one builds on come first. What is assigned without a comment has "".
    """
    return _comments(file.resolve(), "get_config", root, set())


# ------------------------------------------------------------------------------------ what is shown


def _options(arguments: Sequence[str]) -> list[str]:
    """Those before "--"."""
    return list(arguments[: arguments.index("--")] if "--" in arguments else arguments)


def _given(arguments: Sequence[str]) -> str | None:
    """The file of `--config=FILE` or `--config FILE`; of several the last."""
    found = None
    for argument, following in pairwise([*_options(arguments), ""]):
        name, is_joined, value = argument.partition("=")
        if name in ("--config", "-config"):
            found = value if is_joined else following
    return found


def _described(config: str | None, root: Path, width: int) -> str:
    """The section of a config's entries."""
    if config is None:
        return "Options\n  Those of a config, which must be given: --config=FILE."
    name, _, argument = config.partition(":")
    path = Path(name).resolve()
    shown = path.relative_to(root) if path.is_relative_to(root) else name
    try:
        made = runpy.run_path(str(path))["get_config"](*([argument] if argument else []))
        table = _table(_entries(made, comments(path, root)), width)
    except Exception as error:  # a config is a program: it may raise anything, but help is wanted
        why = " ".join(f"None can be told: {type(error).__name__}: {error}".split())
        indent = "  "
        table = textwrap.fill(why, width, initial_indent=indent, subsequent_indent=indent)
    return f"Options ({shown})\n{table}"


def _entries(config: Any, notes: Mapping[str, str], within: str = "") -> Iterator[_Row]:
    """All entries in the source's order; within another those that it tells apart."""
    order = {name: i for i, name in enumerate(notes)}
    for key in sorted(config, key=lambda key: order.get(f"{within}{key}", len(order))):
        name, value = f"{within}{key}", config[key]
        is_mapping = isinstance(value, (ConfigDict, Mapping))
        note = notes.get(name, "")
        if is_mapping:
            keys = ", ".join(repr(each) if "," in str(each) else str(each) for each in value)
            note = (f"{note.rstrip('.')}: " if note else "") + f"{{{keys}}}"
        # Only names can be written in an override.
        if not within or (name in notes and name.replace(".", "_").isidentifier()):
            yield f"--config.{name}" + ("" if is_mapping else f"={_shown(value)}"), note
        if is_mapping:
            yield from _entries(value, notes, f"{name}.")


def _shown(value: object) -> str:
    """A value as a shell takes it, in one line."""
    lines = (value if isinstance(value, str) else " ".join(repr(value).split())).splitlines()
    shown = lines[0] + "..." * (len(lines) > 1) if lines else ""
    quoted = shlex.quote(shown)
    return quoted if quoted == shown or set(shown) & set('"$`\\!') else f'"{shown}"'


def _table(rows: Iterable[_Row], width: int) -> str:
    """Options in a column as wide as most of them need, and beside it what there is to say."""
    rows = [(textwrap.indent(_cut(option, width - 2), "  "), note) for option, note in rows]
    usual = [len(option) for option, _ in rows if len(option) <= width * 2 // 5]
    column = max(usual, default=2) + 2
    lines = []
    for option, note in rows:
        beside = textwrap.wrap(note, width - column, break_on_hyphens=False)
        if beside and len(option) + 2 <= column:
            option = option.ljust(column) + beside.pop(0)
        lines += [option, *(" " * column + line for line in beside)]
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


# ------------------------------------------------------------------------------ what a source says


def _comments(file: Path, function: str, root: Path, seen: set[tuple[Path, str]]) -> dict[str, str]:
    """As `comments`, of any function that returns a config."""
    if (file, function) in seen:
        return {}
    seen.add((file, function))
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes = [
        node
        for statement in tree.body
        if isinstance(statement, ast.FunctionDef) and statement.name == function
        for node in ast.walk(statement)
    ]
    returned = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
    configs = {value.id for value in returned if isinstance(value, ast.Name)}

    # What it builds on: whatever function its variable comes from, or what it returns at once.
    found: dict[str, str] = {}
    imported = _imported(tree, root)
    made = [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign) and any(_name(t, configs) == "" for t in node.targets)
    ]
    for call in (node for value in (*made, *returned) for node in ast.walk(value)):
        if isinstance(call, ast.Call):
            called = ast.unparse(call.func)
            module, _, name = called.rpartition(".")
            if called in imported:
                found |= _comments(*imported[called], root, seen)
            elif module in imported:
                found |= _comments(imported[module][0], name, root, seen)
            elif not module:
                found |= _comments(file, name, root, seen)

    beside, above = _lines(source)
    for item in sorted(_assigned(nodes, configs), key=lambda item: item.first):
        said = [*above.get(item.first, []), beside.get(item.first) or beside.get(item.last) or ""]
        if note := " ".join(part for part in said if part):
            found[item.name] = note
        elif item.apart:  # what was said where it was assigned before still holds
            found.setdefault(item.name, "")
    return found


def _lines(source: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Comments by line of code: those beside it, those above it."""
    code = io.StringIO(source).readlines()
    beside: dict[int, str] = {}
    columns: dict[int, int] = {}
    alone: dict[int, tuple[int, str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (line, column), said = token.start, token.string.lstrip("#:").strip()
            if code[line - 1][:column].strip():
                beside[line], columns[line] = said, column
            elif any(map(str.isalnum, said)):  # no ruler
                alone[line] = column, said
    for line, column in columns.items():
        below = line + 1
        while below in alone and (alone[below][0] == column or alone[below][1][0].islower()):
            beside[line] += " " + alone.pop(below)[1]
            below += 1
    above: dict[int, list[str]] = {}
    for line in sorted(alone):  # a block is handed down to the line that follows it
        above[line + 1] = [*above.pop(line, []), alone[line][1]]
    return beside, above


def _imported(tree: ast.Module, root: Path) -> dict[str, tuple[Path, str]]:
    """Files below the root by the names of their modules, and of what is imported from them."""

    def file(module: str) -> Path:
        return root.joinpath(*module.split(".")).with_suffix(".py")

    found: dict[str, tuple[Path, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (file(alias.name), "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                module = file(f"{node.module}.{alias.name}")
                of = (module, "") if module.is_file() else (file(node.module), alias.name)
                found[alias.asname or alias.name] = of
    return {name: of for name, of in found.items() if of[0].is_file()}


def _assigned(nodes: Iterable[ast.AST], configs: set[str]) -> Iterator[_Item]:
    """Entries `c.name = value` and `c.a.b = value`, of `update`, and in dicts written out."""
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (t for each in targets for t in getattr(each, "elts", [each])):
                if name := _name(target, configs):
                    apart = isinstance(target, ast.Attribute)  # c["a"] is likely one of many
                    yield _Item(name, node.lineno, node.end_lineno or node.lineno, apart)
                    inner = _within(name, node.value)  # a comment beside both is of the whole
                    yield from (item for item in inner if item.first > node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = _name(node.func.value, configs)
            if node.func.attr == "update" and name is not None:
                yield from (item._replace(apart=True) for item in _within(name, node))


def _within(name: str, value: ast.expr | None) -> Iterator[_Item]:
    """Entries of a dict that is written out: {"a": 1}, ConfigDict({"a": 1}), update(a=1)."""
    found: list[tuple[object, ast.expr | ast.keyword, ast.expr]] = []
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        found = [(k.value, k, v) for k, v in pairs if isinstance(k, ast.Constant)]
    elif isinstance(value, ast.Call) and ast.unparse(value.func).endswith(("Dict", "update")):
        found = [(k.arg, k, k.value) for k in value.keywords if k.arg]
        for argument in value.args:
            yield from _within(name, argument)
    for key, start, inner in found:
        path = f"{name}.{key}" if name else str(key)
        yield _Item(path, start.lineno, inner.end_lineno or start.lineno, apart=False)
        yield from (item for item in _within(path, inner) if item.first > start.lineno)


def _name(target: ast.expr, configs: set[str]) -> str | None:
    """What c.a.b and c["a"].b are of a config c: "a.b". The config itself is "", all else None."""
    if isinstance(target, ast.Name):
        return "" if target.id in configs else None
    if isinstance(target, ast.Attribute):
        key = target.attr
    elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        key = str(target.slice.value)
    else:
        return None
    within = _name(target.value, configs)
    return key if within == "" else within and f"{within}.{key}"
