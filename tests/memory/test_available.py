"""The memory that is left, in every way that a system limits it."""

import sys

import pytest

from refqlora.memory import available
from refqlora.memory.available import available_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says")

MEMINFO = "MemTotal:       100000 kB\nMemFree:    1 kB\nMemAvailable:   50000 kB\n"


def write(root, files):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_this_machine_says():
    assert 0 < available_bytes() < 2**50


V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 50_000 * 1024),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "7\n"}, 50_000 * 1024),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "1000\n", f"{V2}/memory.current": "600\n"}, 400),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "1\n",
                f"{V2}/a/memory.max": "1000\n",  # of the group around
                f"{V2}/a/memory.current": "900\n",
                f"{V2}/a/memory.stat": "anon 5\ninactive_file 300\nslab 9\n",
            },
            400,
        ),
        (
            {
                "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/x\n",
                f"{V1}/x/memory.limit_in_bytes": "5000\n",
                f"{V1}/x/memory.usage_in_bytes": "6000\n",
            },
            0,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, 50_000 * 1024),
        ({"proc/meminfo": "MemAvailable: many kB\n"}, None),
    ],
)
def test_the_least_of_what_the_limits_leave(files, expected, tmp_path, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert available_bytes(write(tmp_path, files)) == expected


def test_a_limit_of_the_address_space(tmp_path, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (3000 * 1024, resource.RLIM_INFINITY))
    root = write(tmp_path, {"proc/self/status": "Name:\tx\nVmSize:\t    1000 kB\n"})
    assert available_bytes(root) == 2000 * 1024


def test_other_systems_do_not_say(monkeypatch):
    monkeypatch.setattr(available.sys, "platform", "darwin")
    assert available_bytes() is None
