"""Measure how requests, time, the server's work and its database grow with nodes and runs."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import psycopg2
from mlflow import MlflowClient
from mlflow.entities import Param

from tests.support.postgres import Postgres, postgres_server
from tests.support.servers import CountingProxy, counting_proxy, mlflow_server

from .environments import make_environments
from .projects import PACKAGE, Project, generate
from .report import cores, table

DATABASE = "scale"

# MLflow's server works with 40 threads and has 15 connections to its database: from about as many
# requests at once on, some of them wait half a minute for one and are refused.
CONNECTIONS = 40
SERVER = {"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(CONNECTIONS)}

NODES = (10, 100, 1000)
RUNS_AT_ONCE = (1, 10, 100)
STORED_RUNS = (1_000, 10_000, 100_000)

NODES_HEADER = (
    "nodes",
    "requests",
    "tracked, s",
    "untracked, s",
    "server, ms",
    "database, ms",
    "in the database",
)
RUNS_HEADER = (
    "runs at once",
    "all, s",
    "runs a second",
    "server, ms a run",
    "database, ms a run",
    "in the database, a run",
)
STORED_HEADER = ("runs stored", "database", "start, ms", "first page, ms", "by a metric, ms")

# Runs as MLflow writes them: its tables are filled without its server, which takes hours for it.
FILL = (
    """
    INSERT INTO runs (run_uuid, name, source_type, source_name, user_id, status, start_time,
                      end_time, lifecycle_stage, artifact_uri, experiment_id)
    SELECT md5('{experiment}-' || i), 'run ' || i, 'LOCAL', 'measured', 'ada', 'FINISHED',
           1700000000000 + i * 1000, 1700000000500 + i * 1000, 'active',
           'mlflow-artifacts:/{experiment}/' || i || '/artifacts', {experiment}
    FROM generate_series(1, {runs}) AS i
    """,
    """
    INSERT INTO params (run_uuid, key, value)
    SELECT md5('{experiment}-' || i), 'p_' || j, (i * j)::text
    FROM generate_series(1, {runs}) AS i, generate_series(0, 9) AS j
    """,
    """
    INSERT INTO tags (run_uuid, key, value)
    SELECT md5('{experiment}-' || i), 't_' || j, 'a tag of ordinary length, ' || j
    FROM generate_series(1, {runs}) AS i, generate_series(0, 9) AS j
    """,
    """
    INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan)
    SELECT md5('{experiment}-' || i), 'm_' || j, random(), 1700000000000 + i * 1000, 0, false
    FROM generate_series(1, {runs}) AS i, generate_series(0, 9) AS j
    """,
    """
    INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan)
    SELECT run_uuid, key, value, timestamp, step, is_nan FROM metrics
    WHERE run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = {experiment})
    ON CONFLICT DO NOTHING
    """,
)

PAGE_FILE = Path(__file__).with_name("SCALE.md")

PIPELINE = '''"""A chain of nodes, each with a parameter and a metric of its own."""

import os

from kedro.pipeline import Node, Pipeline

NODES = int(os.environ["NODES"])


def step(before, parameter):
    return before + parameter, parameter


def create_pipeline():
    steps = [
        Node(
            step,
            [f"x_{i - 1}" if i else "params:p_0", f"params:p_{i}"],
            [f"x_{i}", f"m_{i}"],
            name=f"n_{i}",
        )
        for i in range(NODES)
    ]
    return Pipeline(steps)
'''

# Runs at once, as a service makes them; the first one, which imports and connects, isn't counted.
AT_ONCE = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kedro.framework.session import KedroServiceSession
from kedro.framework.startup import bootstrap_project

runs = int(sys.argv[1])
bootstrap_project(Path.cwd())
with KedroServiceSession.create(project_path=Path.cwd(), serving_mode=True) as session:
    session.run()
    start = time.perf_counter()
    with ThreadPoolExecutor(runs) as pool:
        list(pool.map(lambda _: session.run(), range(runs)))
    Path(sys.argv[2]).write_text(str(time.perf_counter() - start))
"""

