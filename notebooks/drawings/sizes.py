"""The shapes that the drawings state, computed from the configs. Tests compare them with those of
the modules."""

from nanosd3.config import CONFIGS, Config

SOLVERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}


def written(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes, without the batch, of what a caption passes on its way to an image."""
    m, text, vae = config.mmdit, config.text, config.vae
    D, C, p = m.width, m.latent_channels, m.patch_size
    clip, M = text.clip_l.length, text.clip_l.length + text.t5.length
    side, pixels = config.image_size // vae.factor, config.image_size - 2 * config.padding
    N = (side // p) ** 2
    dl, dg, grid = text.clip_l.width, text.clip_g.width, m.grid
    return {
        "clip_l": (clip, dl), "clip_g": (clip, dg),
        "t5": (text.t5.length, text.t5.width), "context": (M, m.context_dim), "y": (M, D),
        "pooled_l": (dl,), "pooled_g": (dg,), "pooled": (m.pooled_dim,), "c": (D,),
        "z": (C, side, side), "x": (N, D), "patches": (N, p * p * C), "patch": (p * p * C,),
        "grid": (grid, grid), "crop": (side // p, side // p),
        "modulation": (6 * D,), "modulation_y": (2 * D,), "modulation_final": (2 * D,),
        "heads_y": (m.depth, M, 64), "heads_x": (m.depth, N, 64),
        "weights": (M + N, M + N), "weights_last": (N, M + N),
        "image": (pixels, pixels),
        "padded": (vae.image_channels, config.image_size, config.image_size),
        **{
            f"level_{i}": (channels, config.image_size // 2**i, config.image_size // 2**i)
            for i, channels in enumerate(vae.channels)
        },
        "moments": (2 * C, side, side),
    }  # fmt: skip


MODELS = [(config, shapes(config)) for config in (CONFIGS["mnist"], CONFIGS["sd3.5-large"])]
