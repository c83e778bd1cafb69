"""The memory that the machine has left for this process."""

from __future__ import annotations

import sys
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate: what the system has free or can free, within the limits of its
    control group (a container's) and of `ulimit -v`. None if the system is not Linux or does not say.

    root: the directory that contains proc and sys.
    """
    if not sys.platform.startswith("linux"):
        return None
    found = []
    if (kilobytes := _fields(root / "proc/meminfo").get("MemAvailable:")) is not None:
        found.append(1024 * kilobytes)
    found += _group_limits(root)
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and (used := _fields(root / "proc/self/status").get("VmSize:")) is not None:
        found.append(limit - 1024 * used)
    return max(0, min(found)) if found else None


def _group_limits(root: Path) -> list[int]:
    """The bytes left in this process's memory control group and in each of its parents (cgroup v2 or v1)."""
    lines = _text(root / "proc/self/cgroup").splitlines()
    groups = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    left = []
    for _, controllers, path in groups:
        if controllers == "":
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (top / inner, *(top / parent for parent in inner.parents)):
            numbers = [_text(group / name).strip() for name in (limit, usage)]
            if all(number.isdecimal() for number in numbers):  # "max": no limit
                cache = _fields(group / "memory.stat")  # the cache of files is freed if memory is short
                left.append(int(numbers[0]) - int(numbers[1]) + cache.get("inactive_file", 0))
    return left


def _fields(path: Path) -> dict[str, int]:
    """The lines "NAME NUMBER ..." of a file; none if it cannot be read."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
