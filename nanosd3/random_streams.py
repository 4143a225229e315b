"""Random numbers from generators named after their purpose.

`rng(seed, "flow", step)` is a CPU generator whose stream depends on the name alone, not on what was
drawn before: a run that is interrupted after step 700 resumes with the numbers it would have drawn
anyway, and one seed gives one image on every device (up to rounding).
"""

import hashlib

import torch

from nanosd3.arguments import whole_number


def rng(*name: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `name` alone.

    Raises InputError for a name that is not made of strings and whole numbers.
    """
    values = tuple(
        str(part) if isinstance(part, str) else whole_number("a random stream's name", part)
        for part in name
    )
    digest = hashlib.sha256(repr(values).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
