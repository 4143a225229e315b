"""The same numbers as diffusers and transformers, part by part and from prompt to pixels; and
proof that these comparisons would see the classic mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_official
import torch
from PIL import Image
from safetensors.torch import load_file

from nanosd3 import clip, layers, mmdit, samplers, text, weights
from nanosd3.export import mmdit_json, vae_json
from nanosd3.flow import schedule
from nanosd3.layouts import to_diffusers
from nanosd3.mmdit import MMDiT
from nanosd3.parts import stored
from nanosd3.samplers import Skip, guided
from nanosd3.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
CONFIG = tiny_official.CONFIG


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def twin(part: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    """`theirs` with the weights of `ours`."""
    state = {k: stored(k, t, None) for k, t in ours.state_dict().items()}
    theirs.load_state_dict({k: t.read() for k, t in to_diffusers(part, state).items()})
    return theirs.eval().to(next(ours.parameters()).dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(what: str, a: torch.Tensor, b: torch.Tensor, share: float) -> None:
    """No difference larger than a share of the largest number; `pytest -s` shows it."""
    assert a.shape == b.shape and a.dtype == b.dtype
    difference = ((a - b).abs().max() / b.abs().max()).item()
    print(f"\nagrees: {what}: {difference:.0e}")
    assert difference <= share


# --- networks -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("qk_norm", "dual"), [(False, ()), (True, ()), (False, (0,)), (True, (0, 1, 2))]
)
def test_mmdit(qk_norm, dual, dtype):
    config = replace(CONFIG.mmdit, depth=3, qk_norm=qk_norm, dual_attention=dual)
    ours = shaken(MMDiT(config)).to(dtype)
    settings = mmdit_json(replace(CONFIG, mmdit=config))
    theirs = twin("mmdit", ours, diffusers.SD3Transformer2DModel.from_config(settings))
    z, context, pooled = draw(3, 16, 8, 14, dtype=dtype), draw(3, 9, 256, dtype=dtype), draw(3, 192)
    pooled, t = pooled.to(dtype), torch.tensor([1.0, 0.4321, 0.0089])
    mine = ours(z, t, context, pooled)
    (expected,) = theirs(z, context, pooled, 1000 * t, return_dict=False)
    # their RMSNorm takes its mean in float32, whatever the rest is in
    exact = {torch.float32: 2e-5, torch.float64: 5e-6 if qk_norm else 1e-12}[dtype]
    near(f"MMDiT {dtype} {qk_norm=} {dual=}", mine, expected, exact)
    assert expected.abs().mean() > 0.1
    (skipped,) = theirs(z, context, pooled, 1000 * t, return_dict=False, skip_layers=[1])
    mine = ours(z, t, context, pooled, skip=[1])
    near(f"MMDiT {dtype}, a block skipped", mine, skipped, exact)
    assert (skipped - expected).abs().mean() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vae(dtype):
    ours = shaken(AutoencoderKL(CONFIG.vae)).to(dtype)
    theirs = twin("vae", ours, diffusers.AutoencoderKL.from_config(vae_json(CONFIG)))
    exact = 1e-11 if dtype == torch.float64 else 5e-6
    x, z = draw(2, 3, 32, 48, dtype=dtype), draw(2, 16, 4, 6, dtype=dtype)
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    near(f"VAE encode {dtype}", mean, posterior.mean, exact)
    near(f"VAE log-variance {dtype}", logvar, posterior.logvar, exact)
    near(f"VAE decode {dtype}", ours.decode(z), theirs.decode(z).sample, exact)


# --- schedules and solvers ----------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 28, 50, 100, 1000])
def test_schedule(steps, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    near("schedule", schedule(steps, shift), theirs.sigmas, 3e-7)
    near("timesteps", 1000 * schedule(steps, shift)[:-1], theirs.timesteps, 3e-7)


def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some velocity that depends on both."""
    return torch.sin(3 * z + 2 * t) - 0.5 * z * t


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_euler_and_heun(name, steps, shift):
    kind = f"FlowMatch{name.title()}DiscreteScheduler"
    theirs = getattr(diffusers, kind)(shift=shift)
    theirs.set_timesteps(steps)
    z = noise = draw(2, 3, dtype=torch.float32)
    for t in theirs.timesteps:
        z = theirs.step(field(z, t / 1000), t, z).prev_sample
    near(name, samplers.SAMPLERS[name](field, noise, schedule(steps, shift)), z, 1e-5)


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m(steps, shift):
    """Against the update rules of diffusers' variance-exploding DPM-Solver++ (2M)."""
    theirs = diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, solver_type="midpoint")
    theirs.sigmas = ts = schedule(steps, shift)
    z = noise = draw(2, 3, dtype=torch.float32)
    answers = []
    for i, t in enumerate(ts[:-1]):
        theirs._step_index = i
        answers.append(z - t * field(z, t))
        if i == 0 or i == steps - 1:
            z = theirs.dpm_solver_first_order_update(answers[-1], sample=z)
        else:
            z = theirs.multistep_dpm_solver_second_order_update(answers[-2:], sample=z)
    near("dpmpp_2m", samplers.dpmpp_2m(field, noise, ts), z, 1e-5)


