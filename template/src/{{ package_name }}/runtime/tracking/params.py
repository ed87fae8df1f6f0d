"""The parameters of a pipeline, as MLflow can store them and without secrets."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kedro.io.core import is_parameter

from ..config.errors import ConfigError
from ..config.hiding import plain

if TYPE_CHECKING:
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline

    from ..config.hiding import Secrets
    from ..config.keys import ParamsOptions

# What MLflow accepts as the name of a parameter (mlflow.utils.validation).
_REFUSED = re.compile(r"[^/\w.\- ]" if os.name == "nt" else r"[^/\w.\- :]")
_MAX_NAME = 250


def of_pipeline(
    pipeline: Pipeline, catalog: DataCatalog, options: ParamsOptions, secrets: Secrets
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the parameters that a pipeline uses, and tags for those that are too long for one.

    `params:x` becomes `x`, and `parameters` stays whole.

    Raises:
        ConfigError: When one is too long and `long_params_strategy` is `fail`.
    """
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    inputs = {name for node in pipeline.nodes for name in node.inputs if is_parameter(name)}
    values = {
        name.removeprefix("params:"): catalog[name].load()
        for name in sorted(inputs)
        if name in catalog
    }
    values = {name: secrets.hide(plain(value), name) for name, value in values.items()}
    named: Iterable[tuple[str, Any]] = values.items()
    if options.dict_params.flatten:
        named = flatten(
            values, recursive=options.dict_params.recursive, sep=options.dict_params.sep
        )
    return split_long(
        rename((secrets.hide_in(name), secrets.hide_in(str(value))) for name, value in named),
        limit=options.max_length or MAX_PARAM_VAL_LENGTH,
        strategy=options.long_params_strategy,
    )


def flatten(params: Mapping[str, Any], *, recursive: bool, sep: str) -> Iterator[tuple[str, Any]]:
    """Return every entry of a dictionary by a name of its own: `{"a": {"b": 1}}` is `a.b`, 1.

    An empty dictionary is kept as a value. With `recursive` false only the first level of
    each dictionary is taken apart. Two entries may get the same name: `rename` keeps them apart.
    """
    for name, value in params.items():
        if not isinstance(value, Mapping) or not value:
            yield str(name), value
        else:
            inner = flatten(value, recursive=True, sep=sep) if recursive else value.items()
            yield from ((f"{name}{sep}{key}", item) for key, item in inner)


def rename(params: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return each parameter under a name that MLflow takes, and that no other one has.

    What MLflow refuses becomes `_`, a name that is too long ends in a hash of it, and of names
    that become equal all but the first get a number.
    """
    renamed: dict[str, Any] = {}
    # Names that are right already come first, so that they are never the ones to change.
    for name, value in sorted(params, key=lambda item: (_fitting(item[0]) != item[0], item[0])):
        base = candidate = _fitting(name)
        number = 2
        while candidate in renamed:
            ending = f"_{number}"
            candidate = base[: _MAX_NAME - len(ending)] + ending
            number += 1
        renamed[candidate] = value
    return renamed


def _fitting(name: str) -> str:
    fitting = _REFUSED.sub("_", name)
    if posixpath.normpath(fitting) != fitting or fitting.startswith("/"):  # `a//b`, `/a`, nothing
        fitting = fitting.replace("/", "_") or "_"
    fitting = re.sub(r"^\.+$|^\.\.+", lambda dots: "_" * len(dots[0]), fitting)  # a folder above
    if len(fitting) > _MAX_NAME:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        fitting = f"{fitting[: _MAX_NAME - 9]}_{digest}"
    return fitting


def split_long(
    params: Mapping[str, str], *, limit: int, strategy: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Apply `long_params_strategy` to the values that are longer than the store takes.

    Returns the parameters to log and those to set as tags instead (strategy `tag`).

    Raises:
        ConfigError: With the strategy `fail`, naming each parameter that is too long.
    """
    long = sorted(name for name, value in params.items() if len(value) > limit)
    if strategy == "fail" and long:
        lengths = ", ".join(f"{name!r} ({len(params[name])})" for name in long)
        raise ConfigError(
            f"Parameters are longer than the {limit} characters that the store takes: {lengths}. "
            "Set tracking.params.long_params_strategy in mlflow.yml to 'truncate' or 'tag', or "
            "tracking.params.dict_params.flatten to true."
        )
    if strategy == "truncate":
        return {name: value[:limit] for name, value in params.items()}, {}
    short = {name: value for name, value in params.items() if name not in long}
    return short, {name: params[name] for name in long}
