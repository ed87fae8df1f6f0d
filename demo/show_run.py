"""Show the last run of the Kedro project in this folder, as its MLflow store has it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Print the table, and how to see more."""
    project = Path.cwd()
    bootstrap_project(project)
    with KedroSession.create(project_path=project) as session:
        config = session.load_context().mlflow  # type: ignore[attr-defined]
    client = MlflowClient(config.server.mlflow_tracking_uri, config.server.mlflow_registry_uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment.name)
    assert experiment, "the run has made it"
    runs = client.search_runs([experiment.experiment_id])
    run = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [
        child for child in runs if child.data.tags.get("mlflow.parentRunId") == run.info.run_id
    ]
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")

    table = Table(title=f"experiment {experiment.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("run", run.info.run_name)
    table.add_row("status", run.info.status)
    duration = timedelta(milliseconds=run.info.end_time - run.info.start_time)
    table.add_row("duration", f"{duration.total_seconds():.1f} s")
    table.add_row("parameters", lines(run.data.params))
    table.add_row("metrics", lines({k: f"{v:.4g}" for k, v in run.data.metrics.items()}))
    table.add_row("artifacts", "\n".join(artifacts(client, run.info.run_id)))
    table.add_row("nested runs", "\n".join(child.info.run_name for child in reversed(children)))
    table.add_row("registered model", "\n".join(f"{v.name} {v.version}" for v in versions))

    console = Console()
    console.print(table)
    console.print("To see it in MLflow's pages:\n", highlight=False)
    console.print(
        f"    uv run --directory {project} kedro mlflow ui\n", highlight=False, soft_wrap=True
    )


def lines(values: dict[str, str]) -> str:
    """Write names and values, one pair a line."""
    return "\n".join(f"{name} = {value}" for name, value in sorted(values.items()))


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    """List the files of a run, those in folders too."""
    found = []
    for entry in client.list_artifacts(run_id, folder):
        found += artifacts(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return found


if __name__ == "__main__":
    main()
