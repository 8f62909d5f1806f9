"""Models by name: a directory here, or one fetched from huggingface.co."""

import re
from pathlib import Path

from specjax.models import hf, hf_config

# "owner/name" or "name", then perhaps "@revision"; what begins with "." or "/" is a path. No model
# there has "--" or ".." within its name or ".git" at its end.
_PART = r"\w(?:[\w.-]*\w)?"
_NAME = re.compile(
    rf"(?![^@]*(?:--|\.\.|\.git(?:@|$)))(?P<model>(?:{_PART}/)?{_PART})"
    r"(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
_FILES = ("*.json", "*.jinja", "*.safetensors")
# Exports to other formats lie in directories; consolidated* are the same weights again.
_IGNORED = ("*/*", "consolidated*")


def resolve(name: str | Path) -> Path:
    """The directory that a name means, fetched where it is a model of huggingface.co.

    What is a directory here is never looked up there. A complete snapshot in the cache needs no
    network.

    Args:
        name: a directory, in which ~ is expanded, or "owner/name", "name", or either with
            "@revision" added.

    Raises:
        ValueError: no directory and not a model's name; or such a name and no package
            huggingface-hub, no network, no such model or revision, no access to it, or no
            weights of a kind that is read.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~somebody whom the machine does not know
        raise ValueError(f"{name} has no home directory ({error}); need a directory.") from error
    try:
        return hf.readable(path)
    except ValueError:
        found = _NAME.fullmatch(str(name))
        if found is None or path.exists():
            raise
    return _fetch(found["model"], found["revision"])


def _fetch(model: str, revision: str | None) -> Path:
    named = model if revision is None else f"{model} at revision {revision}"
    by_hand = (
        f"{hf_config.CONFIG}, {hf_config.GENERATION}, tokenizer.json, tokenizer_config.json, "
        "model*.safetensors and their index, if any, from "
        f"https://huggingface.co/{model} into a directory and give that directory."
    )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"{model} is not a directory, and fetching it needs huggingface-hub; "
            f"pip install 'specjax[hub]', or download {by_hand}"
        ) from error

    def snapshot(local: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(_FILES),
                ignore_patterns=list(_IGNORED),
                local_files_only=local,
            )
        )

    try:
        cached = snapshot(local=True)
    except Exception:  # whatever is wrong with the cache, fetching repairs or explains
        cached = None
    if cached is not None and _is_model(cached) and (cached / "tokenizer.json").is_file():
        return cached
    try:
        fetched = snapshot(local=False)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{named} is gated on huggingface.co; accept its terms there and log in with "
            f"`hf auth login` or set HF_TOKEN, or download {by_hand}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{model} is neither a directory nor a public model of huggingface.co; need one of "
            f"them, or HF_TOKEN for a private one, or download {by_hand}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{model} has no revision {revision or 'main'} on huggingface.co; need a branch, tag "
            f"or commit, or download {by_hand}"
        ) from error
    except Exception as error:  # of the HTTP library, which differs by version, or of the disk
        if cached is not None and _is_model(cached):
            return cached
        raise ValueError(
            f"{named} is not a directory, and fetching it from huggingface.co failed "
            f"({_cause(error)}); need a connection, or download {by_hand}"
        ) from error
    if not _is_model(fetched):  # without a connection the library returns whatever is cached
        raise ValueError(
            f"{named} came from huggingface.co without {hf_config.CONFIG} or safetensors, see "
            f"{fetched}; need a model that has both there and a connection, or download {by_hand}"
        )
    return fetched


def _is_model(directory: Path) -> bool:
    """Whether a snapshot has a config and weights: other programs cache parts of a model."""
    if not (directory / hf_config.CONFIG).is_file():
        return False
    if any((directory / heads).is_file() for heads in hf.HEADS):
        return True
    try:
        hf.weight_files(directory)
    except ValueError:
        return False
    return True


def _cause(error: Exception) -> str:
    """The first line of what went wrong, underneath the library's own advice."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return ": ".join([type(cause).__name__, *lines[:1]])
