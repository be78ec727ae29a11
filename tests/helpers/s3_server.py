"""A real S3 server on loopback (moto's), in a process of its own that ends with ours.

`python tests/helpers/s3_server.py` prints its port, and serves until its standard input ends. It keeps objects in memory.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"
SECRET = "a-secret-of-the-tests"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which `s3://bucket` is a new server's empty bucket."""
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "testing-id", "AWS_SECRET_ACCESS_KEY": SECRET}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin and process.stdout
    try:
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "testing-id", "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
    finally:
        process.stdin.close()
        process.wait(20)


def serve() -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    print(port, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    serve()
