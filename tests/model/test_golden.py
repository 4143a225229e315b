"""Numbers computed once, in float64, by independent implementations of the published models."""

from dataclasses import replace

import pytest
import torch
from support.golden import fill, ramp

from nanosd3.clip import CLIPText
from nanosd3.config import CONFIGS, CLIPConfig, MMDiTConfig, T5Config
from nanosd3.embeddings import timestep_embedding
from nanosd3.flow import cosmap, mode, schedule, shift
from nanosd3.mmdit import MMDiT
from nanosd3.patchify import centre_crop, sincos_positions
from nanosd3.t5 import T5Encoder, distance_buckets
from nanosd3.vae import AutoencoderKL

GOLDEN = MMDiTConfig(
    depth=2,
    latent_channels=16,
    patch_size=2,
    context_dim=4096,
    pooled_dim=2048,
    grid=8,
    grid_sample=4,
    grid_span=16,
    qk_norm=False,
    dual_attention=(),
)


def close(got: torch.Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(
        got.double().flatten(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(
    ("qk_norm", "dual", "statistics", "values"),
    [
        (
            False,
            (),
            [-0.0028727733, 0.5547488428, 0.6717774951],
            [-1.1561847461, 0.9304973445, -0.9431568877, -0.3803626325, -1.1273836395,
             -0.1007840415, 0.2612655092],
        ),
        (
            True,
            (0,),
            [-0.0047000517, 0.6301209842, 0.7633023746],
            [-1.2969395982, 1.1099262431, -1.0980446620, -0.1464495349, -1.2624811416,
             -0.1638780284, 0.2035299730],
        ),
    ],
    ids=["MMDiT", "MMDiT-X"],
)  # fmt: skip
def test_mmdit(qk_norm, dual, statistics, values):
    model = MMDiT(replace(GOLDEN, qk_norm=qk_norm, dual_attention=dual))
    # The position buffer is float64 here, as in the values' definition.
    fill(model, skip=("pos_embed",))
    model.pos_embed = model.pos_embed.double()
    out = model(
        ramp((2, 16, 8, 12), 0.01),
        torch.tensor([1.0, 0.2505]),
        ramp((2, 5, 4096), 0.003, 1),
        ramp((2, 2048), 0.05, 2),
    )
    # 4e-8 is the rounding of the float32 time embedding (in the references too).
    close(torch.stack([out.mean(), out.abs().mean(), out.std()]), statistics, 2e-7)
    close(out.flatten()[[0, 1, 2, 1000, 1536, 2047, 3071]], values, 5e-7)


def test_vae():
    vae = fill(AutoencoderKL(CONFIGS["sd3-medium"].vae))
    moments = vae.encoder(ramp((1, 3, 32, 48), 0.02))
    assert moments.shape == (1, 32, 4, 6)
    close(torch.stack([moments.mean(), moments.abs().mean()]), [-0.0054136244, 0.0632237291], 1e-10)
    first, last = moments.flatten()[:3], moments.flatten()[-1:]
    close(torch.cat([first, last]), [0.0943104854, 0.1037071683, 0.1040706074, 0.0916846734], 1e-9)
    mean, logvar = vae.encode(ramp((1, 3, 32, 48), 0.02))
    torch.testing.assert_close(torch.cat([mean, logvar], 1), moments)

    image = vae.decode(ramp((1, 16, 4, 6), 0.07))
    assert image.shape == (1, 3, 32, 48)
    close(torch.stack([image.mean(), image.abs().mean()]), [0.2890161476, 0.3206915078], 1e-10)
    first, last = image.flatten()[:3], image.flatten()[-1:]
    close(torch.cat([first, last]), [0.2557422023, 0.3742167339, 0.3994703613, -0.2209623690], 1e-9)


CLIP_IDS = torch.tensor([[49406, 320, 1125, 539, 320, 2368] + [49407] * 71])


@pytest.mark.parametrize(
    ("activation", "first", "last", "unprojected", "projected"),
    [
        (
            "quick_gelu",
            [-0.4107661757, -1.5488509477, -0.7056703395],
            1.1889972111,
            [-0.9368121113, -0.9113899964, 0.2952557855],
            [-0.2634711018, 1.2224429417, 0.5514323690],
        ),
        (
            "gelu",
            [-0.4103022193, -1.5483934240, -0.7053237310],
            1.1893382842,
            [-0.9354577844],
            [-0.2635848784],
        ),
    ],
)
def test_clip(activation, first, last, unprojected, projected):
    config = CLIPConfig(64, 3, 4, activation, 49408, 77, projection=True, pad=-1)
    penultimate, pooled = fill(CLIPText(config))(CLIP_IDS)
    close(penultimate.flatten()[:3], first, 1e-9)
    close(penultimate.flatten()[-1:], [last], 1e-9)
    close(pooled[0, : len(projected)], projected, 1e-9)
    _, pooled = fill(CLIPText(replace(config, projection=False)))(CLIP_IDS)
    close(pooled[0, : len(unprojected)], unprojected, 1e-9)


def test_t5():
    t5 = fill(T5Encoder(T5Config(128, 3, 4, head_dim=32, hidden=320, vocab=200, length=77)))
    out = t5(torch.tensor([[7, 42, 99, 13, 150, 1] + [0] * 71]))
    close(torch.stack([out.mean(), out.abs().mean()]), [-0.0056860723, 0.8229157214], 1e-9)
    close(out.flatten()[:3], [-0.2143811620, -1.4558899913, 0.5981171392], 1e-9)
    close(out.flatten()[-1:], [0.0399778698], 1e-9)


def test_t5_buckets():
    row = distance_buckets(300)[150]  # from query 150 to each key
    expected = {0: 0, -1: 1, 1: 17, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -22: 10,
                -23: 11, -31: 11, -32: 12, -45: 12, -46: 13, -63: 13, -64: 14, -90: 14, -91: 15,
                -128: 15, 128: 31}  # fmt: skip
    assert {d: int(row[150 + d]) for d in expected} == expected


def test_time_embedding():
    embedding = timestep_embedding(torch.tensor([0.2505]))[0]
    expected = [0.67678303, 0.80777097, 0.99963772, -0.73618251, 0.58949643, 0.02691567]
    close(embedding[[0, 1, 127, 128, 129, 255]], expected, 5e-5)


def test_positions():
    """The official grid: row 64, column 66 of 192 is at y = 0, x = 0.5."""
    position = sincos_positions(1536, 192, 64, 16)[0, 64 * 192 + 66]
    expected = [0.47942554, 0.46899281, 5.121e-05, 0.87758256, 1.0, 0.0, 1.0]
    close(position[[0, 1, 383, 384, 767, 768, 1152]], expected, 3e-8)


def test_positions_agree_where_grids_overlap():
    """The 1024-pixel crop is the same from a buffer of 192 and of 384 (SD3.5-medium)."""
    a = centre_crop(sincos_positions(64, 192, 64, 16), 64, 64)
    b = centre_crop(sincos_positions(64, 384, 64, 16), 64, 64)
    assert torch.equal(a, b)


def test_density_values():
    half = torch.tensor([0.25, 0.9], dtype=torch.float64)
    close(mode(half, 1.29), [0.6164161261, 0.1974314530], 1e-10)
    close(cosmap(half[:1]), [0.2928932188], 1e-10)
    close(shift(half[:1], 3.0), [0.5], 0)


def test_schedule():
    close(schedule(4, 3.0), [1, 0.8576923, 0.6021506, 0.0089286, 0], 1e-7)
    official = """1 .987381 .974108 .960129 .945387 .929818 .913349 .8959 .877382 .857692 .836717
        .814325 .790368 .764677 .737056 .707278 .675082 .64016 .602151 .560625 .515072 .464876
        .409289 .347393 .278049 .199827 .110906 .008929 0"""
    close(schedule(28, 3.0), [float(s) for s in official.split()], 1e-6)


# --- parameter counts, on the meta device -------------------------------------------------------


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd3-d15", 496_066_624),
        ("sd3-d18", 856_159_552),
        ("sd3-d21", 1_358_950_720),
        ("sd3-medium", 2_028_328_000),
        ("sd3-d30", 3_962_392_384),
        ("sd3-d38", 8_056_617_792),
        ("sd3.5-medium", 2_243_171_520),
        ("sd3.5-large", 8_056_627_520),
    ],
)
def test_mmdit_parameters(name, parameters):
    with torch.device("meta"):
        assert count(MMDiT(CONFIGS[name].mmdit)) == parameters


def test_other_parameters():
    config = CONFIGS["sd3-medium"]
    with torch.device("meta"):
        vae = AutoencoderKL(config.vae)
        assert count(vae) == 83_819_683 and len(vae.state_dict()) == 244
        assert count(vae.encoder) == 34_274_208 and count(vae.decoder) == 49_545_475
        assert count(CLIPText(config.text.clip_l)) == 123_060_480
        assert count(CLIPText(config.text.clip_g)) == 694_659_840
        assert count(T5Encoder(config.text.t5)) == 4_762_310_656
        # 491 tensors in the official file, the position buffer among them
        assert len(MMDiT(config.mmdit).state_dict()) == 491
