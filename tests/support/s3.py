"""An S3 server that tests start on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import s3fs  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer


@dataclass(frozen=True)
class S3:
    """The address of an S3 server with one bucket, and what `credentials.yml` says of it."""

    endpoint: str
    bucket: str = "bucket"

    @property
    def credentials(self) -> dict[str, Any]:
        return {
            "key": "testing",
            "secret": "testing",
            "client_kwargs": {"endpoint_url": self.endpoint},
        }

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which any client finds it."""
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def files(self, folder: str) -> list[str]:
        """Name the files below a folder of the bucket."""
        file_system = s3fs.S3FileSystem(**self.credentials)
        file_system.invalidate_cache()
        start = f"{self.bucket}/{folder}/"
        return [file.removeprefix(start) for file in sorted(file_system.find(start))]


@contextmanager
def s3_server() -> Iterator[S3]:
    """Serve S3 from memory."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = S3(f"http://{host}:{port}")
        s3fs.S3FileSystem(**s3.credentials).mkdir(s3.bucket)
        yield s3
    finally:
        server.stop()
