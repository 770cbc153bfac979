"""Who may use a service and where it is: environment variables, the token, loopback or not."""

from __future__ import annotations

import ipaddress
import logging
import os
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.semantics.settings import ServiceConfig

URL = "GLIDER_DIST_SERVICE_URL"
TOKEN = "GLIDER_DIST_SERVICE_TOKEN"
PARENT = "GLIDER_DIST_SERVICE_PARENT"  # process id of the job that started the service


def read_token(settings: ServiceConfig) -> str | None:
    """The bearer token from the environment or ``service.token_file``; None if there is none.

    Raises:
        GliderError: the file cannot be read or is empty, or the token has characters that HTTP does not take.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token and settings.token_file:
        try:
            token = Path(settings.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise GliderError(f"service.token_file {settings.token_file} cannot be read") from None
        if not token:
            raise GliderError(f"service.token_file {settings.token_file} is empty")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise GliderError("the service's token must be printable ASCII without spaces")
    return token or None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_unspecified(host: str) -> bool:
    """Whether it stands for all addresses of this machine (0.0.0.0, ::), which leads others to themselves."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def keep_addresses_out_of_logs() -> None:
    """HTTP clients note every request's address at INFO, and a run's log takes INFO from all."""
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)
