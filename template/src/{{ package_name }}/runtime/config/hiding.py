"""What is a secret, and texts and values without it: for all that leaves the process."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from .. import state
from .loading import all_credentials
from .uris import passwords_in, shown_uri

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext

REDACTED = "***"

# Values of credentials with these names are no secrets: they say who, where and how.
_PUBLIC = (
    *("*user", "*username", "*user_name", "*login", "*host", "*hostname", "*endpoint"),
    *("*endpoint_url", "*region", "*region_name", "*port", "*timeout", "*database", "*driver"),
)
_PUBLIC_VALUE = re.compile(r"[\d.,+-]*|true|false|none|null", re.IGNORECASE)

# Shorter values are no secrets; those below the second length are hidden only as a whole.
_SHORT_SECRET = 4
_LONG_SECRET = 6

# Words of every project.
_WORDS = ("kedro", "mlflow", "python", "parameters", "localhost", "SequentialRunner")

# How many runs of a process are known by what must not be in its output.
_RUNS = 10


@dataclass(frozen=True)
class Secrets:
    """The values that are hidden.

    `patterns` are names of secrets as in `fnmatch`, whatever their case; `values` are hidden
    wherever they come up. Inside a text that is where they can't be a part of one of the `words`
    of the project: its names and paths.
    """

    patterns: tuple[str, ...]
    values: frozenset[str] = field(default=frozenset(), repr=False)
    words: frozenset[str] = field(default=frozenset(), repr=False)

    def hide(self, value: Any, name: str = "") -> Any:
        """Replace by `***` each secret value, also inside of dictionaries and lists."""
        if name and is_named(name, self.patterns):
            return REDACTED
        if isinstance(value, Mapping):
            return {key: self.hide(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            hidden_items = [self.hide(item) for item in value]
            return tuple(hidden_items) if isinstance(value, tuple) else hidden_items
        text = str(value)
        hidden = self.hide_in(text)
        return value if hidden == text else hidden

    def hide_in(self, text: str) -> str:
        """Replace by `***` each secret value in a text, and the logins of URIs."""
        if text in self.values and text not in self.words:
            return REDACTED
        return self._inside.sub(REDACTED, shown_uri(text))

    def are_in(self, text: str) -> bool:
        """Check whether a secret value stands somewhere in a text."""
        return bool(self._inside.search(text))

    @cached_property
    def _inside(self) -> re.Pattern[str]:
        inside = [
            value
            for value in sorted(self.values, key=len, reverse=True)
            if len(value) >= _LONG_SECRET and not any(value in word for word in self.words)
        ]
        return re.compile("|".join(map(re.escape, inside)) or r"(?!)")


def secrets_of(
    context: KedroContext,
    parameters: Mapping[str, Any] | None = None,
    words: Iterable[str] = (),
) -> Secrets:
    """Return what is hidden in all that is logged.

    That are the values of credentials but for users, places and numbers; what has a secret's name
    in the parameters or in `mlflow.yml`; and the passwords inside of URIs.

    Args:
        context: The project's.
        parameters: Those of a run.
        words: Names in a run, which are no secrets.
    """
    config = context.mlflow  # type: ignore[attr-defined]
    patterns, parameters = tuple(config.tracking.redact), plain(parameters or {})
    server = config.server
    own = (server.mlflow_tracking_uri, server.mlflow_registry_uri, server.request_header_provider)
    values = [*_values(all_credentials(context), patterns, of_credentials=True)]
    values += _values([parameters, plain(own)], patterns)
    forms = {form for value in values for form in _forms(value) if len(form) >= _SHORT_SECRET}
    names = {*words, *_keys(parameters), str(context.project_path), *sys.path, *_WORDS}
    return Secrets(patterns, frozenset(forms), frozenset(names))


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Check whether a part of a name, such as `password` in `db.password`, matches a pattern."""
    parts = re.split(r"[./:]", name.lower())
    return any(fnmatchcase(part, pattern.lower()) for part in parts for pattern in patterns)


def plain(value: Any) -> Any:
    """Return a value with dictionaries for the pydantic models and dataclasses in it."""
    from pydantic import BaseModel  # its import is slow

    if isinstance(value, BaseModel):
        value = dict(value)
    elif is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def _values(
    data: Any,
    patterns: tuple[str, ...],
    name: str = "",
    *,
    of_credentials: bool = False,
    is_secret: bool = False,
) -> Iterator[str | bytes]:
    """Return the secret values in a dictionary: below secrets' names, or in credentials all."""
    is_secret = is_secret or is_named(name, patterns)
    if isinstance(data, Mapping | list | tuple | set):
        items = data.items() if isinstance(data, Mapping) else ((name, item) for item in data)
        for key, item in items:
            yield from _values(
                item, patterns, str(key), of_credentials=of_credentials, is_secret=is_secret
            )
        return
    text = data if isinstance(data, bytes) else str(data)
    if isinstance(text, str):
        yield from passwords_in(text)
        if _PUBLIC_VALUE.fullmatch(text):
            # Numbers are no secrets, but one with a secret's name that no other number is.
            if is_secret and text.isdigit() and len(text) >= _LONG_SECRET:
                yield text
            return
    if is_secret or (of_credentials and not is_named(name, _PUBLIC)):
        yield text


def _forms(value: str | bytes) -> Iterator[str]:
    """Return a value, each of its lines, and how Python, JSON and URLs write them."""
    if isinstance(value, bytes):
        yield from (repr(value)[2:-1], b64encode(value).decode())
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return
    for text in {value, *(line.strip() for line in value.splitlines())}:
        yield from (text, repr(text)[1:-1])
        yield from (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
        as_utf8 = text.encode(errors="surrogatepass")
        yield from (quote(as_utf8), quote(as_utf8, safe=""), quote_plus(as_utf8))


def _keys(data: Any) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield str(key)
            yield from _keys(value)


def hide_in_output(secrets: Secrets) -> None:
    """Hide secrets in what this process logs from now on, and in the error that it ends with."""
    held = state.current()
    with held.lock:
        if not held.secrets:
            logging.setLogRecordFactory(_hiding_records(logging.getLogRecordFactory()))
            sys.excepthook = _hiding_errors(sys.excepthook)
        others = [other for other in held.secrets if other != secrets]
        held.secrets = [*others, secrets][-_RUNS:]


def _hidden(text: str) -> str:
    for secrets in state.current().secrets:
        text = secrets.hide_in(text)
    return text


def _hiding_records(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # logging's handlers report it, and don't raise it
            return record
        if (hidden := _hidden(text)) != text:
            record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0]:
            text = "".join(traceback.format_exception(*record.exc_info))
            if (hidden := _hidden(text)) != text:
                record.exc_info, record.exc_text = None, hidden.rstrip()
        return record

    return make_record


def _hiding_errors(show: Callable[..., Any]) -> Callable[..., Any]:
    def show_error(*error: Any) -> None:
        text = "".join(traceback.format_exception(*error))
        hidden = _hidden(text)
        if hidden == text:
            show(*error)
        else:
            sys.stderr.write(hidden)

    return show_error
