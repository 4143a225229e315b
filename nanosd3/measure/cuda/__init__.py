"""Everything this project claims about GPUs, measured by one command.

    python -m nanosd3.bench cuda                               on a GPU, about five minutes
    python -m nanosd3.bench cuda --device cpu --config tiny    the same checks, small, without one

`result` says what a check is, `correct`, `sampling` and `training` hold the checks, and `command`
runs them in order of worth, each in its own time, and keeps what is known so far in a JSON file.
"""
