"""What a refusal has to be: a ValueError of one line."""

from collections.abc import Callable
from typing import Any

import pytest


def refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)
