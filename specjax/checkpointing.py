"""Resumable training: states, the best parameters so far, and the curve of metrics.

All of it survives a kill at any moment and a disk that fills up: what `latest`, `best` and `read`
find is whole, and nothing that was whole is lost before its successor is.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import numbers
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from specjax.types import PyTree


class Checkpoints(NamedTuple):
    """What one run keeps in one directory, in the background. One process at a time may open it.

    A failure becomes one `OSError` line that names the step, the cause and what is still whole. It
    is raised by the call that meets it: a save that fails in the background, by the next one or by
    `close`. Afterwards all can go on; a later save tries again.

    Where both are due, `keep_best` comes before `save`: then no state is whole before they are.
    """

    save: Callable  # (step, state, data_state): both are read at once, the state may be donated
    latest: Callable  # () -> the newest whole step, None before the first
    restore: Callable  # (step, like_state) -> (state, data_state), placed as `like_state` is
    keep_best: Callable  # (step, params, score) -> is it better than all that were kept
    best: Callable  # (like_params) -> (step, params, score), None before the first
    close: Callable  # (): waits; says nothing of a failure that follows one already raised


class MetricsLog(NamedTuple):
    """A curve on disk."""

    append: Callable  # (record: a mapping of names to numbers, `step` among them)
    close: Callable  # ()


# ------------------------------------------------------------------------------------- checkpoints


def checkpoints(directory: str | Path, keep: int) -> Checkpoints:
    """Opens a directory: `<step>/` holds states, the last entry of `best/` the best parameters.

    States and parameters are trees of arrays, each array or `ShapeDtypeStruct` of a `like_state`
    saying where its twin is placed; `data_state` is a JSON-able dict. A score that does not exceed
    the one kept changes nothing, so saving a step once more after resuming does not either.

    Args:
        directory: is made where it does not exist; what a killed run left half-written or
            half-removed is removed.
        keep: how many states to keep, the newest.

    Raises:
        ValueError: `keep` is not positive; later, a step that is not there, or a state of other
            names, shapes or types than the one saved.
        OSError: the directory cannot be used; later, a failure as described above.
    """
    if keep < 1:
        raise ValueError(f"{keep} checkpoints are to be kept; need 1 or more.")
    directory = Path(directory).absolute()
    _let_failures_be_told_once()

    def failed(what: str, cause: str) -> str:
        last = states.latest()
        good = (
            "there is no good checkpoint"
            if last is None
            else f"the last good checkpoint is step {last}"
        )
        return f"Saving {what} failed ({cause}); {good} in {directory}."

    states = _series(directory, keep, "state", "data", failed)
    bests = _series(directory / "best", 1, "params", "about", failed)
    raised = False

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        nonlocal raised
        raised = True
        yield
        raised = False

    def save(step: int, state: PyTree, data_state: Mapping[str, Any]) -> None:
        with noted():
            bests.wait()  # a run that resumes here does not come by them again
            states.save(f"step {step}", step, state, dict(data_state))

    def keep_best(step: int, params: PyTree, score: float) -> bool:
        with noted():
            bests.wait()
            last = bests.latest()
            kept = -math.inf if last is None else bests.about(last)["score"]
            if not score > kept:
                return False
            # Numbered by themselves: a run may come by a step twice, with other parameters.
            about = {"step": int(step), "score": float(score)}
            number = 1 if last is None else last + 1
            bests.save(f"the best parameters of step {step}", number, params, about)
            return True

    def best(like_params: PyTree) -> tuple[int, PyTree, float] | None:
        with noted():
            bests.wait()
        last = bests.latest()
        if last is None:
            return None
        params, about = bests.restore(last, like_params)
        return about["step"], params, about["score"]

    def close() -> None:
        failures = []
        for series in (states, bests):
            try:
                series.close()
            except OSError as error:
                failures.append(error)
        if failures and not raised:
            raise failures[0]

    return Checkpoints(save, states.latest, states.restore, keep_best, best, close)


class _Series(NamedTuple):
    """Numbered entries of one directory, each a tree of arrays and a JSON-able dict."""

    save: Callable  # (what it is, number, tree, about)
    wait: Callable  # (): until the save under way is whole
    latest: Callable  # () -> the newest whole number, or None
    about: Callable  # (number) -> dict
    restore: Callable  # (number, like) -> (tree, about)
    close: Callable  # ()


def _series(
    directory: Path,
    keep: int,
    tree_name: str,
    about_name: str,
    failed: Callable[[str, str], str],
) -> _Series:
    """The newest `keep` entries; `failed(what, cause)` words what a save raises."""
    manager: ocp.CheckpointManager | None = None
    under_way = ""

    def opened() -> ocp.CheckpointManager:
        nonlocal manager
        if manager is None:
            manager = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    create=True,
                    cleanup_tmp_directories=True,
                    # Else writers wait minutes for directories that could not be made.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                item_handlers={
                    tree_name: ocp.StandardCheckpointHandler(),
                    about_name: ocp.JsonCheckpointHandler(),
                },
            )
        return manager

    @contextlib.contextmanager
    def saving(what: str) -> Iterator[None]:
        nonlocal manager
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise nearly anything
            # Having failed, a manager neither knows what is on disk nor forgets its errors.
            spoilt, manager = manager, None
            if spoilt is not None:
                with contextlib.suppress(Exception):
                    spoilt.close()
            raise OSError(failed(what, _cause(error))) from error

    @contextlib.contextmanager
    def reading(number: int) -> Iterator[None]:
        if number not in (there := _numbers(directory)):
            raise ValueError(f"{directory} has no checkpoint {number}; it has {there or 'none'}.")
        try:
            yield
        except Exception as error:
            raise OSError(f"Reading {directory / str(number)} failed ({_cause(error)}).") from error

    def wait() -> None:
        if manager is not None:
            with saving(under_way):
                manager.wait_until_finished()

    def save(what: str, number: int, tree: PyTree, about: dict) -> None:
        nonlocal under_way
        wait()
        under_way = what
        items = {
            tree_name: ocp.args.StandardSave(tree),
            about_name: ocp.args.JsonSave(about),
        }
        with saving(what):
            opened().save(number, args=ocp.args.Composite(**items))

    def latest() -> int | None:
        return max(_numbers(directory), default=None)

    def about(number: int) -> dict:
        with reading(number):
            items = {about_name: ocp.args.JsonRestore()}
            return opened().restore(number, args=ocp.args.Composite(**items))[about_name]

    def restore(number: int, like: PyTree) -> tuple[PyTree, dict]:
        with reading(number):
            stored = _leaves(opened().item_metadata(number)[tree_name].tree)
        _check_fit(directory / str(number), stored, _leaves(like))
        items = {
            tree_name: ocp.args.StandardRestore(like),
            about_name: ocp.args.JsonRestore(),
        }
        with reading(number):
            found = opened().restore(number, args=ocp.args.Composite(**items))
        return found[tree_name], found[about_name]

    def close() -> None:
        nonlocal manager
        if manager is not None:
            with saving(under_way):
                manager.close()
            manager = None

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in _numbers(directory)[:-keep]:  # a kill forestalled or cut short their removal
            shutil.rmtree(directory / str(number))
        opened()
    except Exception as error:
        raise OSError(f"{directory} cannot keep checkpoints ({_cause(error)}).") from error
    return _Series(save, wait, latest, about, restore, close)


def _numbers(directory: Path) -> list[int]:
    """The entries that are whole, ascending: Orbax names an entry so once all of it is written."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _leaves(tree: PyTree) -> dict[str, tuple]:
    """Shape and type of every array by its dotted name, as Orbax spells it."""

    def name(key: Any) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return {
        ".".join(map(name, path)): (tuple(x.shape), str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_fit(path: Path, stored: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(name), wanted.get(name)
        if there != here:
            words = [f"{x[1]}{list(x[0])}" if x else "nothing" for x in (there, here)]
            raise ValueError(
                f"{path} holds {words[0]} as {name} but this run has {words[1]}; continue with the "
                "configuration it was saved by, or in another directory."
            )


def _cause(error: BaseException) -> str:
    """The system's own words if they are somewhere in it, else the beginning of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    known = [os.strerror(number) for number in errno.errorcode if os.strerror(number) in text]
    return max(known, key=len, default=text[:200] or type(error).__name__)


@functools.cache
def _let_failures_be_told_once() -> None:
    """Orbax raises a failure, but its threads, its tasks and TensorStore print it, too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failure_of_orbax)
    printed = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # After its first failure Orbax closes the loop that writes still under way report to.
        if str(unraisable.exc_value) != "Event loop is closed":
            printed(unraisable)

    sys.unraisablehook = hook


def _is_no_failure_of_orbax(record: logging.LogRecord) -> bool:
    paths = [record.pathname]
    if record.exc_info and record.exc_info[2] is not None:
        paths += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    return record.levelno < logging.ERROR or not any("/orbax/" in path for path in paths)


# ----------------------------------------------------------------------------------------- metrics


def metrics_log(path: str | Path) -> MetricsLog:
    """Appends records to a file of JSON lines, each in a single write.

    Raises:
        OSError: the file cannot be opened; later, a record cannot be written.
    """
    # Unbuffered: no record waits in this process's memory.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(record: Mapping[str, Any]) -> None:
        line = json.dumps(dict(record), default=float).encode() + b"\n"
        try:
            written = os.write(file, line)
        except OSError as error:
            raise OSError(f"Writing {path} failed ({_cause(error)}).") from error
        if written != len(line):
            raise OSError(f"Writing {path} failed (a line was cut short).")

    return MetricsLog(append, lambda: os.close(file))


def read(path: str | Path, until_step: int | None = None) -> list[dict]:
    """The records of a log, which is cut to them: none after `until_step`, no torn last line.

    Args:
        path: of the log; nothing is read where it does not exist.
        until_step: the step to resume from; None keeps all records.

    Raises:
        ValueError: a line that is no record and not the last.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_bytes()
    *lines, torn = text.split(b"\n")  # what follows the last newline was being written
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no record: {_cause(error)}.") from error
    kept = [r for r in records if until_step is None or r["step"] <= until_step]
    if torn or len(kept) < len(records):
        whole = path.with_name(path.name + ".new")
        whole.write_text("".join(json.dumps(record) + "\n" for record in kept))
        whole.replace(path)
    return kept


def tensorboard(directory: str | Path) -> MetricsLog:
    """Writes the numbers of records, each having a `step`, for TensorBoard.

    Raises:
        ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "Writing for TensorBoard needs the package tensorboardX; install it or turn this off."
        ) from error
    writer = SummaryWriter(str(directory))

    def append(record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, numbers.Real):
                writer.add_scalar(name, float(value), int(record["step"]))
        writer.flush()

    return MetricsLog(append, writer.close)
