"""Rendezvous of the ranks at MASTER_ADDR:MASTER_PORT, with a time limit, over the network interface that reaches it."""

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tf.parallel.launch import LaunchError, number_of

Check = Callable[[dist.Store, int, int], None]
"""Called with the store, this rank and the world size right after the rendezvous; it may raise."""

_GRACE_SECONDS = 2.0  # after the limit, for the error of the wait that reached it to arrive
_RESOLVE_SECONDS = 10.0
_SIOCGIFADDR = 0x8915  # the ioctl that returns an interface's IPv4 address on Linux
_OUTSIDE = "192.0.2.1"  # reserved for documentation: finds the interface of the default route without sending anything


def join_ranks(
    backend: str, device: torch.device, *, timeout: timedelta, limit: timedelta, check: Check | None
) -> dist.Store:
    """Join the other ranks, initialize the default process group with `timeout`, and return the ranks' store.

    Raises LaunchError, which gives the address and the cause, if the ranks do not connect within `limit`.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    rank, size = number_of("RANK"), number_of("WORLD_SIZE")
    number_of("MASTER_PORT")  # torch's own error would not name the variable
    if not 0 <= rank < size:
        raise LaunchError(f"RANK is {rank} of WORLD_SIZE {size}: ranks count from 0 to {size - 1}")
    _resolve(os.environ.get("MASTER_ADDR", ""), min(_RESOLVE_SECONDS, limit.total_seconds()))
    _choose_interface()
    joining = _Joining(backend, device, timeout=timeout, limit=limit, check=check)
    # a thread: C++ waits without handling signals, or any timeout if another program listens on the port
    joining.start()
    seconds = limit.total_seconds() + _GRACE_SECONDS
    if not joining.has_met.wait(seconds):
        raise LaunchError(
            f"no answer from the first rank at {address} within {limit.total_seconds():.0f} s: another program listens "
            f"on that port, or the first rank is late; choose another MASTER_PORT"
        )
    # the ranks have met at the store; now they connect to each other
    joining.join(seconds)
    if joining.error is not None:
        explained = _explain(joining.error, address=address, size=size, limit=limit)
        if explained is joining.error:
            raise explained
        raise explained from joining.error
    if joining.store is None:
        raise LaunchError(f"the ranks met at {address}, but do not connect to each other: {_INTERFACE}")
    return joining.store


_INTERFACE = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface that all nodes share"


class _Joining(threading.Thread):
    """A thread that joins the other ranks; the result is in `store` or `error`."""

    def __init__(
        self, backend: str, device: torch.device, *, timeout: timedelta, limit: timedelta, check: Check | None
    ) -> None:
        # a daemon: a wait in C++ can't be interrupted, and would keep a rank that gives up from exiting
        super().__init__(daemon=True, name="rendezvous")
        self.backend = backend
        self.device = device
        self.timeout = timeout
        self.limit = limit
        self.check = check
        self.has_met = threading.Event()
        self.store: dist.Store | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.store = self._join()
        except Exception as error:  # raised again in the main thread
            self.error = error
        finally:
            self.has_met.set()

    def _join(self) -> dist.Store:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            store, rank, size = next(rendezvous("env://", timeout=self.limit))
        except ValueError as error:  # raised by torch; it names the missing environment variable
            raise LaunchError(str(error)) from error
        self.has_met.set()
        # torchrun's store survives a restart: without a prefix, an attempt could read the addresses of the previous one
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # before groups are created: ranks that do not match learn so through the store alone
        if self.check is not None:
            self.check(store, rank, size)
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=size, timeout=self.timeout)
        # until now, the store's timeout was the limit for ranks to arrive
        store.set_timeout(self.timeout)
        return store


def _explain(error: Exception, *, address: str, size: int, limit: timedelta) -> Exception:
    text = str(error)
    lines = text.splitlines() or [repr(error)]
    if not isinstance(error, RuntimeError):  # torch's communication errors are RuntimeErrors
        return error
    if "EADDRINUSE" in text or "ddress already in use" in text:
        return LaunchError(f"the port of {address} is in use by another program: choose another MASTER_PORT")
    if "imed out" in text or "imeout" in text:
        return LaunchError(
            f"not all {size} ranks connected to {address} within {limit.total_seconds():.0f} s: check the logs of the "
            f"other ranks, and that all have the same MASTER_ADDR and MASTER_PORT ({lines[0][:160]})"
        )
    if "gloo" in text.lower():
        return LaunchError(
            f"the ranks met at {address}, but can't connect to each other ({lines[0][:160]}): {_INTERFACE}"
        )
    return LaunchError(f"the rendezvous at {address} failed: {lines[0][:300]}")


def _resolve(host: str, seconds: float) -> None:
    """Check that the host name resolves, with retries, as a name server can be late when a job starts.

    Raises LaunchError if it does not resolve.
    """
    deadline = time.monotonic() + seconds
    while host:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() < deadline and isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                time.sleep(0.5)
                continue
            raise LaunchError(
                f"MASTER_ADDR {host} (port {os.environ.get('MASTER_PORT')}) can't be resolved on this host: {error}"
            ) from None
        return


def _choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the interface that reaches the first rank if this host's name is a loopback address.

    Debian maps it to 127.0.1.1, where gloo would wait for the other nodes forever.
    """
    on_one_host = number_of("LOCAL_WORLD_SIZE", 0) == number_of("WORLD_SIZE")
    if "GLOO_SOCKET_IFNAME" in os.environ or on_one_host or not _is_loopback(_address_of(socket.gethostname())):
        return
    master = _address_of(os.environ.get("MASTER_ADDR", ""))
    if _is_loopback(master) and "LOCAL_WORLD_SIZE" not in os.environ:
        return  # ranks on one host, started manually
    for target in (master, _OUTSIDE):
        source = None if target is None else _source_towards(target)
        if not _is_loopback(source) and (name := _interface_of(source)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.")


def _source_towards(target: str) -> str | None:
    """Return the local address of the route to `target`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # connecting a datagram socket only looks up the route
            probe.connect((target, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def _interface_of(address: str | None) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # an ifreq: the name, then a sockaddr_in whose address starts at byte 20
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
