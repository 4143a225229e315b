"""What Windows lacks, hidden."""

import builtins
import errno
import io
import os
import signal
import subprocess
import sys

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
OS = (
    "O_DIRECTORY O_NOFOLLOW O_NONBLOCK chown fchmod fchown fork forkpty getegid geteuid getgid "
    "getgroups getloadavg getpgid getpgrp getpriority getsid getuid killpg lchown mkfifo nice "
    "openpty pathconf posix_spawn sched_getaffinity sched_setaffinity setpgid setsid setuid "
    "sysconf sysconf_names uname wait3 wait4"
).split()
SIGNALS = "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm pthread_kill pause"


def hide(patch) -> None:
    """Hide it by `patch`, a pytest.MonkeyPatch; undone by its `undo`."""
    import fcntl

    for name in OS:
        patch.delattr(os, name, raising=False)
    for name in SIGNALS.split():
        patch.delattr(signal, name, raising=False)
    for name in MODULES:
        patch.setitem(sys.modules, name, None)
    os_open, os_fsync, os_rename, access = os.open, os.fsync, os.rename, fcntl.fcntl

    def open_file(original):
        def opened(file, *arguments, **options):
            if isinstance(file, str | os.PathLike) and os.fspath(file).startswith(
                ("/proc", "/sys")
            ):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(file))
            return original(file, *arguments, **options)

        return opened

    def open_descriptor(path, *arguments, **options):
        if options.get("dir_fd") is None and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os_open(path, *arguments, **options)

    def fsync(descriptor):
        if access(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        os_fsync(descriptor)

    def rename(source, target, *arguments, **options):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", source, None, target)
        os_rename(source, target, *arguments, **options)

    patch.setattr(os, "rename", rename)
    patch.setattr(builtins, "open", open_file(builtins.open))
    patch.setattr(io, "open", open_file(io.open))
    patch.setattr(os, "open", open_descriptor)
    patch.setattr(os, "fsync", fsync)
    # What Python itself does in another way there.
    patch.setattr(subprocess.Popen, "kill", lambda process: process.send_signal(9))
    patch.setattr("shutil._use_fd_functions", False)
