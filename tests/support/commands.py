"""Command lines: how they end, and those that should be refused."""

from collections.abc import Callable

from nanosd3.cli import run_main


def status(main: Callable[[list[str]], int], *arguments: object) -> int:
    """The exit status of a command with these arguments."""
    return run_main(lambda: main([str(a) for a in arguments]))


def refused(capsys, main: Callable[[list[str]], int], *arguments: object) -> str:
    """The one line with which a command line is refused."""
    assert status(main, *arguments) == 2
    err = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in err and err.count("error: ") == 1, err
    line = err.splitlines()[-1].strip()  # behind progress bars, if it went that far
    assert line.startswith("error: "), err
    return line
