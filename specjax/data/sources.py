"""Text documents: the standard library's own source, or files of the user's."""

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text and the name it is known by (a posix path relative to its source)."""

    name: str
    text: str


# Directories and files that are not hand-written library code of every installation.
_EXCLUDED = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib-dynload",
    "config-*",
    "_sysconfigdata*",
    "__pycache__",
)

# Single-file modules in each of Python 3.11 to 3.14, with no near copy elsewhere in the library.
HELD_OUT: tuple[str, ...] = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "fileinput.py",
    "fractions.py",
    "ftplib.py",
    "graphlib.py",
    "heapq.py",
    "imaplib.py",
    "mimetypes.py",
    "plistlib.py",
    "pprint.py",
    "queue.py",
    "random.py",
    "sched.py",
    "shlex.py",
    "statistics.py",
    "tempfile.py",
    "textwrap.py",
    "timeit.py",
)


def _excluded(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in _EXCLUDED)


def standard_library() -> list[Document]:
    """The running interpreter's own .py source, sorted by name.

    Tests, generated tables and installed packages are left out, as are files that do not decode.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if _excluded(name):
            continue
        try:
            with tokenize.open(root / name) as file:
                documents.append(Document(name, file.read()))
        except (SyntaxError, UnicodeDecodeError):
            continue
    return documents


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out): a document is held out when its name is in `HELD_OUT`."""
    held_out = frozenset(HELD_OUT)
    training = [document for document in documents if document.name not in held_out]
    return training, [document for document in documents if document.name in held_out]


def text_files(paths: Sequence[str]) -> list[Document]:
    """UTF-8 files, given by path, or all those below a directory, sorted by name in each.

    Below a directory, hidden files and files that are not UTF-8 are passed over.

    Raises:
      ValueError: a path does not exist, a file named by itself is not UTF-8, or no text was found.
    """
    documents = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            documents += _directory(path)
        elif path.is_file():
            try:
                documents.append(Document(path.name, path.read_bytes().decode()))
            except UnicodeDecodeError as error:
                raise ValueError(f"{given} is not UTF-8; need a UTF-8 text file") from error
        else:
            raise ValueError(f"{given} does not exist; need a text file or a directory of them")
    if not any(document.text for document in documents):
        raise ValueError(
            f"no text in {list(paths)}; need at least one UTF-8 file that is not empty"
        )
    return documents


def _directory(root: Path) -> list[Document]:
    documents = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*")):
        if any(part.startswith(".") for part in name.split("/")) or not (root / name).is_file():
            continue
        try:
            documents.append(Document(name, (root / name).read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return documents


def describe(documents: Sequence[Document]) -> dict[str, Any]:
    """What a recipe records of its text: Python version, files, UTF-8 bytes, SHA-256 of it all."""
    digest = hashlib.sha256()
    num_bytes = 0
    for name, text in documents:
        encoded = text.encode()
        num_bytes += len(encoded)
        # The length keeps two different divisions of the same bytes apart.
        digest.update(f"{name}\0{len(encoded)}\0".encode())
        digest.update(encoded)
    return {
        "python": platform.python_version(),
        "num_files": len(documents),
        "num_bytes": num_bytes,
        "sha256": digest.hexdigest(),
    }
