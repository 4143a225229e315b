"""Command lines that should be refused."""

from nanosd3.cli import run_main


def refused(capsys, main, *arguments: object) -> str:
    """The one line with which a command line is refused."""
    assert run_main(lambda: main([str(a) for a in arguments])) == 2
    err = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in err and err.count("error: ") == 1, err
    line = err.splitlines()[-1].strip()  # behind progress bars, if it went that far
    assert line.startswith("error: "), err
    return line
