"""An S3 server that checks keys, and the variables that its clients read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import boto3  # type: ignore[import-untyped]
import requests
from moto.server import ThreadedMotoServer

from .s3 import S3
from .work import SECRET

KEY, KEY_SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
ENDPOINT = "MLFLOW_S3_ENDPOINT_URL"

# Without them the client asks a service of Amazon for the place of a bucket, and for keys.
QUIET = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


def variables(s3: S3) -> dict[str, str]:
    return {KEY: "testing", KEY_SECRET: SECRET, ENDPOINT: s3.endpoint, **QUIET}


@dataclass(frozen=True)
class Locked:
    """An S3 server that checks keys: the place of its bucket, and the variables that open it."""

    s3: S3
    opening: dict[str, str]


@contextmanager
def locked_s3_server() -> Iterator[Locked]:
    """Serve S3 from memory, to those who have the key."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        s3 = S3(f"http://{host}:{port}", "locked")
        where = {"endpoint_url": s3.endpoint, "region_name": "us-east-1"}
        any_key = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        boto3.client("s3", **where, **any_key).create_bucket(Bucket=s3.bucket)
        iam = boto3.client("iam", **where, **any_key)
        user = uuid4().hex  # moto has one set of users in a process
        iam.create_user(UserName=user)
        policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", '
        policy += '"Resource": "*"}]}'
        iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=policy)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        # From now on each request is checked.
        requests.post(f"{s3.endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
        yield Locked(
            s3,
            {
                KEY: key["AccessKeyId"],
                KEY_SECRET: key["SecretAccessKey"],
                ENDPOINT: s3.endpoint,
                **QUIET,
            },
        )
    finally:  # moto keeps this for all servers of a process
        requests.post(f"{s3.endpoint}/moto-api/reset-auth", data=b"inf", timeout=10)
        server.stop()
