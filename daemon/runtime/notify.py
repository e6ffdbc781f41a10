"""sd_notify: the service manager is told what we do. Silent where there is none."""

import os
import socket
import time


class Notify:
    """Sends states to the socket that systemd named in NOTIFY_SOCKET."""

    def __init__(self, address: str | None = None) -> None:
        where = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._address = "\0" + where[1:] if where.startswith("@") else where
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )

    def send(self, *states: str) -> bool:
        """Whether the states reached somebody."""
        if not self._address:
            return False
        try:
            self._socket.sendto("\n".join(states).encode(), self._address)
        except OSError:  # a manager that does not listen must not take us down
            return False
        return True

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        self.send(f"STATUS={text}")

    def reloading(self) -> None:
        """`ready` ends it. systemd wants the time at which it began."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def alive(self) -> None:
        """For the watchdog."""
        self.send("WATCHDOG=1")


def watchdog_s() -> float | None:
    """How often `alive` must be sent at least, or None; WATCHDOG_PID may mean another process."""
    pid, usec = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6
