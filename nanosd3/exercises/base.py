"""What an exercise is: a specification to read, a reference to agree with, mistakes to name.

The *specification* is written in plain loops, slowly and obviously. The *reference* is the
package's own function; there is no second copy of it. A *mutant* is a wrong answer that students
really give, with one sentence that helps without giving the answer away: it tests the checker
(every mutant must fail) and it is the hint (an answer that behaves like it gets its sentence).

Cases are drawn with all sizes distinct, because square inputs hide exchanged axes. Each has a
label, so that the checker can say where an answer is right and where it is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: arguments, and what is special about it."""

    label: str
    arguments: tuple


@dataclass(frozen=True)
class Mutant:
    """A wrong answer and what to say about it."""

    answer: Callable
    hint: str

    @property
    def name(self) -> str:
        return self.answer.__name__


@dataclass(frozen=True)
class Exercise:
    name: str
    topic: str
    points: int
    difficulty: int  # 1 a line, 2 some lines, 3 a whole part
    signature: str  # of the stub
    task: str  # what to write, with shapes
    specification: Callable  # in plain loops
    reference: Callable  # the package's own function
    cases: Callable[[torch.Generator], list[Case]]
    names: tuple[str, ...]  # of the arguments, for messages
    mutants: tuple[Mutant, ...]
    why: str  # it matters
    where: str  # it stands in the package
    tolerance: float = 1e-5
    differentiable: bool = True
    other_devices: bool = True  # may be tried on tensors without memory, as on a GPU
    constants: tuple[str, ...] = ()  # arguments nobody asks a gradient for

    def drawn(self) -> list[Case]:
        """The cases, the same each time."""
        return self.cases(torch.Generator().manual_seed(sum(map(ord, self.name))))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)
