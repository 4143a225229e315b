"""The parts of an exercise: a specification, a reference, test cases and common mistakes.

The *specification* is written in plain loops: slow and obvious. The *reference* is the package's
own function; there is no second copy of it. A *mutant* is a wrong answer that students really
give, with a short hint that does not give the answer away. It serves twice: it tests the
checker (every mutant must fail), and an answer with the same results gets its hint.

Test cases have distinct sizes along all axes, because square inputs hide swapped axes. Each has a
label, so that the checker can say for which inputs an answer is right. One of them is of realistic
size and limits the lines of Python that an answer may run, so that the specification itself does
not pass. Where a loop is the answer, as in a solver, students see formulas instead. Where
the reference raises an error, an answer must raise one too, of any type.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """The arguments of one call, and a label that says what is special about them."""

    label: str
    arguments: tuple
    lines: int | None = None  # of Python that an answer may run


def large(label: str, *arguments: object, lines: int = 200) -> Case:
    """A case of realistic size, at which loops over elements are too slow."""
    return Case(label, arguments, lines)


@dataclass(frozen=True)
class Mutant:
    """A wrong answer and the hint for it."""

    answer: Callable
    hint: str

    @property
    def name(self) -> str:
        return self.answer.__name__


@dataclass(frozen=True)
class Exercise:
    """An entry of the registry."""

    name: str
    topic: str
    points: int
    difficulty: int  # 1 one line, 2 a few lines, 3 a whole component
    signature: str  # first line of the stub
    task: str  # docstring of the stub, with shapes
    specification: Callable  # in plain loops
    reference: Callable  # the package's own function
    cases: Callable[[torch.Generator], list[Case]]
    names: tuple[str, ...]  # argument names, for messages
    mutants: tuple[Mutant, ...]
    why: str  # why it matters
    where: str  # where it is in the package
    tolerance: float = 1e-5
    differentiable: bool = True
    other_devices: bool = True  # checked on the meta device too
    constants: tuple[str, ...] = ()  # float arguments whose gradients are not checked
    formulas: str = ""  # shown instead of the specification where a loop is the answer
    exact_zeros: bool = False  # where 0 is expected, nothing else is close enough
    size_hint: str = "Print both shapes: they are aligned at the last axis; add axes where needed."
    slow_hint: str = "Replace the loop by operations on whole tensors."

    def shown(self) -> str:
        """The specification as students see it, below a heading."""
        if self.formulas:
            return f"The specification, in words and formulas:\n{self.formulas}"
        source = inspect.getsource(self.specification).rstrip()
        return f"The specification, in plain loops:\n{source}"

    def drawn(self) -> list[Case]:
        """The test cases, the same on every call."""
        return self.cases(torch.Generator().manual_seed(sum(map(ord, self.name))))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)
