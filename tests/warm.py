"""A Python that has imported what takes seconds, and forks for every program that it is asked to run.

A line of JSON is asked and one answered: for a program, {"argv", "env", "output"}, the id of the process, in a session
of its own, in which it runs as ``python argv...`` would; for the id of one that has ended, its exit code.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

import cosmos_ssl.engine.trainer  # noqa: F401

torch.optim.AdamW([torch.zeros(1)])  # the first one imports torch's compiler


def become(argv, env, output):
    """Be a process that was started as this program, with what it says in a file."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    told = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(told, stream)
    os.close(told)
    sys.argv[:] = argv
    sys.path[0] = str(Path(argv[0]).parent)


for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        answer = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
    elif (answer := os.fork()) == 0:
        become(**asked)
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(answer, flush=True)