def test_skip_layer_guidance_acts_in_its_part_only():
    asked = []

    def model(z, t, context, pooled, skip=()):
        asked.append((len(z), float(t), skip))
        return z * 0 + (2.0 if skip else 3.0) + context

    z, prompt, negative = torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1)
    velocity = guided(model, (prompt, prompt), (negative, negative), 5.0, Skip((7,), 2.0, 0.9, 0.5))
    assert torch.equal(velocity(z, torch.tensor(0.95)), torch.full((2, 1), 8.0))
    assert torch.equal(velocity(z, torch.tensor(0.6)), torch.full((2, 1), 10.0))
    assert [entry[0] for entry in asked] == [4, 4, 2] and asked[-1][2] == (7,)


# --- from prompt to pixels ----------------------------------------------------------------------

PROMPTS = ["a photo of a cat", "naïve (café) 🐈, hello world"]
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def theirs(official_folder):
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(official_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def ours(official_file):
    return weights.load(official_file, staged=False)


def expect(theirs, noise, **changes):
    given = {"prompt": PROMPTS, "negative_prompt": ["dull"] * 2, "num_inference_steps": 4,
             "guidance_scale": 5.0, "output_type": "latent", **SIZE}  # fmt: skip
    return theirs(**given | changes, latents=noise.clone()).images


def answer(ours, noise, **changes):
    given = {"negative": "dull", "steps": 4, "guidance": 5.0, "sampler": "euler",
             "output": "latent", **SIZE}  # fmt: skip
    return ours(PROMPTS, noise=noise, **given | changes)


def test_end_to_end(ours, theirs):
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    latents = answer(ours, noise)
    near("end to end, latents", latents, expect(theirs, noise), 1e-5)
    pixels = (expect(theirs, noise, output_type="np") * 255).round()
    difference = np.abs(answer(ours, noise, output="image").astype(int) - pixels)
    assert difference.max() <= 1 and pixels.std() > 10
    assert latents.std() > 0.1


@pytest.fixture(scope="module")
def in_float64(official_folder, official_file):
    """Their pipeline and ours, in float64."""
    there = diffusers.StableDiffusion3Pipeline.from_pretrained(
        official_folder, torch_dtype=torch.float64
    )
    return there, weights.load(official_file, dtype=torch.float64, staged=False)


def encoded(pipeline, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled vector, by either program."""
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        context, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=length, do_classifier_free_guidance=False
        )
        return context, pooled
    return pipeline.encode_text(prompts, t5_length=length)


def same_text(ours, theirs, in_float64, prompts: list[str], length: int) -> None:
    """Equal in float64 (their RMSNorm takes its mean in float32), and in float32 as near to that
    as theirs: how near that is depends on the processor."""
    expected, exact = (encoded(pipeline, prompts, length) for pipeline in in_float64)
    mine, other = (encoded(pipeline, prompts, length) for pipeline in (ours, theirs))
    for i, name in enumerate(("context", "pooled")):
        near(f"{name} float64", exact[i], expected[i], 2e-6)
        assert mine[i].shape == other[i].shape and mine[i].dtype == other[i].dtype
        errors = [(x[i].double() - exact[i]).abs().max() for x in (mine, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-7 * exact[i].abs().max()


def test_text(ours, theirs, in_float64):
    """Context and pooled vector, at the length diffusers takes and at the paper's."""
    for length in (256, 77):
        assert ours.encode_text(PROMPTS, t5_length=length)[0].shape == (2, 77 + length, 256)
        same_text(ours, theirs, in_float64, PROMPTS, length)


HOSTILE = ["", " ", "🐈🏳️‍🌈", "mixed Кириллица 漢字 عربي", "word " * 300, "tab\tnew\nline\x00\x07",
           "<|endoftext|>", "it's  a 'don't'", "１２３ ﬁne"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts(ours, theirs, in_float64, prompt):
    """Too long is cut as there. An exclamation mark is left out: diffusers takes it for padding."""
    same_text(ours, theirs, in_float64, [prompt], 256)


def test_skip_layer_guidance(ours, theirs):
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    plain = expect(theirs, noise, num_inference_steps=12)
    expected = expect(theirs, noise, num_inference_steps=12, skip_guidance_layers=[0],
                      skip_layer_guidance_scale=2.5)  # fmt: skip
    mine = answer(ours, noise, steps=12, skip_layers=[0], skip_scale=2.5)
    near("skip-layer guidance", mine, expected, 1e-5)
    assert (plain - expected).abs().mean() > 0.01


def photo() -> np.ndarray:
    rows, columns = np.mgrid[:64, :96]
    picture = np.stack([rows * 4, columns * 2, (rows + columns) % 256], axis=2)
    return picture.astype(np.uint8)


@pytest.fixture
def mean_latents(monkeypatch):
    """diffusers encodes a sample of the posterior; here the mean is compared."""
    gaussian = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(gaussian, lambda self, generator=None: self.mean)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.6), (10, 0.8), (5, 1.0)])
