"""Devices by name, and the hint where an accelerator lies idle, on file systems made up for it."""

import os
from pathlib import Path

import jax
import pytest

from specjax import devices


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment of a TPU's host, no restriction, no plugin."""
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "_platforms", lambda: "")
    monkeypatch.setattr(devices, "find_spec", lambda _: None)


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("0x1ae0\n" if file.endswith("vendor") else "")
    return root


def test_choose() -> None:
    assert devices.choose("") is None
    assert devices.choose("cpu") == devices.choose("cpu:0") == jax.devices("cpu")[0]
    with jax.default_device(devices.choose("cpu")):
        assert jax.numpy.zeros(1).devices() == {jax.devices("cpu")[0]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", r"device is 'gpu' but JAX finds only cpu:0.*; install jax\[cuda13\] or choose one"),
        ("cuda:1", r"device is 'cuda:1' but JAX finds only cpu:0.*; install jax\[cuda13\] or"),
        ("tpu", r"install jax\[tpu\]"),
        ("cpu:99", r"device is 'cpu:99' but JAX finds only cpu:0(, cpu:\d+)*; choose one of these"),
        ("CPU", "device is 'CPU'; need cpu, gpu or tpu"),
        ("gpu:-1", "device is 'gpu:-1'; need cpu, gpu or tpu"),
    ],
)
def test_choose_refuses(alone: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        devices.choose(name)
    assert "\n" not in str(raised.value)


def test_choose_tells_what_hides_a_device() -> None:
    with pytest.raises(ValueError, match="unset JAX_PLATFORMS=cpu or choose one of these"):
        devices.choose("gpu")


def test_choose_where_jax_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(devices, "_platforms", lambda: "cuda")
    with pytest.raises(ValueError, match=r"JAX finds none; unset JAX_PLATFORMS=cuda\.$"):
        devices.choose("cpu")


def test_choose_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cpu": ["c0"], "gpu": ["g0", "g1"], "tpu": []}
    monkeypatch.setattr(devices, "_local", there.__getitem__)
    assert devices.choose("gpu") == devices.choose("cuda") == "g0"
    assert devices.choose("gpu:1") == devices.choose("cuda:1") == "g1"
    with pytest.raises(ValueError, match="only cpu:0, gpu:0, gpu:1; choose one of these"):
        devices.choose("gpu:2")


@pytest.mark.parametrize(
    ("files", "extra"),
    [
        (["dev/nvidia0"], "cuda"),
        (["proc/driver/nvidia/gpus/0000:01:00.0/information"], "cuda"),
        (["dev/accel0", "sys/bus/pci/devices/0000:00:04.0/vendor"], "tpu"),
        (["dev/vfio/0", "sys/bus/pci/devices/0000:00:04.0/vendor"], "tpu"),
    ],
)
def test_unused_accelerator(alone: None, tmp_path: Path, files: list[str], extra: str) -> None:
    hint = devices.unused_accelerator(touch(tmp_path, *files))
    assert hint is not None
    assert f"pip install 'specjax[{extra}]'" in hint
    assert "\n" not in hint


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["dev/nvidiactl", "dev/null"],
        ["dev/accel/accel0", "dev/vfio/vfio"],  # another's
        ["sys/bus/pci/devices/0000:00:04.0/vendor"],  # a network card of Google's
    ],
)
def test_no_accelerator(alone: None, tmp_path: Path, files: list[str]) -> None:
    assert devices.unused_accelerator(touch(tmp_path, *files)) is None


def test_tpu_by_environment(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert devices.unused_accelerator(tmp_path) is None  # the variable alone
    hint = devices.unused_accelerator(touch(tmp_path, "dev/vfio/0"))
    assert hint is not None
    assert "a TPU" in hint


def test_hint_tells_why(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "dev/nvidia0")
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    assert "jax.devices('cuda')" in (devices.unused_accelerator(tmp_path) or "")
    monkeypatch.setattr(devices, "_platforms", lambda: "cpu")
    assert "JAX_PLATFORMS=cpu hides it" in (devices.unused_accelerator(tmp_path) or "")


def test_no_hint_where_an_accelerator_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.unused_accelerator(touch(tmp_path, "dev/nvidia0")) is None


def test_no_hint_raises(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(jax, "default_backend", fail)
    assert devices.unused_accelerator(touch(tmp_path, "dev/nvidia0")) is None
    # A vendor that cannot be read is no vendor.
    (tmp_path / "sys/bus/pci/devices/0000:00:04.0/vendor").mkdir(parents=True)
    (tmp_path / "dev/nvidia0").unlink()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert devices.unused_accelerator(touch(tmp_path, "dev/vfio/0")) is None
