"""Which device to use, and a word to those whose accelerator lies idle."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import jax

_NAME = re.compile(r"(cpu|gpu|cuda|tpu)(?::(\d+))?")
_PACKAGES = {"gpu": "jax[cuda13]", "tpu": "jax[tpu]"}
_GOOGLE = "0x1ae0"  # of PCI vendors


def choose(name: str) -> jax.Device | None:
    """A device by name, for `jax.default_device`.

    Args:
        name: "cpu", "gpu" or "tpu", of several the first or "gpu:1"; "cuda" is "gpu". "" leaves
            the choice to JAX.

    Returns:
        None for "", which is what `jax.default_device` takes for JAX's own choice.

    Raises:
        ValueError: no such name, or no such device here.
    """
    if not name:
        return None
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"device is {name!r}; need cpu, gpu or tpu, with a number as in gpu:1 where there are "
            'several, or "" for JAX\'s own choice.'
        )
    kind, number = match[1].replace("cuda", "gpu"), int(match[2] or 0)
    found = _local(kind)
    if number < len(found):
        return found[number]
    there = [f"{each}:{i}" for each in ("cpu", "gpu", "tpu") for i in range(len(_local(each)))]
    advice = ["choose one of these"] if there else []
    if not found and _platforms():
        advice.insert(0, f"unset JAX_PLATFORMS={_platforms()}")
    elif not found and kind in _PACKAGES:
        advice.insert(0, f"install {_PACKAGES[kind]}")
    raise ValueError(
        f"device is {name!r} but JAX finds {'only ' if there else 'none'}{', '.join(there)}; "
        f"{' or '.join(advice)}."
    )


def platform() -> str:
    """Where what is run next will run: "cpu", "gpu" or "tpu"."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """One line where JAX runs on the CPU although there is a GPU or a TPU. Never raises.

    Args:
        root: of the file system in which devices are looked for.

    Returns:
        What is there and how to use it; None if nothing is or if JAX uses an accelerator.
    """
    try:
        there = _accelerator(root)
        if there is None or jax.default_backend() != "cpu":
            return None
    except Exception:  # a hint is not worth an error; JAX tells of its own where it matters
        return None
    name, extra, plugins = there
    if _platforms():
        how = f"JAX_PLATFORMS={_platforms()} hides it"
    elif any(find_spec(plugin) for plugin in plugins):
        how = f"JAX could not start it; python -c \"import jax; jax.devices('{extra}')\" says why"
    else:
        how = f"pip install 'specjax[{extra}]' to use it"
    return f"JAX uses the CPU although this machine has {name}: {how}."


def _platforms() -> str:
    """What JAX_PLATFORMS restricts JAX to; "" is nothing."""
    return getattr(jax.config, "jax_platforms", None) or ""


def _local(kind: str) -> list[jax.Device]:
    """Devices of this process; none where JAX has no such backend."""
    try:
        return jax.local_devices(backend=kind)
    except (RuntimeError, AssertionError):  # the latter where JAX_PLATFORMS names none that is here
        return []


def _accelerator(root: Path) -> tuple[str, str, tuple[str, ...]] | None:
    """Its name, the extra that installs what it needs, and modules that are there if it has."""
    if any(root.glob("dev/nvidia[0-9]*")) or any(root.glob("proc/driver/nvidia/gpus/*")):
        return "an NVIDIA GPU", "cuda", ("jax_cuda12_plugin", "jax_cuda13_plugin")
    # Other accelerators have such files too, and other devices of Google's machines its number.
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        vendors = root.glob("sys/bus/pci/devices/*/vendor")
        if any(map(_is_tpu, os.environ)) or any(_read(vendor) == _GOOGLE for vendor in vendors):
            return "a TPU", "tpu", ("libtpu",)
    return None


def _is_tpu(variable: str) -> bool:
    return variable.startswith("TPU_")


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
