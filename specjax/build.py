"""Objects from configs: a function is named by its dotted path, its arguments stand beside it.

build({"call": "specjax.drafters.grow.chain", "num_tokens": 5,
       "choose": {"call": "specjax.drafters.grow.best"}})
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

_MAPPINGS = (Mapping, ConfigDict)


def build(spec: Any, **given: Any) -> Any:
    """Builds what a config describes.

    A mapping with an entry `call` is that function's result for its other entries, built first.
    Text such as "@draft" stands for `given["draft"]`. Anything else stands for itself.

    Raises:
        ValueError: a function that does not exist or does not take these arguments, text that
            stands for nothing.
    """
    if isinstance(spec, str) and spec.startswith("@"):
        value = given.get(spec[1:])
        if value is None:
            raise ValueError(f"The config needs a {spec[1:]}, but none was given.")
        return value
    if not isinstance(spec, _MAPPINGS) or "call" not in spec:
        return spec
    named = function(spec["call"])
    arguments = {name: build(value, **given) for name, value in spec.items() if name != "call"}
    try:
        inspect.signature(named).bind(**arguments)
    except TypeError as error:
        takes = inspect.signature(named)
        raise ValueError(
            f"{spec['call']} is called with ({', '.join(arguments)}): {error}; it takes {takes}."
        ) from error
    return named(**arguments)


def mentions(spec: Any, name: str) -> bool:
    """Whether "@name" occurs in a spec."""
    if isinstance(spec, _MAPPINGS):
        return any(mentions(value, name) for value in spec.values())
    return spec == f"@{name}"


def function(path: str) -> Callable:
    """What a dotted path names.

    Raises:
        ValueError: it names nothing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} names no function ({error}); need package.module.function."
        ) from error
