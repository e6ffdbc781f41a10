"""How an etcd is reached. Apart from etcd.py, which costs 20 MiB of gRPC."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from clustermesh.kv import PAGE

DEFAULT_PORT = 2379
TIMEOUT_S = 4.0  # a member that does not answer one request within this is left
STALL_S = 120.0  # a watch whose revision does not rise for this long is asked about
PROGRESS_S = 1.75  # a member that hangs is left after two unanswered questions, within 5 s


class EtcdSettingsError(ValueError):
    """The settings can never work; the message names the one that is wrong."""


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach a store. Paths are re-read at every connection, so that certificates can be rotated."""

    endpoints: tuple[str, ...]  # http(s)://host:port
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""  # expected in the server's certificate, if it is not the endpoint's host
    username: str = ""
    password: str = field(default="", repr=False)
    insecure_transport: bool = False  # http:// endpoints on other machines are meant
    timeout_s: float = TIMEOUT_S
    progress_s: float = PROGRESS_S
    stall_s: float = STALL_S
    page: int = PAGE

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise EtcdSettingsError("etcd.endpoints: empty, expected at least one like https://host:2379")
        for endpoint in self.endpoints:
            tls, host, _ = split_endpoint(endpoint)
            if not (tls or self.insecure_transport or is_loopback(host)):
                raise EtcdSettingsError(
                    f"etcd.endpoints: {endpoint!r} is not encrypted: use https://, or set insecure_transport"
                )
        if bool(self.cert) != bool(self.key):
            given, missing = ("cert", "key") if self.cert else ("key", "cert")
            raise EtcdSettingsError(f"etcd.{given} is set but etcd.{missing} is not: both or neither")
        if (self.ca or self.cert) and not all(one.startswith("https:") for one in self.endpoints):
            raise EtcdSettingsError("etcd.ca and etcd.cert need https:// endpoints")
        if self.password and not self.username:
            raise EtcdSettingsError("etcd.password is set but etcd.username is not")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names or addresses of all endpoints."""
        return tuple(split_endpoint(endpoint)[1] for endpoint in self.endpoints)

    @property
    def ports(self) -> set[int]:
        """Of all endpoints."""
        return {split_endpoint(endpoint)[2] for endpoint in self.endpoints}


def split_endpoint(endpoint: str) -> tuple[bool, str, int]:
    """Whether an endpoint uses TLS, its host and its port. Raises EtcdSettingsError."""
    parts = urlsplit(endpoint)
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        port = 0
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port or parts.path not in {"", "/"}:
        raise EtcdSettingsError(f"etcd.endpoints: {endpoint!r} is not like https://host:2379")
    return parts.scheme == "https", parts.hostname, port


def is_loopback(host: str) -> bool:
    """Whether nobody on the network can listen in."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