PAGE = """\
# How tracking grows

Measured on {date} with Python {python}, Kedro {kedro}, MLflow {mlflow} and PostgreSQL {postgres} on
{cores} cores: client, server and database on the same machine, one after the other or all at once
as the tables say. The server is one worker with `MLFLOW_SQLALCHEMYSTORE_POOL_SIZE={connections}`.

## With the nodes of a pipeline

One `kedro run`. Each node has a parameter and a metric of its own.

{nodes}

- **requests**: of the whole process, counted by a proxy in front of the server.
- **tracked, untracked**: wall time of the process, with tracking and without.
- **server, database**: time that the processors worked for this run there.
- **in the database**: by how much the run made it larger.

## With runs at once

Runs of a pipeline with ten nodes in one process, as a service makes them, each an MLflow run.

{runs}

## With the runs that are stored already

The store is filled with runs that have ten parameters, ten metrics and ten tags each.

{stored}

- **start**: the requests that begin a run: find the experiment, create the run, its parameters.
- **first page**: the latest 100 runs of the experiment, as MLflow's pages ask for them.
- **by a metric**: the best 100 by one metric.

## Repeat it

```console
nox -s bench -- --scale
```
"""


@dataclass(frozen=True)
class Used:
    """Processors' time of server and database in seconds, and the database's size in bytes."""

    server: float
    database: float
    size: int

    def __sub__(self, before: Used) -> Used:
        return Used(
            self.server - before.server, self.database - before.database, self.size - before.size
        )


