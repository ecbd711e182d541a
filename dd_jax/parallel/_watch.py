"""Notices at once that another process is gone, and ends this one with a sentence.

JAX alone leaves the others waiting for minutes where no collective fails, and aborts them with a
stack trace where its coordinator is gone. So JAX's own connections pass through a relay here:

    process 0     the others -> relay at HOST:PORT -> JAX's coordinator, at a port of this machine
    the others    JAX's client -> relay, at a port of this machine -> HOST:PORT of process 0

The operating system closes the connections of a process that ends, however it ends; keepalive
probes find a machine that is gone (on Linux within 25 seconds). The relay of the others keeps JAX's
own connection open then, so that JAX does not abort before the sentence is said.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

# For a connection that is made anew, and for this process to end by itself meanwhile.
SECONDS_OF_GRACE = 2.0
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
BUFFER_SIZE = 2**16
STANDARD_ERROR = 2
LOST = (
    "Another process has ended; what it says tells why. Rerun the command in all processes to "
    "resume from the latest checkpoint."
)


class Watch:
    """A relay that counts its connections to other processes.

    target: where it relays to. num_others: how many connections there are while all live.
    is_primary: whether this is process 0, so that connections come from the others.
    """

    def __init__(self, target: tuple[str, int], num_others: int, *, is_primary: bool) -> None:
        self._target, self._num_others, self._is_primary = target, num_others, is_primary
        self._num_open, self._is_armed = 0, False
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []

    def listen(self, port: int) -> int:
        """Begins to relay from this port, of all interfaces in process 0; 0: any port that is free.

        Returns the port; OSError where it cannot be had.
        """
        make = _listen_everywhere if self._is_primary else _listen_here
        listening = make(port)
        _in_background(self._accept, listening)
        return listening.getsockname()[1]

    def arm(self) -> None:
        """From now on, a connection less means that another process has ended."""
        self._is_armed = True
        _in_background(self._look)

    def disarm(self) -> None:
        """Says nothing any more: this process ends by itself, or has finished."""
        self._is_armed = False

    def _accept(self, listening: socket.socket) -> None:
        while True:
            _in_background(self._relay, listening.accept()[0])

    def _relay(self, here: socket.socket) -> None:
        try:
            there = socket.create_connection(self._target)
        except OSError:  # Nobody is there yet; JAX tries again.
            here.close()
            return
        other, own = (here, there) if self._is_primary else (there, here)
        _probe(other)
        self._count(+1)
        _in_background(_pump, own, other, True)
        _pump(other, own, False)
        self._count(-1)
        if self._is_armed and not self._is_primary:
            self._held.append(own)
        else:
            _close(own)
        self._look()

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_open += change

    def _look(self) -> None:
        """Ends this process unless all others are connected, or are again in a moment."""
        if self._is_armed and self._num_open < self._num_others:
            time.sleep(SECONDS_OF_GRACE)
            if self._is_armed and self._num_open < self._num_others:
                _end(LOST)


def free_port() -> int:
    """A port of this machine that is free now."""
    with _listen_here(0) as listening:
        return listening.getsockname()[1]


def _end(sentence: str) -> None:
    """Ends this process at once, from a thread that is not its main one, with exit code 1."""
    with contextlib.suppress(OSError):
        os.write(STANDARD_ERROR, f"\nerror: {sentence}\n".encode())
    os._exit(1)


def _in_background(function: Callable, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _listen_here(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _pump(source: socket.socket, target: socket.socket, close_target: bool) -> None:
    """Passes on what comes, until one of the two is closed."""
    with contextlib.suppress(OSError):
        while received := source.recv(BUFFER_SIZE):
            target.sendall(received)
    if close_target:
        _close(target)


def _close(connection: socket.socket) -> None:
    """Closes it for the other thread, too, which may be waiting for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _probe(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
