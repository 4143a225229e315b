"""Memory on CUDA, counted on the meta device: live tensors, and an imitation of CUDA's autocast."""

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import is_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors created in its context that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.created, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if (key := storage._cdata) not in inputs and key not in self.created:
                freed = partial(self.forget, key, storage.nbytes())
                self.created[key] = weakref.ref(storage, freed)
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return out

    def forget(self, key, size, _):
        del self.created[key]
        self.bytes -= size


class FusedNorm(torch.autograd.Function):
    """RMSNorm as on CUDA: one operation, which saves its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast and flash attention, imitated on the meta device."""

    def __init__(self):
        super().__init__()
        self.forward, self.cached = True, []

    def wrap(self, function):
        def run(*args):
            with self:
                return function(*args)

        return run

    def end_forward(self):
        """Drop the cast weights, which from now on live only as long as autograd needs them."""
        self.forward, self.cached = False, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.linear, F.scaled_dot_product_attention):
            args = [x.bfloat16() for x in args]
            if function is F.linear:
                self.cached += args[1:] if self.forward else []
                return function(*args)
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        if function is F.layer_norm:
            return function(args[0].float(), *args[1:], **kwargs)
        if function is F.rms_norm:
            return FusedNorm.apply(args[0].float(), kwargs["weight"].float())
        if function in (torch.cat, torch.addcmul):
            parts = args[0] if function is torch.cat else args
            exact = any(x.dtype == torch.float32 for x in parts)
            parts = [x.to(torch.float32 if exact else parts[0].dtype) for x in parts]
            return function(parts, **kwargs) if function is torch.cat else function(*parts)
        return function(*args, **kwargs)
