"""
Starts quartet.py in several processes at once, as torchrun does, but in a tenth of the time: torch
is imported once, and every process is forked from here. Only what torchrun itself does is missing:
here no process is ended because another one was. So torchrun can start this file, too.

It reads a launch a line from stdin, a JSON object, and answers each with a line:

    argv        the command line of quartet.py
    n           number of processes; 0: one process that no launcher has started
    plant       Python code that every process executes first; RANK is its rank there
    folder      where 0.out, 0.err, 1.out ... go: what each process prints
    seconds     after which all are killed

The answer is a list of exit codes by rank, as subprocess gives them; null: it did not end in time.
A process that torchrun has started takes argv from its command line, and plant from $PLANT.
"""
import dataclasses
import json
import os
import signal
import socket
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import quartet
from tools import ablation, cli, report     # The ablation, so that no process has to import it.


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_runs_short():
    """A run takes a tenth of the time of tiny's, and leaves no picture."""
    tiny = quartet.PRESETS["tiny"]
    quartet.PRESETS["tiny"] = dataclasses.replace(tiny, n_layer=1, n_embd=64, n_head=1)
    report.draw_curves = lambda path, histories: "no picture"


def environment(rank, n, port):
    """Returns what torchrun tells a process."""
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def become_quartet(argv, plant):
    """Ends this process as quartet.py does, after it has executed the plant."""
    sys.argv = ["quartet.py", *argv]
    code = 1
    try:
        exec(plant, {"RANK": int(os.environ.get("RANK", 0)), "quartet": quartet})
        cli.start(quartet.parse)
        code = quartet.run_cli(argv)
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become_process(launch, rank, port):
    """What a forked process does."""
    if launch["n"]:
        os.environ.update(environment(rank, launch["n"], port))
    for number, name in ((1, "out"), (2, "err")):
        path = os.path.join(launch["folder"], f"{rank}.{name}")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    become_quartet(launch["argv"], launch["plant"])


def start(launch):
    """Returns the ids of the processes, by rank."""
    port = free_port()
    ids = []
    for rank in range(max(1, launch["n"])):
        process = os.fork()
        if process == 0:
            become_process(launch, rank, port)
        ids.append(process)
    return ids


def wait(ids, seconds):
    """Returns the exit codes. Processes that do not end in time are killed; theirs is None."""
    codes = dict.fromkeys(ids)
    deadline = time.monotonic() + seconds
    while None in codes.values() and time.monotonic() < deadline:
        for process in [process for process in ids if codes[process] is None]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
        time.sleep(.005)
    for process in [process for process in ids if codes[process] is None]:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return list(codes.values())


if __name__ == "__main__":
    make_runs_short()
    if cli.is_one_of_many():
        become_quartet(sys.argv[1:], os.environ.get("PLANT", ""))
    for line in sys.stdin:
        launch = json.loads(line)
        print(json.dumps(wait(start(launch), launch["seconds"])), flush=True)
