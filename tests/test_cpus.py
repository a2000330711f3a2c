"""csrc/base/cpus.cpp: how many processors threads <= 0 means; control groups simulated in folders."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastff.ops import library

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    to = tmp_path_factory.mktemp("cpus") / "check_cpus"
    sources = [str(ROOT / "tests" / "c" / "check_cpus.cpp"), str(ROOT / "csrc" / "base" / "cpus.cpp")]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *sources, "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return to


def processors(program, tmp_path, memberships, files, available=64):
    """What the core finds with these lines in /proc/self/cgroup and these files under /sys/fs/cgroup."""
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    lines = tmp_path / "memberships"
    lines.write_text(memberships)
    done = subprocess.run([program, str(available), lines, root], capture_output=True, text=True, check=True)
    return int(done.stdout)


def v1(folder, quota, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


JOINT = "9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"
CASES = {
    "v2, half a processor": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "v2, two": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2, two and a half: two whole ones": ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
    "v2, another period": ("0::/\n", {"cpu.max": "60000 20000\n"}, 3),
    "v2, none": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 64),
    "v2, no files": ("0::/a/b\n", {}, 64),
    "v2, of the group itself": ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n"}, 2),
    "v2, of a group above": ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
    "v2, the least of several": ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "500000 100000\n"}, 2),
    "v2, of another group": ("0::/a\n", {"b/cpu.max": "200000 100000\n", "a/cpu.max": "max 100000\n"}, 64),
    "v2, a path of the host": ("0::/docker/a\n", {"cpu.max": "200000 100000\n"}, 2),
    "v2, more than there are": ("0::/\n", {"cpu.max": "12800000 100000\n"}, 64),
    "v2, damaged": ("0::/\n", {"cpu.max": "many\n"}, 64),
    "v1, half a processor": ("4:cpu,cpuacct:/\n", v1("cpu,cpuacct", 50000), 1),
    "v1, two": (JOINT, v1("cpu,cpuacct/docker/a", 200000), 2),
    "v1, a path of the host": (JOINT, v1("cpu", 200000), 2),
    "v1, none": (JOINT, v1("cpu,cpuacct/docker/a", -1), 64),
    "v1, another controller": ("4:cpuset:/\n", v1("cpuset", 200000), 64),
    "both mounted": ("4:cpu:/\n0::/\n", v1("cpu", 200000), 2),
    "no control groups": ("", {}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas_of_control_groups_count(case, program, tmp_path):
    memberships, files, expected = CASES[case]
    assert processors(program, tmp_path, memberships, files) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity masks")
def test_the_affinity_of_the_process_counts(program):
    one = min(os.sched_getaffinity(0))
    limited = subprocess.run(
        [program], capture_output=True, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {one})
    )
    assert int(limited.stdout) == 1


def test_torch_threads_stay_within_a_quota_that_torch_does_not_know(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    within = library.threads_within
    assert (within(1, 64)(), within(2, 64)()) == (1, 2)
    assert within(64, 64)() == 64
    assert within(2, 2)() == 64  # no quota: what was asked of torch stands, sensible or not
