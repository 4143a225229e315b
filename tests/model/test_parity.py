"""Against transformers and diffusers, on small random weights."""

import pytest
import torch

from nanosd3.clip import CLIPText
from nanosd3.config import CONFIGS, CLIPConfig, T5Config
from nanosd3.mmdit import MMDiT
from nanosd3.t5 import T5Encoder
from nanosd3.vae import AutoencoderKL

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [False, True])
def test_clip(activation, projection):
    config = CLIPConfig(48, 3, 4, activation, vocab=99, length=11, projection=projection, pad=0)
    ours = shaken(CLIPText(config))
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = kind(
        transformers.CLIPTextConfig(
            vocab_size=99, hidden_size=48, intermediate_size=192, projection_dim=48,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=11,
            hidden_act=activation, bos_token_id=97, eos_token_id=98, pad_token_id=0,
        )
    ).double().eval()  # fmt: skip
    state = ours.state_dict()
    if not projection and not any(k.startswith("text_model.") for k in theirs.state_dict()):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    theirs.load_state_dict(state, strict=True)
    ids = torch.tensor(
        [[97, 5, 7, 98, 0, 0, 0, 0, 0, 0, 0], [97, 1, 98, 98, 98, 98, 3, 4, 98, 98, 98]]
    )
    expected = theirs(ids, output_hidden_states=True)
    penultimate, pooled = ours(ids)
    torch.testing.assert_close(penultimate, expected.hidden_states[-2], atol=1e-12, rtol=0)
    wanted = expected.text_embeds if projection else expected.pooler_output
    torch.testing.assert_close(pooled, wanted, atol=1e-12, rtol=0)


@torch.no_grad()
def test_t5():
    config = T5Config(48, 3, 4, head_dim=8, hidden=80, vocab=60, length=150)
    ours = shaken(T5Encoder(config))
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=60, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )
    ).double().eval()  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict({**state, "shared.weight": state["encoder.embed_tokens.weight"]})
    ids = torch.randint(0, 60, (2, 150), generator=torch.Generator().manual_seed(0))
    # without a mask, as SD3 uses it; transformers' own norm is computed in float32
    expected = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours(ids), expected, atol=5e-6, rtol=0)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_one_of_diffusers(name):
    """Built by diffusers' own classes from the same numbers, the models have as many parameters
    (SD3Transformer2DModel counts no position buffer either)."""
    mmdit, vae = CONFIGS[name].mmdit, CONFIGS[name].vae
    assert mmdit.dual_attention == tuple(range(len(mmdit.dual_attention)))
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(
            sample_size=mmdit.grid_sample * mmdit.patch_size, patch_size=mmdit.patch_size,
            in_channels=mmdit.latent_channels, out_channels=mmdit.latent_channels,
            num_layers=mmdit.depth, attention_head_dim=64, num_attention_heads=mmdit.depth,
            joint_attention_dim=mmdit.context_dim, caption_projection_dim=mmdit.width,
            pooled_projection_dim=mmdit.pooled_dim, pos_embed_max_size=mmdit.grid,
            dual_attention_layers=mmdit.dual_attention,
            qk_norm="rms_norm" if mmdit.qk_norm else None,
        )  # fmt: skip
        assert count(MMDiT(mmdit)) == count(theirs)
        levels = len(vae.channels)
        their_vae = diffusers.AutoencoderKL(
            in_channels=vae.image_channels, out_channels=vae.image_channels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=vae.channels, layers_per_block=vae.blocks,
            latent_channels=vae.latent_channels, norm_num_groups=vae.norm_groups,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        assert count(AutoencoderKL(vae)) == count(their_vae)
