"""What this machine allows a process: memory, and open files."""

import os
import resource
from contextlib import suppress
from pathlib import Path


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping, as the kernel estimates them."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS shows the total, not what is free: half of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def usable_memory() -> int:
    """Return the bytes that a plan may count on: four fifths of the available memory."""
    return int(0.8 * available_memory())


def allow_more_files() -> None:
    """Raise this process's limit of open files as far as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS allows less than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
