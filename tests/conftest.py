"""Settings of every test: the CPU, full precision, and a compiler that does not try hard."""

import os

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
# Half the compile time, which is most of the time here. LLVM's effort only: XLA's own passes, on
# which the laws about copies depend, stay as they are. Read when the backend starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): tests that share compiled programs")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> None:
    """About a hundred live programs exhaust the memory that LLVM reserves for code."""
    jax.clear_caches()
