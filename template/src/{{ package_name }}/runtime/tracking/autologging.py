"""MLflow's autologging of other libraries, switched on while runs are in progress."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from .. import _mlflow, state
from ..config.errors import SettingError

# As in `tracking.autolog` of mlflow.yml: what is on, or the options of each flavor.
Flavors = Mapping[str, bool | Mapping[str, Any]]


def switch_on(flavors: Flavors) -> None:
    """Call `mlflow.<flavor>.autolog(…)` for each flavor that is not on yet with these options.

    Raises:
        SettingError: When there is no such flavor or option, or its library isn't installed.
    """
    held = state.current()
    with held.lock:
        for name, given in flavors.items():
            options = {} if isinstance(given, bool) else dict(given)
            # Not once more for each of several runs: it exchanges methods that others may be in.
            if given is not False and held.autologging.get(name) != options:
                _call_autolog(name, options)
                held.autologging[name] = options


def switch_on_in_worker(flavors: Flavors) -> None:
    """Switch autologging on in a worker of a run, where fork may have switched it on already."""
    held = state.current()
    if flavors and not held.has_autologging_threads:
        held.has_autologging_threads = True
        _mlflow.renew_autologging_threads()
    switch_on(flavors)


def switch_off() -> None:
    """Switch off what `switch_on` has switched on, when no run is in progress any more."""
    held = state.current()
    with held.lock:
        while held.autologging:
            _call_off(held.autologging.popitem()[0])


def _call_off(name: str) -> None:
    from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

    autolog = import_module(f"mlflow.{name}").autolog
    autolog(disable=True)
    # Or MLflow takes it for the user's will, and `mlflow.autolog()` would leave the flavor off.
    AUTOLOGGING_INTEGRATIONS.get(getattr(autolog, "integration_name", name), {}).clear()


def keep_quiet() -> None:
    """Switch off what `mlflow.autolog()` has switched on.

    It is left alone where it was never called: from then on each library brings its flavor with
    it, and before MLflow 3.13 two threads that import something then can wait for each other for
    ever.
    """
    import mlflow
    from mlflow.utils.autologging_utils import autologging_is_disabled

    if not autologging_is_disabled("mlflow"):
        mlflow.autolog(disable=True)


def _call_autolog(name: str, options: Mapping[str, Any]) -> None:
    import mlflow

    key = ("tracking", "autolog", name)
    known = [module.name for module in iter_modules(mlflow.__path__)]
    if name not in known:
        (close, *_) = [*get_close_matches(name, known, n=1), "sklearn"]
        raise SettingError(key, f"MLflow has no flavor {name!r}, did you mean {close!r}?")
    try:
        autolog: Any = getattr(import_module(f"mlflow.{name}"), "autolog", None)
        if autolog is None:
            raise SettingError(key, f"MLflow's flavor {name!r} has no autologging")
        taken = inspect.signature(autolog).parameters
        if wrong := [option for option in options if option not in taken]:
            what = f"unknown option {wrong[0]!r}, expected one of {', '.join(taken)}"
            raise SettingError(key, what)
        autolog(**options)
    except ImportError as error:
        raise SettingError(key, f"its library can't be imported: {error}") from error
