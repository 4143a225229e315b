"""Muon: steps of equal length in all directions of a weight matrix.

The gradient of a matrix is dominated by a few directions: its largest singular values are far above
the rest, and a step along it changes little else. Muon (Jordan 2024) takes the momentum, whose
singular value decomposition is U S V^T, and steps along U V^T. AdamW normalises element by element,
ignoring that the elements form a matrix.

No decomposition is needed. The odd polynomial  a X + b (X X^T) X + c (X X^T)^2 X  leaves U and V as
they are and maps each singular value s to  a s + b s^3 + c s^5;  a few rounds of it (Newton-Schulz)
bring all of (0, 1] close to 1. Matrices of the same shape are computed together.

Two details matter here. A fused layer is several unrelated matrices stacked on top of each other
(queries, keys and values): each is made orthogonal on its own. And a step is as long as AdamW's, an
RMS of 0.2 lr per element whatever the shape, so that both use rates of the same size (arXiv
2502.16982).

torch.optim.Muon differs in three ways: it knows nothing of fused layers, takes the matrices one by
one, and multiplies in bfloat16, which most CPUs emulate.
"""

import torch
from torch import Tensor

from nanosd3.machine.distributed import gather_full, shard_like

MOMENTUM = 0.95
STEP = 0.2  # root mean square of a step, relative to the rate
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: steep at 0, and near 1 only to 30%
ROUNDS = 5


def orthogonalised(x: Tensor) -> Tensor:
    """The matrices x (n, rows, columns), rows <= columns, with all singular values near 1."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values in [0, 1]
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for parameters (rows, columns) only.

    Each parameter of a group is `parts` matrices of equal size, stacked. Parameters may be sharded;
    every process then makes the gathered matrices orthogonal.
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "parts": 1})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        updates, alike = [], {}  # type: ignore[var-annotated]
        for group in self.param_groups:
            if not (trained := [p for p in group["params"] if p.grad is not None]):
                continue
            gradients = [p.grad for p in trained]
            moments = [self.state[p]["momentum_buffer"] for p in trained]
            torch._foreach_lerp_(moments, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_mul(gradients, 1 - MOMENTUM)  # Nesterov: a step ahead
            torch._foreach_add_(ahead, moments, alpha=MOMENTUM)
            for p, update in zip(trained, map(gather_full, ahead), strict=True):
                updates.append((p, update, group))
                for part in update.chunk(group["parts"]):
                    wide = part if part.shape[0] <= part.shape[1] else part.mT
                    alike.setdefault(wide.shape, []).append(wide)
        for matrices in alike.values():
            torch._foreach_copy_(matrices, list(orthogonalised(torch.stack(matrices)).unbind()))
        for p, update, group in updates:
            longer = max(update.shape[0] // group["parts"], update.shape[1])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update, p), alpha=-group["lr"] * STEP * longer**0.5)
