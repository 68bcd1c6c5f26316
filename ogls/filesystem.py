"""Where a store may lie: a directory, `s3://bucket/path`, or any other fsspec URL.

S3 goes through pyarrow's own client, with the endpoint in the environment (`AWS_ENDPOINT_URL`) or in the URL as
pyarrow has it: `s3://bucket/path?endpoint_override=http://127.0.0.1:9000&region=us-east-1`. Credentials come from
the environment or the machine's role, as the AWS tools take them.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import fsspec
from fsspec import AbstractFileSystem

from ogls.errors import ConfigError

_ATTEMPTS = 8  # waiting about a minute in all: stores that say "slow down" mean it
_CONNECT_SECONDS, _REQUEST_SECONDS = 10, 60
_S3_OPTIONS = ("endpoint_override", "region", "scheme")


def open_root(root: str) -> tuple[AbstractFileSystem, str]:
    """A file system and the path of `root` in it. Raises ConfigError for an S3 URL with an unknown option."""
    if not root.startswith("s3://"):
        fs, path = fsspec.core.url_to_fs(root)
        return fs, str(path)
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    url = urlsplit(root)
    options = dict(parse_qsl(url.query))
    if unknown := sorted(set(options) - set(_S3_OPTIONS)) or ([url.username] if url.username else []):
        raise ConfigError(
            f"root: {unknown[0]} cannot stand in an S3 URL; it takes {', '.join(_S3_OPTIONS)}, and credentials come "
            "from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    s3 = S3FileSystem(
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        **options,
    )
    return ArrowFSWrapper(s3), (url.netloc + url.path).rstrip("/")
