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
    Text such as "@draft" stands for `given["draft"]`. Of lists and tuples every entry is built.
    Anything else stands for itself.

    Raises:
        ValueError: a function that does not exist or does not take these arguments, text that
            stands for nothing or for something of another type than the function takes.
    """
    if _stands_for_given(spec):
        value = given.get(spec[1:])
        if value is None:
            raise ValueError(f"The config needs {spec}, but none was given.")
        return value
    if type(spec) in (list, tuple):  # named tuples are values
        return tuple(build(entry, **given) for entry in spec)
    if not isinstance(spec, _MAPPINGS) or "call" not in spec:
        return spec
    named = function(spec["call"])
    arguments = {name: build(value, **given) for name, value in spec.items() if name != "call"}
    takes = inspect.signature(named)
    try:
        takes.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{spec['call']} is called with ({', '.join(arguments)}): {error}; it takes {takes}."
        ) from error
    for name, parameter in takes.parameters.items():
        kind = parameter.annotation
        # Where anything is taken, as parameters are, `Any` is a class, too.
        if not _stands_for_given(spec.get(name)) or not isinstance(kind, type) or kind is Any:
            continue
        if not isinstance(arguments[name], kind):
            raise ValueError(
                f"{spec['call']} takes {name}: {kind.__name__}, "
                f"but {spec[name]} is of type {type(arguments[name]).__name__}."
            )
    return named(**arguments)


def _stands_for_given(spec: Any) -> bool:
    return isinstance(spec, str) and spec.startswith("@")


def mentions(spec: Any, name: str) -> bool:
    """Whether "@name" occurs in a spec."""
    if isinstance(spec, _MAPPINGS):
        return any(mentions(value, name) for value in spec.values())
    if type(spec) in (list, tuple):  # named tuples are values
        return any(mentions(entry, name) for entry in spec)
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
