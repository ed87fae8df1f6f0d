"""Turn the parameters of a pipeline into what MLflow can store. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

# Characters that MLflow accepts in the name of a parameter (mlflow.utils.validation).
_REFUSED = re.compile(r"[^/\w.\- :]")

REDACTED = "***"


def select(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the parameters among the inputs of nodes.

    Takes dataset names with their data, gives parameter names with their values: `params:x`
    becomes `x`, and `parameters` stays whole.
    """
    return {
        name.removeprefix("params:"): value
        for name, value in inputs.items()
        if name == "parameters" or name.startswith("params:")
    }


def flatten(params: Mapping[str, Any], *, recursive: bool, sep: str) -> dict[str, Any]:
    """Give every entry of a dictionary a name of its own: `{"a": {"b": 1}}` becomes `{"a.b": 1}`.

    An empty dictionary is kept as a value. With `recursive` false only the first level of
    each dictionary is taken apart.
    """
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if not isinstance(value, Mapping) or not value:
            flat[str(name)] = value
            continue
        inner = flatten(value, recursive=True, sep=sep) if recursive else value
        flat.update({f"{name}{sep}{key}": item for key, item in inner.items()})
    return flat


def rename(params: Mapping[str, Any]) -> dict[str, Any]:
    """Replace by `_` what MLflow refuses in a name; names that become equal get a number."""
    renamed: dict[str, Any] = {}
    # Names that are right already come first, so that they are never the ones to change.
    for name in sorted(params, key=lambda name: (_REFUSED.search(name) is not None, name)):
        base = candidate = _REFUSED.sub("_", name)
        number = 2
        while candidate in renamed:
            candidate = f"{base}_{number}"
            number += 1
        renamed[candidate] = params[name]
    return renamed


def is_secret(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a part of a dotted name matches one of the patterns, whatever its case."""
    parts = re.split(r"[./:]", name.lower())
    return any(fnmatchcase(part, pattern.lower()) for part in parts for pattern in patterns)


def redact(value: Any, patterns: Iterable[str], name: str = "") -> Any:
    """Replace by `***` each value with the name of a secret, also inside of dictionaries."""
    patterns = tuple(patterns)
    if name and is_secret(name, patterns):
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact(item, patterns, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, patterns) for item in value]
    return value


def split_long(
    params: Mapping[str, str], *, limit: int, strategy: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Apply `long_params_strategy` to the values that are longer than the store takes.

    Returns the parameters to log and those to set as tags instead (strategy `tag`).

    Raises:
        ValueError: With the strategy `fail`, naming each parameter that is too long.
    """
    long = {name for name, value in params.items() if len(value) > limit}
    if strategy == "fail" and long:
        found = ", ".join(f"{name!r} ({len(params[name])})" for name in sorted(long))
        raise ValueError(f"longer than the {limit} characters that the store takes: {found}")
    if strategy == "truncate":
        return {name: value[:limit] for name, value in params.items()}, {}
    return (
        {name: value for name, value in params.items() if name not in long},
        {name: params[name] for name in sorted(long)},
    )
