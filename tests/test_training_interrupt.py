"""Workers end with the process that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fastff

PROGRAM = """
import importlib.util, multiprocessing, os, sys, time
spec = importlib.util.spec_from_file_location("interrupt", sys.argv[1])
interrupt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupt)

def work(pipe):
    interrupt.end_with_parent()
    pipe.send(os.getpid())
    while True:
        sum(range(1000))

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True).start()
    print(ours.recv(), flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and ") Z " in state.read_text())


def test_a_worker_ends_at_once_when_its_parent_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    source = Path(fastff.__file__).parent / "train" / "interrupt.py"
    parent = subprocess.Popen([sys.executable, program, source], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.kill()
    end = time.monotonic() + 5
    while alive(worker) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(worker)
