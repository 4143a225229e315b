"""Diagnosis of steps whose loss or gradient is not finite."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nanosd3.errors import InputError
from nanosd3.machine.distributed import local_shard

PATIENCE = 3  # a run stops after this many non-finite steps in a row, or all if it has fewer


def not_finite_error(stage: str, step: int, skipped: int, where: str) -> InputError:
    return InputError(
        f"{stage}: steps {step - skipped + 1} to {step} are not finite, {where}; "
        "the last saved state is intact, a lower learning rate may help"
    )


def first_not_finite(
    module: nn.Module, microbatches: Sequence[Callable[[], tuple[Tensor, dict]]]
) -> str:
    """Say where in a step the first non-finite number arises.

    Checks, in order: the weights; the output of each submodule while the step's `microbatches` are
    run again; the loss; the gradients that are still in place, from the last layer to the first.
    All ranks run all checks, whatever they find: gathering a sharded network takes all of them.
    """
    weights = [
        f"the weight {name}"
        for name, parameter in module.named_parameters()
        if not local_shard(parameter).isfinite().all()
    ]
    outputs: list[str] = []

    def check_output(name: str) -> Callable:
        def hook(part: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not all(local_shard(x).isfinite().all() for x in tensors if isinstance(x, Tensor)):
                outputs.append(f"first in the output of {name}")

        return hook

    hooks = [
        part.register_forward_hook(check_output(name))
        for name, part in module.named_modules()
        if name
    ]
    with torch.no_grad():
        finite = [bool(losses.isfinite().all()) for losses, _ in (step() for step in microbatches)]
    for handle in hooks:
        handle.remove()
    gradients = [
        f"first in the gradient of {name}"
        for name, parameter in reversed(list(module.named_parameters()))
        if parameter.grad is not None and not local_shard(parameter.grad).isfinite().all()
    ]
    losses = [] if all(finite) else ["in the loss"]
    return [*weights, *outputs, *losses, *gradients, "in the gradient's norm"][0]
