"""The project of a command, as Kedro opens it, with its credentials."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata

from ..binding import secrets_of
from ..config.errors import SettingError
from ..config.loading import mistake, read_credentials
from ..stores import credentials
from ..stores.errors import translate_server_errors
from ..stores.project import register_header_provider

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext

    from ..stores.project import MlflowConfig


@contextmanager
def opened(metadata: ProjectMetadata, env: str | None, **options: Any) -> Iterator[Any]:
    """Open a session on a project, and return its context."""
    with KedroSession.create(project_path=metadata.project_path, env=env, **options) as session:
        yield session.load_context()  # type: ignore[attr-defined]


@contextmanager
def with_credentials(
    context: KedroContext, defaults: Mapping[str, str]
) -> Iterator[Mapping[str, str]]:
    """Send the project's credentials with each request that a `with` block makes.

    Yields the environment variables that `server.credentials` names.

    Args:
        context: The project's.
        defaults: Other environment variables, for what the user has not set.

    Raises:
        ConfigError: When there are no such credentials, or the header provider can't be used.
    """
    variables = read_credentials(context)
    register_header_provider(context)
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    with credentials.exporting({**unset, **variables}):
        yield variables


@contextmanager
def with_explained_errors(context: KedroContext, variables: Mapping[str, str]) -> Iterator[None]:
    """Raise what a server refuses in a `with` block as the sentence that a run would end with.

    Args:
        context: The project's.
        variables: The environment variables that `server.credentials` names.

    Raises:
        ConfigError: For what the configuration or the server shows to be wrong.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    try:
        with translate_server_errors(config.server.connection, variables):
            yield
    except SettingError as error:
        raise mistake(context, error.key, secrets_of(context).hide_in(str(error))) from error
