"""How ranks meet: at MASTER_ADDR:MASTER_PORT, within a limit of time, over the interface that leads there."""

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
"""Called with the store, this rank and the number of ranks as soon as they have met; it may raise."""

_GRACE_SECONDS = 2.0  # beyond the limit, for the error of the wait that ran into it
_RESOLVE_SECONDS = 10.0
_SIOCGIFADDR = 0x8915  # asks Linux for an interface's IPv4 address
_OUTSIDE = "192.0.2.1"  # an address of documentation: which interface leads out, without sending anything


def meet(
    backend: str, device: torch.device, *, timeout: timedelta, limit: timedelta, check: Check | None
) -> dist.Store:
    """Join the other ranks and make the default process group, whose waits end after `timeout`; the ranks' store.

    Raises LaunchError with the address and what is wrong there where the ranks do not meet within `limit`.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    rank, size = number_of("RANK"), number_of("WORLD_SIZE")
    number_of("MASTER_PORT")  # torch would say "invalid literal" without the name
    if not 0 <= rank < size:
        raise LaunchError(f"RANK is {rank} of WORLD_SIZE {size}: ranks count from 0 to {size - 1}")
    _resolve(os.environ.get("MASTER_ADDR", ""), min(_RESOLVE_SECONDS, limit.total_seconds()))
    _choose_interface()
    joining = _Joining(backend, device, timeout=timeout, limit=limit, check=check)
    # C++ waits without looking at signals or, where something else listens at the port, at the time: hence a thread
    joining.start()
    seconds = limit.total_seconds() + _GRACE_SECONDS
    if not joining.has_met.wait(seconds):
        raise LaunchError(
            f"no answer from the first rank at {place} within {limit.total_seconds():.0f} s: something else listens at "
            f"that port, or the first rank is late; choose another MASTER_PORT"
        )
    # the ranks have met: what is left is to connect to each other
    joining.join(seconds)
    if joining.error is not None:
        raise _explained(joining.error, place=place, size=size, limit=limit) from joining.error
    if joining.store is None:
        raise LaunchError(f"the ranks met at {place}, but do not connect to each other: {_INTERFACE}")
    return joining.store


_INTERFACE = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface that all nodes share"


class _Joining(threading.Thread):
    """Meets the other ranks; `store` or `error` is the outcome."""

    def __init__(
        self, backend: str, device: torch.device, *, timeout: timedelta, limit: timedelta, check: Check | None
    ) -> None:
        # a daemon, since a wait in C++ can't be interrupted: a rank that gives up could not end otherwise
        super().__init__(daemon=True, name="meeting")
        self.backend = backend
        self.device = device
        self.timeout = timeout
        self.limit = limit
        self.check = check
        self.has_met = threading.Event()
        self.store: dist.Store | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Called by Thread."""
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
        except ValueError as error:  # torch's, naming the environment variable that is missing
            raise LaunchError(str(error)) from error
        self.has_met.set()
        # torchrun's store outlives a restart: without a name of its own an attempt can read the addresses of the one
        # before
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # before groups are made: where ranks do not fit together, that needs no network beyond the store
        if self.check is not None:
            self.check(store, rank, size)
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=size, timeout=self.timeout)
        # until now it waited for as long as ranks may take to come
        store.set_timeout(self.timeout)
        return store


def _explained(error: Exception, *, place: str, size: int, limit: timedelta) -> Exception:
    text = str(error)
    lines = text.splitlines() or [repr(error)]
    if not isinstance(error, RuntimeError):  # of which torch's errors of communication are
        return error
    if "EADDRINUSE" in text or "ddress already in use" in text:
        return LaunchError(f"the port of {place} is taken by another program: choose another MASTER_PORT")
    if "imed out" in text or "imeout" in text:
        return LaunchError(
            f"not all of the {size} ranks came to {place} within {limit.total_seconds():.0f} s: see what the others "
            f"say, and that all have the same MASTER_ADDR and MASTER_PORT ({lines[0][:160]})"
        )
    if "gloo" in text.lower():
        return LaunchError(
            f"the ranks met at {place}, but can't connect to each other ({lines[0][:160]}): {_INTERFACE}"
        )
    return LaunchError(f"the ranks did not meet at {place}: {lines[0][:300]}")


def _resolve(host: str, seconds: float) -> None:
    """Raise LaunchError where the name of a host is unknown; a name server can be late when a job starts."""
    deadline = time.monotonic() + seconds
    while host:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() < deadline and isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                time.sleep(0.5)
                continue
            raise LaunchError(
                f"MASTER_ADDR {host} (port {os.environ.get('MASTER_PORT')}) is no host that this one knows: {error}"
            ) from None
        return


def _choose_interface() -> None:
    """Let gloo use the interface that leads to the first rank where this host's own name leads nowhere: Debian maps it
    to 127.0.1.1, and gloo would wait for the other nodes there."""
    on_one_host = number_of("LOCAL_WORLD_SIZE", 0) == number_of("WORLD_SIZE")
    if "GLOO_SOCKET_IFNAME" in os.environ or on_one_host or not _is_loopback(_address_of(socket.gethostname())):
        return
    master = _address_of(os.environ.get("MASTER_ADDR", ""))
    if _is_loopback(master) and "LOCAL_WORLD_SIZE" not in os.environ:
        return  # ranks of one host, started by hand
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
    """This host's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # of a datagram socket: this only looks up the route
            probe.connect((target, 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def _interface_of(address: str | None) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # an ifreq: the name, then a sockaddr_in whose address begins at byte 20
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
