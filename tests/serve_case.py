"""Starts servers for test_serve.py: each is a fork of this process, which has the imports behind it.

Reads `start FOLDER PORT` and answers with a process id; `wait PID` with its exit code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fastff.engine.encode
import fastff.serve.service  # noqa: F401
from fastff.serve import ServeSettings
from fastff.serve.server import serve


def start(folder, port):
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        os._exit(serve(ServeSettings(Path(folder), port=int(port), threads=1, name="small"), say=lambda _: None))
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(int(pid), 0)[1])


for line in sys.stdin:
    word, *rest = line.split()
    print({"start": start, "wait": wait}[word](*rest), flush=True)
