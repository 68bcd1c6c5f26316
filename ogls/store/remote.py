"""Opens the object store that a root names: `s3://bucket/path`, `gs://`, `az://`, or `memory://name` for tests."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, S3Store, from_url

from ogls.errors import ConfigError

_RETRIES = 10  # with the back-off of obstore about a minute in total, for stores that throttle requests (SlowDown)
_TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "30m", "allow_http": True}
_S3_OPTIONS = ("endpoint_override", "region", "scheme")
_MEMORY = MemoryStore()  # the objects of all memory:// roots of this process


def open_store(root: str) -> tuple[obstore.store.ObjectStore, str, str]:
    """The store of `root`, the path of `root` in it, and its URL without options.

    Raises ConfigError for an unknown scheme, an unknown option, or credentials in the URL.
    """
    url = urlsplit(root)
    base, path = f"{url.scheme}://{url.netloc}{url.path}".rstrip("/"), url.path.strip("/")
    if url.scheme == "memory":
        return _MEMORY, f"{url.netloc}/{path}".rstrip("/"), base
    if url.scheme not in ("s3", "gs", "az"):
        raise ConfigError(
            f"root: {url.scheme}:// is not supported; set root to a local folder, s3://bucket/path, gs://bucket/path "
            "or az://container/path"
        )
    options = dict(parse_qsl(url.query))
    allowed = _S3_OPTIONS if url.scheme == "s3" else ()
    if unknown := sorted(set(options) - set(allowed)) or ([url.username] if url.username else []):
        raise ConfigError(
            f"root: {unknown[0]} is not allowed in the URL of a store (allowed for S3: {', '.join(_S3_OPTIONS)}); "
            "credentials come from the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    settings: Any = {"client_options": _TIMEOUTS, "retry_config": {"max_retries": _RETRIES}}
    if url.scheme != "s3":
        try:
            return from_url(f"{url.scheme}://{url.netloc}", **settings), path, base
        except BaseError as error:
            raise ConfigError(
                f"root: {base}: {str(error).splitlines()[0]}; credentials and, for Azure, the account come from the "
                "environment (AZURE_STORAGE_ACCOUNT_NAME, GOOGLE_APPLICATION_CREDENTIALS)"
            ) from None
    if endpoint := options.get("endpoint_override"):
        settings["endpoint"] = endpoint if "://" in endpoint else f"{options.get('scheme', 'https')}://{endpoint}"
    if region := options.get("region"):
        settings["region"] = region
    return S3Store(url.netloc, **settings), path, base
