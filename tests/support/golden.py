"""The rule that fills a model for the golden values, and the inputs that go with them."""

import torch


def fill(model: torch.nn.Module, skip: tuple[str, ...] = ()) -> torch.nn.Module:
    """Element n of the tensor with key K becomes s = sin(0.37 n + len(K)), scaled.

    1-D: 0.1 s, plus 1 for weights; otherwise s / sqrt(fan-in).
    """
    state = {}
    for key, tensor in model.state_dict().items():
        if key in skip:
            state[key] = tensor.double()
            continue
        n = torch.arange(tensor.numel(), dtype=torch.float64)
        s = torch.sin(0.37 * n + len(key)).view(tensor.shape)
        if tensor.ndim == 1:
            state[key] = 0.1 * s + (1 if key.endswith(".weight") else 0)
        else:
            state[key] = s / (tensor.numel() / tensor.shape[0]) ** 0.5
    model.double().load_state_dict(state)
    return model.eval()


def ramp(shape: tuple[int, ...], frequency: float, phase: float = 0.0) -> torch.Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(frequency * n + phase).view(shape)