def test_image_to_image(ours, theirs, mean_latents, steps, strength):
    other = diffusers.StableDiffusion3Img2ImgPipeline(**theirs.components)
    other.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    expected = other(
        PROMPTS[0], image=Image.fromarray(photo()), strength=strength, num_inference_steps=steps,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(5), output_type="latent",
        **SIZE,
    ).images  # fmt: skip
    mine = ours(PROMPTS[0], image=photo(), strength=strength, steps=steps, guidance=5.0,
                noise=noise, sampler="euler", output="latent")  # fmt: skip
    near("image to image", mine, expected, 1e-5)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_repainting(ours, theirs, mean_latents, strength):
    other = diffusers.StableDiffusion3InpaintPipeline(**theirs.components)
    other.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:64] = 255  # whole latent pixels, where the ways to shrink a mask agree
    expected = other(
        PROMPTS[0], image=Image.fromarray(photo()), mask_image=Image.fromarray(mask),
        strength=strength, num_inference_steps=5, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(5), **SIZE,
    ).images  # fmt: skip
    mine = ours(PROMPTS[0], image=photo(), mask=mask, strength=strength, steps=5, guidance=5.0,
                noise=noise, sampler="euler", output="latent")  # fmt: skip
    near("repainting", mine, expected, 1e-5)


# --- trained here, sampled there ----------------------------------------------------------------


def test_the_mnist_model_draws_the_same_digits_in_diffusers(tiny_run, tmp_path):
    """Exported, opened with diffusers' own classes, sampled: the same pixels."""
    weights.main(["export", str(tiny_run), "--layout", "diffusers", "--out", str(tmp_path / "d")])
    ours = weights.load(tiny_run)
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "d/transformer")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "d/vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "d/scheduler")
    prompts = ["a bold 3", "a thin seven leaning left", "8"]
    (context, pooled), (nothing, none) = ours.encode_text(prompts), ours.encode_text([""] * 3)
    z = noise = ours.noise(3, 0, (8, 8))
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in scheduler.timesteps:
            texts = torch.cat([nothing, context]), torch.cat([none, pooled])
            both = model(torch.cat([z, z]), *texts, t.expand(6)).sample
            without, with_prompt = both.chunk(2)
            z = scheduler.step(without + 2 * (with_prompt - without), t, z).prev_sample
        x = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    pixels = ((x[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().clamp(0, 255)
    mine = ours(prompts, noise=noise, steps=6, guidance=2.0, sampler="euler")
    assert np.abs(mine.astype(int) - pixels.numpy()).max() <= 1
    assert mine.std() > 1


def test_the_whole_export_opens_in_diffusers(tiny_run, tmp_path):
    """Tokenizers and text encoders too: from a prompt in words, capitals included."""
    weights.main(["export", str(tiny_run), "--layout", "diffusers", "--out", str(tmp_path / "d")])
    ours = weights.load(tiny_run)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "d")
    length = ours.config.text.t5.length
    prompts = ["A BOLD 3", "a thin seven leaning left", "naïve: 8?"]
    context, _, pooled, _ = theirs.encode_prompt(
        prompts, None, None, max_sequence_length=length, do_classifier_free_guidance=False
    )
    mine = ours.encode_text(prompts)
    near("context", mine[0], context, 1e-5)
    near("pooled", mine[1], pooled, 1e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.6])
def test_diffusers_pipeline_draws_the_same_digits(tiny_run, tmp_path, guidance):
    """The call that the README gives, from words to pixels."""
    weights.main(["export", str(tiny_run), "--layout", "diffusers", "--out", str(tmp_path / "d")])
    ours = weights.load(tiny_run)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "d")
    prompts = ["a bold 3", "a thin seven leaning left", "8"]
    context, pooled = ours.encode_text([""] * 3)  # zeros: nothing was said
    noise = ours.noise(3, 0, (8, 8))
    pixels = theirs(
        prompts, negative_prompt_embeds=context, negative_pooled_prompt_embeds=pooled,
        max_sequence_length=ours.config.text.t5.length, guidance_scale=guidance,
        num_inference_steps=6, latents=noise.clone(), output_type="np",
    ).images[:, 2:-2, 2:-2, 0]  # fmt: skip
    mine = ours(prompts, noise=noise, steps=6, guidance=guidance, sampler="euler")
    assert np.abs(mine - (pixels * 255).round()).max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_is_none(ours, theirs, guidance):
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    expected = expect(theirs, noise, guidance_scale=guidance)
    near("no guidance", answer(ours, noise, negative="", guidance=guidance), expected, 1e-5)


