"""Every claim this project makes about GPUs, measured by one command.

    python -m nanosd3.bench cuda                               on a GPU, about five minutes
    python -m nanosd3.bench cuda --device cpu --config tiny    the same checks at toy size, on a CPU

Modules, each of which imports only from those above it:
    result              checks, their settings, and the rows they yield
    correct             are the answers right?
    sampling            how fast is image generation, and where does the time go?
    against_diffusers   is it faster than diffusers?
    training            how fast is training, and does the memory formula hold?
    worker              a process that runs checks, to be killed if one hangs
    command             runs all checks, most valuable first, each with a time limit
"""
