"""User-facing errors, and named random number generators.

Random numbers come from `rng(...)`, a CPU generator named after its purpose, such as
`rng(seed, "flow", step)`. Its stream depends on the name alone, not on what was drawn before: a run
that is interrupted after step 700 resumes with the numbers it would have drawn anyway, and one seed
gives one image on every device (up to rounding).
"""

import hashlib

import torch


class InputError(ValueError):
    """Invalid user input. The message is one line that says which file, key or option is wrong,
    what was expected, and what to do."""


def rng(*name: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `name` alone."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
