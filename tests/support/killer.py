"""A process that kills itself at the event of the number in its second argument."""

import os
import signal
import sys
from collections.abc import Callable

left = int(sys.argv[2])


def counted(function: Callable) -> Callable:
    """The function, whose calls are events: the process dies just before the chosen one."""

    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def events() -> int:
    """How many events there have been."""
    return int(sys.argv[2]) - left


os.fsync, os.replace, os.unlink = map(counted, (os.fsync, os.replace, os.unlink))
