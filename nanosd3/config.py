"""Every size of the model, as numbers: `CONFIGS[name]` with `.mmdit`, `.vae` and `.text`.

The classes have no default dimensions; a config gives them all. `tiny`, `mnist`, `small`,
`scenes` and `tiny-scenes` train from scratch on a CPU, with the numbers in `recipes`; the others
are the official models and the depths of the paper's scaling study. Diffusers' classes
SD3Transformer2DModel and AutoencoderKL could hold each of them too.

Sizes and defaults of the official models: the published checkpoints' shapes, Stability's
reference code and diffusers' configs; where those disagree, the choice is noted beside the number.
"""

from dataclasses import replace

from nanosd3.config_types import (
    CLIPConfig,
    Config,
    MMDiTConfig,
    Recipe,  # noqa: F401 - with the others, for anyone who makes a config
    Sampling,
    T5Config,
    TextConfig,
    Training,  # noqa: F401
    VAEConfig,
)
from nanosd3.recipes import (
    LARGE_TRAINING,
    MNIST_TRAINING,
    SCENES_TRAINING,
    SMALL_TRAINING,
    TINY_TRAINING,
)


def official_mmdit(
    depth: int, qk_norm: bool, grid: int = 192, dual_attention: tuple[int, ...] = ()
) -> MMDiTConfig:
    return MMDiTConfig(
        depth=depth,
        latent_channels=16,
        patch_size=2,
        context_dim=4096,
        pooled_dim=2048,
        grid=grid,
        grid_sample=64,
        grid_span=16,
        qk_norm=qk_norm,
        dual_attention=dual_attention,
    )


OFFICIAL_VAE = VAEConfig(
    image_channels=3,
    channels=(128, 256, 512, 512),
    blocks=2,
    latent_channels=16,
    norm_groups=32,
    shift=0.0609,
    scale=1.5305,
)

OFFICIAL_TEXT = TextConfig(
    clip_l=CLIPConfig(768, 12, 12, "quick_gelu", 49408, 77, projection=False, pad=-1),
    clip_g=CLIPConfig(1280, 32, 20, "gelu", 49408, 77, projection=True, pad=0),
    # 256 tokens as in diffusers; the paper has 77.
    t5=T5Config(4096, 24, 64, head_dim=64, hidden=10240, vocab=32128, length=256),
    empty_is_zero=False,
)


def official(name: str, mmdit: MMDiTConfig, sampling: Sampling, image_size: int = 1024) -> Config:
    return Config(name, image_size, 0, mmdit, OFFICIAL_VAE, OFFICIAL_TEXT, sampling, training=None)


def study(depth: int) -> Config:
    """One of the paper's scaling runs: trained at 256 x 256, no QK-norm, sampled with 50 Euler
    steps and guidance 5 (the validation settings of its section 5.1)."""
    sampling = Sampling(steps=50, guidance=5.0, shift=1.0, sampler="euler")
    return official(f"sd3-d{depth}", official_mmdit(depth, qk_norm=False), sampling, 256)


MNIST = Config(
    name="mnist",
    image_size=32,
    padding=2,
    mmdit=MMDiTConfig(
        depth=2,
        latent_channels=4,
        patch_size=2,
        context_dim=128,
        pooled_dim=96,
        grid=8,
        grid_sample=4,
        grid_span=4,
        qk_norm=True,
        dual_attention=(),
    ),
    vae=VAEConfig(1, (16, 32, 32), 1, latent_channels=4, norm_groups=8, shift=0.0, scale=1.0),
    text=TextConfig(
        clip_l=CLIPConfig(32, 2, 2, "quick_gelu", 640, 9, projection=False, pad=-1),
        clip_g=CLIPConfig(64, 2, 2, "gelu", 640, 9, projection=True, pad=0),
        t5=T5Config(128, 2, 4, head_dim=32, hidden=256, vocab=128, length=8),
        empty_is_zero=True,
    ),
    sampling=Sampling(steps=12, guidance=1.6, shift=1.0, sampler="heun"),
    training=MNIST_TRAINING,
)

# An eighth of the latent size, so that reconstructions blur: to compare decoders (related/).
MNIST_COMPRESSED = VAEConfig(1, (16, 32, 32, 32), 1, 2, norm_groups=8, shift=0.0, scale=1.0)

