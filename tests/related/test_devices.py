"""Networks on another device than the CPU, where times of a sampler lie: here the one without
values, "meta", where PyTorch refuses a mixture as it does on a GPU."""

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.flow import schedule
from nanosd3.mmdit import MMDiT
from nanosd3.related.consistency_decoder import ConsistencyDecoder
from nanosd3.related.dit import DIT_CONFIGS, DiT
from nanosd3.related.hdit import HDiT
from nanosd3.related.hdit_system import hdit_config
from nanosd3.related.solvers import midpoint, rk4
from nanosd3.related.video import VideoMMDiT
from nanosd3.samplers import SAMPLERS, guided

TINY = CONFIGS["tiny"]
TEXT = torch.zeros(2, 5, TINY.mmdit.context_dim), torch.zeros(2, TINY.mmdit.pooled_dim)
# How to build a network, the shape of its input, and what it is told.
NETWORKS = {
    "mmdit": (lambda: MMDiT(TINY.mmdit), (2, 4, 8, 8), TEXT),
    "video": (lambda: VideoMMDiT(TINY.mmdit, 2), (2, 4, 4, 8, 8), TEXT),
    "hdit": (lambda: HDiT(hdit_config("tiny", False, TINY)), (2, 1, 32, 32), TEXT[1:]),
    "dit": (lambda: DiT(DIT_CONFIGS["tiny"]), (2, 4, 8, 8), (torch.zeros(2).long(),)),
    "decoder": (
        lambda: ConsistencyDecoder(1, 4, (8, 8, 8)),
        (2, 1, 32, 32),
        (torch.zeros(2, 4, 8, 8),),
    ),
}


def test_that_a_mixture_is_refused():
    linear = torch.nn.Linear(3, 4, device="meta")
    with pytest.raises(RuntimeError, match="device"):
        linear(torch.zeros(2, 3))


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), midpoint, rk4])
@pytest.mark.parametrize("name", NETWORKS)
def test_times_of_a_sampler_may_lie_on_the_cpu(name, sampler):
    build, shape, told = NETWORKS[name]
    told = tuple(x.to("meta") for x in told)
    velocity = guided(build().to("meta"), told, told, scale=2.0)
    channels = shape[1]  # a DiT also answers a variance
    z = sampler(
        lambda z, t: velocity(z, t)[:, :channels],
        torch.zeros(shape, device="meta"),
        schedule(2, 3.0),
    )
    assert z.device.type == "meta" and z.shape == shape
