"""systemd's notification protocol: readiness, status line, watchdog. Silent outside systemd."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends datagrams to `$NOTIFY_SOCKET`; a no-operation when that is not set."""

    def __init__(self) -> None:
        # Taken out of the environment: no child may speak for us.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        pid = os.environ.pop("WATCHDOG_PID", "")
        interval_us = os.environ.pop("WATCHDOG_USEC", "")
        is_ours = not pid or pid == str(os.getpid())
        self.watchdog_s: float | None = None
        """Longest silence that systemd accepts; None: no watchdog."""
        if self._address and is_ours and interval_us.isdigit() and int(interval_us) > 0:
            self.watchdog_s = int(interval_us) / 1e6

    def ready(self, status: str) -> None:
        """Start-up, or a reload, is done."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def watchdog(self) -> None:
        """We are alive."""
        self._send("WATCHDOG=1")

    def reloading(self, monotonic_ns: int) -> None:
        """The configuration is being read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_ns // 1000}")

    def stopping(self) -> None:
        """An orderly stop has begun."""
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.connect(address)
                channel.sendall(text.encode())
            except OSError:
                return  # systemd restarts us when it misses the watchdog; nothing to do here