# --- would these tests see it? ------------------------------------------------------------------


def swapped_halves(monkeypatch, pipeline):
    original = layers.modulate
    monkeypatch.setattr(mmdit, "modulate", lambda x, shift, scale: original(x, scale, shift))


def swapped_axes(monkeypatch, pipeline):
    table = pipeline.mmdit.pos_embed
    D = table.shape[2] // 2
    pipeline.mmdit.pos_embed = torch.cat([table[..., D:], table[..., :D]], dim=2)


def swapped_pooled(monkeypatch, pipeline):
    original = text.TextEncoders.encode

    def encode(self, *arguments):
        context, pooled = original(self, *arguments)
        return context, pooled.roll(64, dims=1)

    monkeypatch.setattr(text.TextEncoders, "encode", encode)


def swapped_activations(monkeypatch, pipeline):
    for name, activation in (("clip_l", "gelu"), ("clip_g", "quick_gelu")):
        for layer in pipeline.parts[name].text_model.encoder["layers"]:
            layer.mlp.activation = clip.ACTIVATIONS[activation]


def pooled_at_the_last_token(monkeypatch, pipeline):
    for name in ("clip_l", "clip_g"):
        module = pipeline.parts[name]
        final = module.text_model.final_layer_norm
        final.register_forward_hook(lambda m, given, out: out[:, -1:].expand_as(out))


def unscaled_time(monkeypatch, pipeline):
    monkeypatch.setattr(layers, "TIMESTEP_SCALE", 1)


def padding_of_g_as_of_l(monkeypatch, pipeline):
    config = pipeline.config.text
    pipeline.text.config = replace(config, clip_g=replace(config.clip_g, pad=-1))


def forgotten_latent_shift(monkeypatch, pipeline):
    pipeline.vae.config = replace(pipeline.vae.config, shift=0.0)


def t5_scaled(monkeypatch, pipeline):
    for block in pipeline.parts["t5"].encoder["block"]:
        block.layer[0]["SelfAttention"].q.weight.data /= 4.0


@pytest.mark.parametrize(
    "mistake",
    [swapped_halves, swapped_axes, swapped_pooled, swapped_activations, pooled_at_the_last_token,
     unscaled_time, padding_of_g_as_of_l, t5_scaled, forgotten_latent_shift],
    ids=lambda mistake: mistake.__name__,
)  # fmt: skip
def test_mistakes_are_seen(official_file, theirs, monkeypatch, mistake):
    """With the mistake made in our code, the end-to-end comparison fails."""
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    pipeline = weights.load(official_file, staged=False)
    answer(pipeline, noise, output="image")  # all parts are in memory
    mistake(monkeypatch, pipeline)
    if mistake is forgotten_latent_shift:
        pixels = (expect(theirs, noise, output_type="np") * 255).round()
        assert np.abs(answer(pipeline, noise, output="image") - pixels).max() > 1
        return
    latents = answer(pipeline, noise)
    expected = expect(theirs, noise)
    difference = ((latents - expected).abs().max() / expected.abs().max()).item()
    print(f"\nseen: {mistake.__name__}: {difference:.0e}")
    assert difference > 1e-4  # ten times what the comparison lets pass


def test_export_swaps_the_halves_diffusers_has_the_other_way_round(official_file, official_folder):
    """Without the swap, 0.018 on known weights: easy to miss (the fact sheet's pitfall)."""
    single = load_file(official_file)
    folder = load_file(official_folder / "transformer/diffusion_pytorch_model.safetensors")
    for ours, other in (
        ("final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight"),
        ("joint_blocks.1.context_block.adaLN_modulation.1.bias",
         "transformer_blocks.1.norm1_context.linear.bias"),
    ):  # fmt: skip
        shift, scale = single[f"model.diffusion_model.{ours}"].chunk(2)
        assert torch.equal(folder[other], torch.cat([scale, shift]))
