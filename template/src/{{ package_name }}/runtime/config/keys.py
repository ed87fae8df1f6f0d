"""The keys of `mlflow.yml`, each with its type, its default and what it is for.

The commented file and the JSON Schema that projects carry are made from these models.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _as_number(value: Any) -> Any:
    """Return the number for one that is written as a text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _as_switch(value: Any) -> Any:
    """Raise an error in one sentence for what is neither a switch nor options."""
    if not isinstance(value, bool | dict):
        raise PydanticCustomError("switch", "expected true, false or options")
    return value


# A number is taken for a text too: `--params run_name=7` arrives as one.
Text = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]

# An empty one is a mistake, as that of a variable of the environment without a value: what stands
# for the default is null.
Filled = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, Field(min_length=1)]


class _Options(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """Return no keys for a group whose keys are all commented out: it has the defaults."""
        return {} if value is None else value


class RequestHeaderProviderOptions(_Options):
    """A class that adds headers to each request, for tokens that expire."""

    type: Filled | None = None
    """Import path of an MLflow RequestHeaderProvider; null is none."""

    pass_context: bool = False
    """Give it the Kedro context, as the argument kedro_context."""

    init_kwargs: dict[str, Any] = {}
    """Other arguments to make it with."""


class ServerOptions(_Options):
    """Where runs and models are kept."""

    mlflow_tracking_uri: Filled | None = None
    """Where runs are kept; null is MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here."""

    mlflow_registry_uri: Filled | None = None
    """Where registered models are kept; null is with the runs."""

    credentials: Filled | None = None
    """Entry of credentials.yml whose keys become environment variables for the run."""

    request_header_provider: RequestHeaderProviderOptions = RequestHeaderProviderOptions()


class DisableTrackingOptions(_Options):
    """What is not tracked."""

    pipelines: list[Filled] = []
    """Pipelines that run without being tracked."""

    disable_autologging: bool = True
    """Switch off what mlflow.autolog() has switched on."""


class CreateExperimentOptions(_Options):
    """How the experiment is made when it doesn't exist."""

    artifact_location: Filled | None = None
    """Where files go; null is the server's choice, or a folder beside mlflow.db."""

    tags: dict[str, Text] | None = None
    """Tags of the experiment."""


class ExperimentOptions(_Options):
    """The experiment that runs belong to."""

    # The limit is MLflow's (mlflow.utils.validation), as is the form of a run's id below.
    name: Annotated[Name, Field(max_length=500)] | None = None
    """The experiment that runs belong to; null is the package's name."""

    create_experiment_kwargs: CreateExperimentOptions = CreateExperimentOptions()

    restore_if_deleted: bool = True
    """Bring the experiment back when it has been deleted."""


class RunOptions(_Options):
    """The run itself."""

    id: Annotated[Name, Field(max_length=256, pattern="^[a-zA-Z0-9][a-zA-Z0-9_-]*$")] | None = None
    """Continue the run with this id."""

    name: Name | None = None
    """Name of the run; null is the pipeline's name. ${km.random_name:} makes one up."""

    nested: bool = True
    """Make a Kedro run that a node starts a child of the run it is in."""


class DictParamsOptions(_Options):
    """How dictionaries among the parameters are logged."""

    flatten: bool = False
    """Log each entry of a dictionary as a parameter of its own."""

    recursive: bool = True
    """Also the entries of dictionaries in dictionaries."""

    sep: str = "."
    """What stands between the names."""


class ParamsOptions(_Options):
    """How parameters are logged."""

    dict_params: DictParamsOptions = DictParamsOptions()

    long_params_strategy: Literal["fail", "truncate", "tag"] = "fail"
    """A value longer than MLflow takes: fail, truncate, or tag (set it as a tag instead)."""

    max_length: Annotated[int, Field(gt=0)] | None = None
    """How long a value may be; null is MLflow's own limit."""


class ArtifactsOptions(_Options):
    """Outputs that become artifacts without an entry of their own in the catalog."""

    datasets: list[Filled] = []
    """Outputs of nodes to log as artifacts, by name or pattern: "*_figure"."""


class TrackingOptions(_Options):
    """What is tracked, and as what."""

    disable_tracking: DisableTrackingOptions = DisableTrackingOptions()

    on_unreachable: Literal["fail", "offline"] = Field(
        default="fail",
        description="When the server is away: fail before the first node; or, with the extra of "
        "that name, offline (keep each run in .mlflow-offline, and replay it later).",
    )

    experiment: ExperimentOptions = ExperimentOptions()
    run: RunOptions = RunOptions()
    params: ParamsOptions = ParamsOptions()
    artifacts: ArtifactsOptions = ArtifactsOptions()

    autolog: dict[str, Annotated[bool | dict[str, Any], BeforeValidator(_as_switch)]] = {}
    """Libraries that MLflow logs by itself, with options: {sklearn: {log_models: false}}."""

    redact: list[Filled] = [
        "*password",
        "*passwd",
        "*secret",
        "*token",
        "*api_key",
        "*apikey",
        "*access_key",
        "*secret_key",
        "*private_key",
        "*credentials",
    ]
    """Values with such a name are stored as ***."""


class UiOptions(_Options):
    """Where `kedro mlflow ui` listens."""

    host: Filled = "127.0.0.1"
    """Where `kedro mlflow ui` listens."""

    port: Annotated[int, Field(gt=0, lt=65536), BeforeValidator(_as_number)] | None = None
    """At which port; null takes a free one."""


class MlflowConfig(_Options):
    """The whole of `mlflow.yml`."""

    server: ServerOptions = ServerOptions()
    tracking: TrackingOptions = TrackingOptions()
    ui: UiOptions = UiOptions()


_ABOUT = (
    "# How runs are tracked. An environment changes single keys in its own conf/<env>/mlflow.yml."
)


def commented_yaml(
    written: Mapping[str, str] | None = None, schema: str = "mlflow.schema.json"
) -> str:
    """Return a text with every key, its default and a comment.

    Args:
        written: What to write instead of the default, by dotted key.
        schema: Path of the JSON Schema from the file, for editors.
    """
    lines = _lines(MlflowConfig(), written or {})
    return f"# yaml-language-server: $schema={schema}\n{_ABOUT}\n" + "".join(
        f"{line}\n" if line.startswith(" ") else f"\n{line}\n" for line in lines
    )


def _lines(options: _Options, written: Mapping[str, str], path: str = "") -> Iterator[str]:
    """Return the lines of a group, without an indent of its own."""
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, _Options):
            yield f"{name}:"
            yield from (f"  {line}" for line in _lines(value, written, f"{path}{name}."))
            continue
        about = textwrap.wrap(field.description or "", 90, break_on_hyphens=False)
        yield from (f"# {line}" for line in about)
        if value and isinstance(value, list):
            yield f"{name}:"
            yield from (f"  - {json.dumps(item)}" for item in value)
        else:
            yield f"{name}: {written.get(path + name) or json.dumps(value)}"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of `mlflow.yml`; each value may also be an interpolation, `${…}`."""
    schema = MlflowConfig.model_json_schema()
    texts = ({"type": "string"}, {"type": "string", "minLength": 1})
    for group in (schema, *schema["$defs"].values()):
        for name, field in group["properties"].items():
            if "$ref" in field:
                continue
            about = {key: field.pop(key) for key in ("description", "default") if key in field}
            field.pop("title", None)
            interpolation = {"type": "string", "pattern": r"^\$\{.*\}$"}
            kinds = field.get("anyOf", [field])
            if not any(kind in texts for kind in kinds):
                field = {"anyOf": [*kinds, interpolation]}
            group["properties"][name] = {**field, **about}
    return schema
