"""A process that has loaded torch and forks itself for each file of answers.

Loading takes seconds, a fork milliseconds. As a program it answers requests, one line of JSON each,
until its input is closed:

    ["start", FOLDER, PACKAGE, "open" or "closed", MEMORY]    the pid of a process that runs sandbox
    ["poll", PID]                                             its exit status, or null while it runs

or with a text, if the system refuses.

This process never loads any part of a file of answers: answers run in the forked ones, which
share no memory with it.
"""

import json
import os
import sys
import tempfile

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import sandbox  # by its path

sys.path.pop()


def start(folder: str, package: str, book: str, memory: str) -> int:
    """Fork a process that runs the answers in a folder; its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):  # which carry the requests and replies
            os.dup2(null, stream)
        os.chdir(folder)
        os.environ["TMPDIR"] = os.environ["MPLCONFIGDIR"] = tempfile.tempdir = folder
        sandbox.main(folder, package, book, memory)
        status = 0
    finally:
        os._exit(status)


def poll(pid: int) -> int | None:
    """The exit status of a process, negative for a signal; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    sandbox.load()
    reply: int | str | None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            reply = start(*arguments) if name == "start" else poll(*arguments)
        except OSError as error:  # no more processes, or no memory for one
            reply = error.strerror or str(error)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve()
