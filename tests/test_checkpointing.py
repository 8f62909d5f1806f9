"""What a run leaves on disk is whole whenever it is killed and whatever the disk refuses."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpointing
from specjax.checkpointing import checkpoints
from specjax.types import PyTree

# Its processes are started once, not by every worker.
pytestmark = pytest.mark.xdist_group("checkpointing")

_SIZE = 4096


def _first() -> PyTree:
    params = {"layers_0": {"w": jnp.arange(_SIZE, dtype=jnp.uint32)}}
    return {"params": params, "opt_state": (None, {"mu": jnp.zeros(3)}), "step": jnp.int32(0)}


def _advance(state: PyTree) -> PyTree:
    """A congruential generator: each step changes every bit, and numpy can repeat it exactly."""
    params = jax.tree.map(lambda w: w * 1664525 + 1013904223, state["params"])
    return {**state, "params": params, "step": state["step"] + 1}


def _weights(step: int) -> np.ndarray:
    w = np.arange(_SIZE, dtype=np.uint32)
    for _ in range(step):
        w = w * np.uint32(1664525) + np.uint32(1013904223)
    return w


def _check(state: PyTree, step: int) -> None:
    np.testing.assert_array_equal(state["params"]["layers_0"]["w"], _weights(step))
    assert int(state["step"]) == step


# ------------------------------------------------------- run in processes of their own, see below


def _train(directory: Path, num_steps: int, saved: Callable[[int], None]) -> int:
    """Resumes, checks all that it finds, and goes on; returns the step it resumed from."""
    kept = checkpoints(directory, keep=2)
    state, last = _first(), kept.latest() or 0
    if last:
        state, data_state = kept.restore(last, state)
        assert data_state == {"position": 3 * last}
    _check(state, last)
    best = kept.best(state["params"])
    assert best or not last
    if best:
        np.testing.assert_array_equal(best[1]["layers_0"]["w"], _weights(best[0]))
        assert best[2] == best[0] / 3
        assert best[0] >= last  # every step's were the best, and kept before its state was
    records = checkpointing.read(directory / "metrics.jsonl", last)
    assert [record["step"] for record in records] == list(range(1, last + 1))
    log = checkpointing.metrics_log(directory / "metrics.jsonl")
    advance = jax.jit(_advance, donate_argnums=0)
    for step in range(last + 1, last + 1 + num_steps):
        state = advance(state)
        log.append({"step": step, "loss": 1 / step})
        kept.keep_best(step, state["params"], step / 3)
        kept.save(step, state, {"position": 3 * step})
        saved(step)
    kept.close()
    return last


def _forked(function: Callable[[], None]) -> int:
    """A process that shares this one's imports, which take longer than all that it does."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _killed(directory: Path, num_kills: int) -> None:
    """Kills a run again and again, each time at another moment of its saves."""
    moment, half_written = random.Random(0), 0
    for _ in range(num_kills):
        reading, writing = os.pipe()

        def saved(step: int, pipe: int = writing) -> None:
            os.write(pipe, b".")

        pid = _forked(lambda saved=saved: _train(directory, 1000, saved))
        os.close(writing)
        for _ in range(moment.randint(1, 4)):
            assert os.read(reading, 1), "the run ended by itself"
        time.sleep(moment.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        half_written += any("tmp" in path.name for path in directory.glob("[0-9]*"))
    assert os.waitpid(_forked(lambda: _train(directory, 1, lambda step: None)), 0)[1] == 0
    paths = [*directory.glob("[0-9]*"), *directory.glob("best/*")]
    step = max(int(path.name) for path in directory.glob("[0-9]*"))
    found = {"half_written": half_written, "step": step, "left": [path.name for path in paths]}
    print(json.dumps(("killed", found)))


def _told(*attempts: Callable[[], object]) -> str:
    """The line raised by the first attempt that raises one."""
    try:
        for attempt in attempts:
            attempt()
    except OSError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _refused(directory: Path, num_bytes: int) -> None:
    """Runs into a disk that takes no file longer than `num_bytes`, and out of it again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, as a full disk is
    state = _first()
    states = [state := _advance(state) for _ in range(4)]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = checkpoints(directory, keep=1)
    kept.save(1, states[0], {})
    kept.keep_best(1, states[0]["params"], 0.1)
    kept.close()

    kept, lines = checkpoints(directory, keep=1), []
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, unlimited[1]))
    # Refused in the background, told at the next call; then told at once, by `close`.
    for attempts in (
        (lambda: kept.save(2, states[1], {}), lambda: kept.save(3, states[2], {})),
        (lambda: kept.keep_best(2, states[1]["params"], 0.2), lambda: kept.best(state["params"])),
        (lambda: kept.save(3, states[2], {}), lambda: kept.close()),
    ):
        lines.append(_told(*attempts))
    kept.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    kept = checkpoints(directory, keep=1)
    assert kept.latest() == 1
    _check(kept.restore(1, state)[0], 1)
    found = kept.best(state["params"])
    assert found is not None
    assert (found[0], found[2]) == (1, 0.1)
    np.testing.assert_array_equal(found[1]["layers_0"]["w"], _weights(1))

    # The same object goes on once the disk has room again.
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, unlimited[1]))
    attempts = [lambda i=i: kept.save(i, states[i - 1], {}) for i in (2, 3)]
    assert "Saving step 2 failed" in _told(*attempts)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    kept.save(4, states[3], {})
    assert kept.keep_best(4, states[3]["params"], 0.3)
    kept.close()
    assert kept.latest() == 4
    _check(checkpoints(directory, keep=1).restore(4, state)[0], 4)
    print(json.dumps((str(num_bytes), (str(directory), lines))))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the runs in processes of their own have found, by `_main`."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path_factory.mktemp("runs"))],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ERROR:absl" not in done.stderr  # told by the exceptions already
    return dict(map(json.loads, done.stdout.splitlines()))


def test_a_run_killed_at_any_moment_resumes_from_a_whole_checkpoint(found: dict) -> None:
    killed = found["killed"]
    assert killed["half_written"] > 0  # or the kills have tested nothing
    assert killed["step"] >= 5
    assert not any("tmp" in name for name in killed["left"])
    assert len(killed["left"]) == 3  # two states and one set of parameters


@pytest.mark.parametrize("num_bytes", ["0", "9000"])
def test_a_disk_that_refuses_loses_nothing_and_is_told_in_one_line(
    found: dict, num_bytes: str
) -> None:
    path, lines = found[num_bytes]
    assert lines == [
        f"Saving step 2 failed (File too large); the last good checkpoint is step 1 in {path}.",
        "Saving the best parameters of step 2 failed (File too large); the last good checkpoint is "
        f"step 1 in {path}.",
        f"Saving step 3 failed (File too large); the last good checkpoint is step 1 in {path}.",
    ]


# ------------------------------------------------------------------------------- in this process


def test_keeps_the_newest_states_and_the_best_parameters(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, keep=2)
    assert kept.latest() is None
    assert kept.best({}) is None
    scores = {1: 0.5, 2: float("nan"), 3: 0.7, 4: 0.7, 5: 0.6}
    better = {}
    for step, score in scores.items():
        better[step] = kept.keep_best(step, {"w": jnp.full(3, step)}, score)
        kept.save(step, {"w": jnp.full(3, step)}, {"position": step})
        # The best parameters are whole before the state is, from which a run might resume.
        assert any(path.name == str(sum(better.values())) for path in (tmp_path / "best").iterdir())
    assert better == {1: True, 2: False, 3: True, 4: False, 5: False}
    kept.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "best"]
    assert len(list((tmp_path / "best").iterdir())) == 1

    # A run that resumes from step 4 comes by step 5 again, a changed one with another score.
    kept, like = checkpoints(tmp_path, keep=2), {"w": jnp.zeros(3, jnp.int32)}
    assert kept.restore(4, like)[1] == {"position": 4}
    assert not kept.keep_best(3, like, 0.7)
    assert kept.keep_best(3, {"w": jnp.full(3, 33)}, 0.8)
    step, params, score = kept.best(like)
    assert (step, score, params["w"].tolist()) == (3, 0.8, [33, 33, 33])
    kept.close()
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 checkpoints are to be kept; need 1 or more"):
        checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a cannot keep checkpoints \(Not a directory"):
        checkpoints(tmp_path / "file" / "a", keep=1)

    kept = checkpoints(tmp_path / "run", keep=1)
    kept.save(1, {"params": {"w": jnp.zeros((2, 3))}, "step": jnp.int32(1)}, {})
    kept.close()
    step = jax.ShapeDtypeStruct((), jnp.int32)
    for params, message in (
        ({"w": jnp.zeros((3, 3))}, r"float32\[2, 3\] as params.w but this run has float32\[3, 3\]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"but this run has bfloat16\[2, 3\]"),
        ({}, r"holds float32\[2, 3\] as params.w but this run has nothing"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            kept.restore(1, {"params": params, "step": step})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"run has no checkpoint 2; it has \[1\]"):
        kept.restore(2, {})

    # A directory that is gone in the middle of a run.
    gone = tmp_path / "run"
    gone.rename(tmp_path / "away")
    gone.write_text("")
    with pytest.raises(OSError, match=r"Saving step 2 failed .*no good checkpoint in .*run"):
        kept.save(2, {"w": jnp.zeros(3)}, {})


def test_the_curve_continues_at_the_step_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert checkpointing.read(path, 0) == []
    log = checkpointing.metrics_log(path)
    records = [{"step": i, "loss": np.float32(1 / i), "name": "a"} for i in range(1, 5)]
    for record in records:
        log.append(record)
    assert len(path.read_text().splitlines()) == 4  # before it is closed
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert checkpointing.read(path) == json.loads(json.dumps(records, default=float))
    assert path.read_text().endswith('"a"}\n')
    assert [r["step"] for r in checkpointing.read(path, 2)] == [1, 2]
    log = checkpointing.metrics_log(path)
    log.append({"step": 3})
    log.close()
    assert [r["step"] for r in checkpointing.read(path, 9)] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics.jsonl is no record"):
        checkpointing.read(path)
    with pytest.raises(OSError, match=r"Writing /dev/full failed \(No space left on"):
        checkpointing.metrics_log("/dev/full").append({"step": 1})


def test_tensorboard_gets_the_numbers_or_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="needs the package tensorboardX"):
        checkpointing.tensorboard(tmp_path)

    written = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            assert directory == str(tmp_path)
            self.flush = self.close = lambda: None

        def add_scalar(self, *scalar: object) -> None:
            written.append(scalar)

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    log = checkpointing.tensorboard(tmp_path)
    log.append({"step": 7, "loss": 0.5, "name": "a", "lengths": [1, 2]})
    log.close()
    assert written == [("loss", 0.5, 7)]


def _main(directory: Path) -> None:
    _killed(directory / "killed", num_kills=4)
    for num_bytes in (0, 9000):
        pid = _forked(lambda n=num_bytes: _refused(directory / str(n), n))
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