@dataclass(frozen=True)
class Site:
    """A server with its database behind it, and the proxy that counts its requests."""

    port: int
    postgres: Postgres
    database: str
    proxy: CountingProxy

    def used(self) -> Used:
        """Tell what server and database have used so far."""
        (size,) = self.query("SELECT pg_database_size(current_database())")[0]
        return Used(
            _processor_time(f"--port={self.port}"), _processor_time(str(self.postgres.port)), size
        )

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in the database; gives the rows that it has."""
        uri = self.postgres.uri(self.database)
        with closing(psycopg2.connect(uri)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []


def _processor_time(word: str) -> float:
    """Add up the time of the processes with a word in their command, and of those they started."""
    roots = [p for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or ())]
    processes = {p for root in roots for p in (root, *root.children(recursive=True))}
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def main(environments: Path) -> int:
    """Measure all, print the page and write it; gives the exit status."""
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres_server() as postgres,
        mlflow_server(Path(folder), store=_database(postgres), env=SERVER) as port,
        counting_proxy(port) as proxy,
    ):
        site = Site(port, postgres, DATABASE, proxy)
        project = _project(Path(folder, "project"), make_environments(environments)["ours"])
        nodes = [_with_nodes(site, project, number) for number in NODES]
        runs = [_at_once(site, project, number) for number in RUNS_AT_ONCE]
        stored = [_stored(site, number) for number in STORED_RUNS]
        text = PAGE.format(
            date=date.today().isoformat(),
            python=platform.python_version(),
            kedro=version("kedro"),
            mlflow=version("mlflow"),
            postgres=site.query("SHOW server_version")[0][0].split()[0],
            cores=cores(),
            connections=CONNECTIONS,
            nodes=table(NODES_HEADER, nodes),
            runs=table(RUNS_HEADER, runs),
            stored=table(STORED_HEADER, stored),
        )
    print(text)
    PAGE_FILE.write_text(text, encoding="utf-8")
    return 0


def _database(postgres: Postgres) -> str:
    postgres.create(DATABASE)
    return postgres.uri(DATABASE, scheme="postgresql+psycopg2")


def _project(path: Path, environment: Path) -> Project:
    generate(path)
    project = Project("ours", path, environment, "")
    project.write(f"src/{PACKAGE}/pipelines/first/pipeline.py", PIPELINE)
    metric = {"type": f"{PACKAGE}.runtime.MlflowMetricDataset"}
    project.write_yaml("conf/base/catalog.yml", {"m_{number}": metric})
    project.write_yaml("conf/base/parameters.yml", {f"p_{i}": float(i) for i in range(max(NODES))})
    project.write("at_once.py", AT_ONCE)
    return project


def _on(project: Project, uri: str) -> Project:
    """Point a project at a server."""
    tracked = {"server": {"mlflow_tracking_uri": uri}}
    project.write_yaml("conf/local/mlflow.yml", tracked)
    return project


def _ran(ended: subprocess.CompletedProcess[str]) -> None:
    if ended.returncode:
        raise RuntimeError(ended.stdout + ended.stderr)


def _with_nodes(site: Site, project: Project, nodes: int) -> tuple[str, ...]:
    _say(f"{nodes} nodes")
    variables = {"NODES": str(nodes)}
    _ran(_on(project, site.proxy.uri).kedro("run", **variables))  # makes the experiment
    site.proxy.requests.clear()
    _ran(project.kedro("run", **variables))
    requests = len(site.proxy.requests)
    _on(project, f"http://127.0.0.1:{site.port}")
    before, start = site.used(), time.perf_counter()
    _ran(project.kedro("run", **variables))
    seconds, used = time.perf_counter() - start, site.used() - before
    project.write_yaml(
        "conf/local/mlflow.yml", {"tracking": {"disable_tracking": {"pipelines": ["__default__"]}}}
    )
    start = time.perf_counter()
    _ran(project.kedro("run", **variables))
    untracked = time.perf_counter() - start
    return f"{nodes:,}", f"{requests:,}", f"{seconds:.1f}", f"{untracked:.1f}", *_shown(used, 1)


def _at_once(site: Site, project: Project, runs: int) -> tuple[str, ...]:
    _say(f"{runs} runs at once")
    _on(project, f"http://127.0.0.1:{site.port}")
    before = site.used()
    written = project.path / "seconds"
    _ran(project.python("at_once.py", str(runs), str(written), NODES="10"))
    seconds = float(written.read_text())
    used = site.used() - before  # with that of the first run
    return f"{runs}", f"{seconds:.1f}", f"{runs / seconds:.1f}", *_shown(used, runs + 1)


def _stored(site: Site, runs: int) -> tuple[str, ...]:
    _say(f"{runs:,} stored runs")
    client = MlflowClient(f"http://127.0.0.1:{site.port}")
    name = f"stored-{runs}"
    experiment = client.create_experiment(name)
    for statement in FILL:
        site.query(statement.format(experiment=experiment, runs=runs))
    site.query("VACUUM ANALYZE")
    (size,) = site.query("SELECT pg_database_size(current_database())")[0]

    def start() -> None:
        client.get_experiment_by_name(name)
        run = client.create_run(experiment)
        client.log_batch(run.info.run_id, params=[Param(f"p_{i}", str(i)) for i in range(10)])

    def page(order: str) -> None:
        found = client.search_runs([experiment], max_results=100, order_by=[order])
        assert len(found) == 100

    times = [
        _median(start),
        _median(lambda: page("attributes.start_time DESC")),
        _median(lambda: page("metrics.m_0 DESC")),
    ]
    return f"{runs:,}", f"{size / 1e6:,.0f} MB", *(f"{seconds * 1000:,.0f}" for seconds in times)


def _median(call: Callable[[], None]) -> float:
    """Give the median time of a call, in seconds; the first one isn't counted."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _shown(used: Used, runs: int) -> tuple[str, str, str]:
    """Show what one run has used."""
    return (
        f"{used.server / runs * 1000:,.0f}",
        f"{used.database / runs * 1000:,.0f}",
        f"{used.size / runs / 1000:,.0f} kB",
    )


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)
