"""Bind a run to the catalog of one Kedro run, so that whoever has the catalog has the run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedro.framework import project

from . import credentials, params, provenance, tracking
from .config import MlflowConfig, RequestHeaderProviderOptions
from .datasets.tracked import TrackedDataset
from .loading import (
    ConfigError,
    mistake,
    package_name,
    read_credentials,
    register_header_provider,
)

if TYPE_CHECKING:
    from kedro.framework.context import KedroContext
    from kedro.io import DataCatalog
    from kedro.pipeline import Pipeline

# The entry of the catalog that holds the binding. Kedro builds a catalog for each run and hands
# it, pickled, to every worker.
ENTRY = "mlflow:run"


@dataclass(frozen=True)
class Binding:
    """What the catalog carries: the run, its project's package, and who signs its requests."""

    run: tracking.RunHandle
    package_name: str
    header_provider: RequestHeaderProviderOptions

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.run, self.package_name, self.header_provider)


def _arrive(
    run: tracking.RunHandle, package_name: str, header_provider: RequestHeaderProviderOptions
) -> Binding:
    """Unpickle a binding; in a worker that has no settings, take those of the binding's project.

    Kedro's tasks register `settings.HOOKS` in every worker, but in one that was not forked the
    settings are empty, and no hook would be called around the nodes. Kedro's own attempt to
    configure the project there (`kedro.runner.task`) needs a package name that isn't set, and
    must not find one: it fails at the second task of a worker.
    """
    if project.PACKAGE_NAME is None and not project.settings.HOOKS:
        project.settings.configure(f"{package_name}.settings")
    if not header_provider.pass_context:  # there is no context in a worker
        credentials.register_header_provider(header_provider, None)
    return Binding(run, package_name, header_provider)


def run_of(catalog: DataCatalog) -> tracking.RunHandle | None:
    """Give the run that a catalog is bound to, or None when its pipeline isn't tracked."""
    # Not `in catalog`: there a pattern such as "{default}" matches every name.
    if ENTRY not in list(catalog):
        return None
    binding: Binding = catalog[ENTRY].load()
    return binding.run


def track(
    context: KedroContext,
    run_params: dict[str, Any],
    pipeline: Pipeline,
    catalog: DataCatalog,
) -> None:
    """Open the run of a pipeline and bind it to the catalog and its Mlflow datasets.

    Raises:
        ConfigError: When a parameter is too long and `long_params_strategy` is `fail`.
    """
    config: MlflowConfig = context.mlflow  # type: ignore[attr-defined]
    names = provenance.pipeline_names(run_params)
    server = config.server.connection
    # A dataset that can't be made fails here, before there is a run.
    datasets = {name: catalog.get(name) for name in pipeline.datasets()}
    run = None
    if not set(names) <= set(config.tracking.disable_tracking.pipelines):
        logged, tags = _parameters(config, pipeline, catalog)
        variables = read_credentials(context)
        register_header_provider(context)
        try:
            run = tracking.start(
                server,
                config.tracking,
                name=config.tracking.run.name or "+".join(names),
                params=logged,
                tags={**_tags(config, context, run_params), **tags},
                variables=variables,
            )
        except tracking.SettingError as error:
            raise mistake(context, error.key, str(error)) from error
        provider = config.server.request_header_provider
        catalog[ENTRY] = Binding(run, package_name(context), provider)
    elif config.tracking.disable_tracking.disable_autologging and "mlflow" in sys.modules:
        sys.modules["mlflow"].autolog(disable=True)  # it would make a run of its own

    for name, dataset in datasets.items():
        # CachedDataset keeps the dataset that it caches under this name.
        for candidate in (dataset, getattr(dataset, "_dataset", None)):
            if isinstance(candidate, TrackedDataset):
                candidate.bind(server, run, name)


def _parameters(
    config: MlflowConfig, pipeline: Pipeline, catalog: DataCatalog
) -> tuple[dict[str, str], dict[str, str]]:
    """Read the parameters that the pipeline uses, ready to log, and those that become tags."""
    inputs = {name for node in pipeline.nodes for name in node.inputs}
    values = params.select(
        {
            name: catalog[name].load()
            for name in sorted(inputs)
            if name == "parameters" or name.startswith("params:")
            if name in catalog
        }
    )
    options = config.tracking.params
    values = {
        name: params.redact(value, config.tracking.redact, name) for name, value in values.items()
    }
    if options.dict_params.flatten:
        values = params.flatten(
            values, recursive=options.dict_params.recursive, sep=options.dict_params.sep
        )
    texts = {name: str(value) for name, value in params.rename(values).items()}
    try:
        return params.split_long(
            texts,
            limit=options.max_length or tracking.parameter_limit(),
            strategy=options.long_params_strategy,
        )
    except ValueError as error:
        raise ConfigError(
            f"Parameters are {error}. Set tracking.params.long_params_strategy in mlflow.yml to "
            "'truncate' or 'tag', or tracking.params.dict_params.flatten to true."
        ) from error


def _tags(
    config: MlflowConfig, context: KedroContext, run_params: dict[str, Any]
) -> dict[str, str]:
    shown = params.redact(run_params, config.tracking.redact)
    return {
        **provenance.run_tags(shown),
        **provenance.source_tags(context.project_path, package_name(context)),
    }
