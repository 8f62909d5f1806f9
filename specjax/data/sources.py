"""Text documents: the standard library's own source, files of the user's, or a public data set."""

import hashlib
import itertools
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


def split(
    documents: Sequence[Document], fraction: float = 0.02, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held out), by the first rule that holds anything out:

    1. Documents named in `HELD_OUT`: the standard library's.
    2. Of many documents the `fraction` whose texts hash lowest, so that equal texts stay together
       and a document's side hardly depends on which others there are.
    3. Of few documents, where that would be less than one, the last `fraction` of each, from a
       line's start.

    Args:
      documents: any.
      fraction: of the text to hold out.
      seed: of the hash.

    Raises:
      ValueError: `fraction` is not between 0 and 1, or the text is too short to divide.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; need one between 0 and 1.")
    named = frozenset(HELD_OUT)
    count = int(fraction * len(documents))
    if any(document.name in named for document in documents):
        training, held_out = _divide(documents, [document.name in named for document in documents])
    elif count:
        hashes = [
            hashlib.sha256(f"{seed}\0{document.text}".encode()).digest() for document in documents
        ]
        last = sorted(hashes)[count - 1]
        training, held_out = _divide(documents, [digest <= last for digest in hashes])
    else:
        training, held_out = _tails(documents, fraction)
    if not any(d.text for d in training) or not any(d.text for d in held_out):
        raise ValueError(
            f"{len(documents)} documents leave {len(training)} to train on and {len(held_out)} for "
            "validation; need more text."
        )
    return training, held_out


def _tails(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    training, held_out = [], []
    for name, text in documents:
        wanted = int((1 - fraction) * len(text))
        # The line that crosses the border, unless it is longer than all that is to be held out.
        at = text.rfind("\n", max(0, 2 * wanted - len(text)), wanted) + 1 or wanted
        training.append(Document(name, text[:at]))
        held_out.append(Document(f"{name} (end)", text[at:]))
    return [d for d in training if d.text], [d for d in held_out if d.text]


def _divide(
    documents: Sequence[Document], held_out: Sequence[bool]
) -> tuple[list[Document], list[Document]]:
    pairs = list(zip(documents, held_out, strict=True))
    return [document for document, out in pairs if not out], [d for d, out in pairs if out]


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


def dataset(
    name: str, split: str = "train", field: str = "text", config: str = "", num_documents: int = 0
) -> list[Document]:
    """Documents of a public data set, by its name, through the optional library `datasets`.

    Args:
      name: on the Hugging Face Hub, or a directory that the library can read.
      split: of the data set.
      field: of each record, the one that holds the text.
      config: which of the data set's versions, where it has several.
      num_documents: read only so many, without fetching the others; 0 is all.

    Raises:
      ValueError: the library is missing, the data set cannot be reached or read, or has no text.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Data set {name} needs the library datasets; pip install datasets, or name local text "
            "files in config.sources."
        ) from error
    documents, textless = [], ""
    try:
        records = datasets.load_dataset(
            name, config or None, split=split, streaming=num_documents > 0
        )
        for i, record in enumerate(itertools.islice(records, num_documents or None)):
            if not isinstance(text := record.get(field), str):
                textless = f"record {i} has {', '.join(record)} but no text in {field!r}"
                break
            documents.append(Document(f"{name}/{split}/{i}", text))
    # What it raises without a network differs by version and by the client below it.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"Data set {name} ({split}) cannot be read: {reason}; need internet the first time, or "
            "local text files in config.sources."
        ) from error
    if textless:
        raise ValueError(f"Data set {name} ({split}): {textless}; choose another field.")
    if not any(document.text for document in documents):
        raise ValueError(f"Data set {name} ({split}) has no text in {len(documents)} records.")
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