TINY = Config(  # every path of the largest model, dual attention included, in seconds
    name="tiny",
    image_size=32,
    padding=2,
    mmdit=MMDiTConfig(
        depth=2,
        latent_channels=4,
        patch_size=2,
        context_dim=48,
        pooled_dim=32,
        grid=6,
        grid_sample=4,
        grid_span=4,
        qk_norm=True,
        dual_attention=(0,),
    ),
    vae=VAEConfig(1, (8, 8, 16), 1, latent_channels=4, norm_groups=4, shift=0.0, scale=1.0),
    text=TextConfig(
        clip_l=CLIPConfig(16, 2, 1, "quick_gelu", 576, 12, projection=False, pad=-1),
        clip_g=CLIPConfig(16, 2, 1, "gelu", 576, 12, projection=True, pad=0),
        t5=T5Config(48, 2, 2, head_dim=16, hidden=32, vocab=96, length=12),
        empty_is_zero=True,
    ),
    sampling=Sampling(steps=4, guidance=2.0, shift=1.0, sampler="euler"),
    training=TINY_TRAINING,
)

SMALL = Config(  # colour, for a folder of your own images
    name="small",
    image_size=32,
    padding=0,
    mmdit=MMDiTConfig(
        depth=3,
        latent_channels=4,
        patch_size=2,
        context_dim=128,
        pooled_dim=96,
        grid=16,
        grid_sample=8,
        grid_span=8,
        qk_norm=True,
        dual_attention=(),
    ),
    vae=VAEConfig(3, (32, 64), 1, latent_channels=4, norm_groups=8, shift=0.0, scale=1.0),
    text=TextConfig(
        clip_l=CLIPConfig(32, 2, 2, "quick_gelu", 1024, 16, projection=False, pad=-1),
        clip_g=CLIPConfig(64, 2, 2, "gelu", 1024, 16, projection=True, pad=0),
        t5=T5Config(128, 2, 4, head_dim=32, hidden=256, vocab=512, length=16),
        empty_is_zero=True,
    ),
    sampling=Sampling(steps=20, guidance=3.0, shift=1.0, sampler="heun"),
    training=SMALL_TRAINING,
)

# Digits in colour, composed by caption: `mnist` with three channels and captions twice as long.
SCENES = replace(
    MNIST,  # 32 x 32, and 32 x 48
    name="scenes",
    padding=0,
    mmdit=replace(MNIST.mmdit, depth=3, patch_size=4),
    vae=replace(MNIST.vae, image_channels=3, channels=(16, 32)),
    text=replace(
        MNIST.text,
        clip_l=replace(MNIST.text.clip_l, vocab=1024, length=12),
        clip_g=replace(MNIST.text.clip_g, vocab=1024, length=12),
        t5=replace(MNIST.text.t5, vocab=256, length=12),
    ),
    sampling=Sampling(steps=20, guidance=4.5, shift=1.0, sampler="heun"),
    training=SCENES_TRAINING,
)

TINY_SCENES = replace(  # the same, as small as TINY
    TINY,
    name="tiny-scenes",
    padding=0,
    vae=replace(TINY.vae, image_channels=3),
    text=replace(
        TINY.text,
        clip_l=replace(TINY.text.clip_l, vocab=768),
        clip_g=replace(TINY.text.clip_g, vocab=768),
    ),
)

CONFIGS = {
    config.name: config
    for config in (
        TINY,
        MNIST,
        SMALL,
        SCENES,
        TINY_SCENES,
        # Stability's sd3-ref and diffusers sample it at shift 3 (only sd3.5's preset has 1).
        official("sd3-medium", official_mmdit(24, qk_norm=False), Sampling(28, 7.0, 3.0, "euler")),
        official(
            "sd3.5-medium",
            official_mmdit(24, qk_norm=True, grid=384, dual_attention=tuple(range(13))),
            Sampling(50, 5.0, 3.0, "dpmpp_2m"),
        ),
        official(
            "sd3.5-large", official_mmdit(38, qk_norm=True), Sampling(40, 4.5, 3.0, "dpmpp_2m")
        ),
        official(  # distilled: few steps, no guidance
            "sd3.5-large-turbo", official_mmdit(38, qk_norm=True), Sampling(4, 1.0, 3.0, "euler")
        ),
        *(study(depth) for depth in (15, 18, 21, 30, 38)),
    )
}


def trainable(config: Config) -> Config:
    """The config to train from scratch. An official one keeps its transformer and autoencoder, but
    its text encoders, which took months to train, are replaced by small ones whose features are
    padded with zeros to the width that the transformer reads."""
    if config.training:
        return config
    return replace(config, text=SMALL.text, training=LARGE_TRAINING)
