"""Every network at a realistic size and with realistic statistics: as exact as diffusers' own.

Small images with activations around zero hide what float32 loses in sums over a million numbers
and in differences of large ones. So the image is 512x768, activations have means of 10 and more,
and a few channels are a hundred times larger than the rest, as in CLIP and T5. The truth is the
same network in float64.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support import tiny_official

from nanosd3.clip import CLIPText
from nanosd3.config import CLIPConfig, T5Config
from nanosd3.machine.accelerate import accelerate
from nanosd3.mmdit import MMDiT
from nanosd3.official.export import mmdit_json, vae_json
from nanosd3.official.key_names import to_diffusers
from nanosd3.official.tensors import in_memory
from nanosd3.t5 import T5Encoder
from nanosd3.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
CONFIG = tiny_official.CONFIG
VAE = replace(CONFIG.vae, channels=(8, 16, 16, 16), norm_groups=4, blocks=1)
OUTLIER = 3  # a channel a hundred times larger than the others


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def errors(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Root mean square and largest error, in units of the exact values' deviation."""
    difference = (x.double() - exact) / exact.std()
    return torch.stack([difference.square().mean().sqrt(), difference.abs().max()])


def as_exact(name: str, ours: torch.nn.Module, function: Callable, theirs: torch.Tensor) -> None:
    """Plain and accelerated, in float32, the error is at most twice that of `theirs`."""
    models = {"plain": ours, "accelerated": accelerate(copy.deepcopy(ours))}
    results = {kind: function(model, torch.float32) for kind, model in models.items()}
    exact = function(ours.double(), torch.float64)
    limit = errors(theirs, exact)
    assert limit[0] < 1e-2
    for kind, result in results.items():
        measured = errors(result, exact)
        print(f"\n{name}, {kind}: {measured.tolist()}, diffusers: {limit.tolist()}")
        assert (measured <= 2 * limit).all()


@torch.no_grad()
@pytest.mark.parametrize(("half", "mean"), [("encoder", 10), ("decoder", 100)])
def test_vae(half, mean):
    ours = noisy(AutoencoderKL(VAE))
    for name, parameter in ours.named_parameters():
        if name.endswith(("conv_in.bias", "conv.bias")):  # of the residual stream
            parameter.data += mean
    theirs = diffusers.AutoencoderKL.from_config(vae_json(replace(CONFIG, vae=VAE)))
    state = {k: in_memory(k, t, None) for k, t in ours.state_dict().items()}
    theirs.load_state_dict({k: t.read() for k, t in to_diffusers("vae", state).items()})
    theirs.eval()
    if half == "encoder":
        x = draw(1, 3, 512, 768).clamp(-1, 1)
        expected = theirs.encode(x).latent_dist.mean
        as_exact("encoder", ours, lambda vae, dtype: vae.encode(x.to(dtype))[0], expected)
    else:
        z = draw(1, 16, 64, 96)
        as_exact(
            "decoder", ours, lambda vae, dtype: vae.decode(z.to(dtype)), theirs.decode(z).sample
        )


@torch.no_grad()
def test_mmdit():
    config = replace(CONFIG.mmdit, depth=2, qk_norm=True, dual_attention=(0,), grid=48)
    ours = noisy(MMDiT(config))
    for name, parameter in ours.named_parameters():
        if name.endswith(("context_embedder.bias", "proj.bias")):
            parameter.data += 10
            parameter.data[OUTLIER] *= 30
    theirs = diffusers.SD3Transformer2DModel.from_config(
        mmdit_json(replace(CONFIG, mmdit=config))
    ).eval()
    state = {k: in_memory(k, t, None) for k, t in ours.state_dict().items()}
    theirs.load_state_dict({k: t.read() for k, t in to_diffusers("mmdit", state).items()})
    z, t = draw(1, 16, 64, 96), torch.tensor([0.7])
    context, pooled = 10 + draw(1, 154, config.context_dim), 1 + draw(1, config.pooled_dim)
    context[..., OUTLIER] *= 100
    (expected,) = theirs(z, context, pooled, 1000 * t, return_dict=False)
    as_exact("MMDiT", ours, lambda m, d: m(z.to(d), t, context.to(d), pooled.to(d)), expected)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(activation):
    config = CLIPConfig(128, 6, 2, activation, vocab=999, length=77, projection=True, pad=0)
    ours = noisy(CLIPText(config))
    for name, parameter in ours.named_parameters():
        if name.endswith("fc2.bias"):
            parameter.data += 2
            parameter.data[OUTLIER] += 100
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=999, hidden_size=128, intermediate_size=512, projection_dim=128,
            num_hidden_layers=6, num_attention_heads=2, max_position_embeddings=77,
            hidden_act=activation, bos_token_id=997, eos_token_id=998, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(0, 997, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 40:] = 997, 998
    expected = theirs(ids, output_hidden_states=True)
    as_exact("CLIP tokens", ours, lambda m, d: m(ids)[0], expected.hidden_states[-2])
    as_exact("CLIP pooled", ours.float(), lambda m, d: m(ids)[1], expected.text_embeds)


@torch.no_grad()
def test_t5():
    config = T5Config(128, 6, 2, head_dim=64, hidden=320, vocab=999, length=256)
    ours = noisy(T5Encoder(config))
    for name, parameter in ours.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data[OUTLIER] = 10 * parameter.data[OUTLIER].abs()
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=999, d_model=128, d_kv=64, d_ff=320, num_layers=6, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict({**state, "shared.weight": state["encoder.embed_tokens.weight"]})
    ids = torch.randint(0, 999, (1, 256), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    as_exact("T5", ours, lambda m, d: m(ids), expected)
