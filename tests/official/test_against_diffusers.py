"""Agreement with diffusers and transformers, network by network and from prompt to pixels; and
proof that these comparisons catch the classic mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny_official

from nanosd3 import clip, embeddings, layers, mmdit, samplers, text, weights
from nanosd3.flow import schedule
from nanosd3.mmdit import MMDiT
from nanosd3.official.export import mmdit_json, vae_json
from nanosd3.official.key_names import to_diffusers
from nanosd3.official.tensors import in_memory
from nanosd3.samplers import SkipLayerGuidance, guided
from nanosd3.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
CONFIG = tiny_official.CONFIG


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """The module with noise added to its parameters, so that none is zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def twin(part: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    """`theirs` with the weights of `ours`."""
    state = {k: in_memory(k, t, None) for k, t in ours.state_dict().items()}
    theirs.load_state_dict({k: t.read() for k, t in to_diffusers(part, state).items()})
    return theirs.eval().to(next(ours.parameters()).dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, seeded by the shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(name: str, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    """Assert that no difference exceeds `tolerance` times the largest value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    difference = ((a - b).abs().max() / b.abs().max()).item()
    print(f"\nagrees: {name}: {difference:.0e}")
    assert difference <= tolerance


# --- networks -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("qk_norm", "dual"), [(False, ()), (True, ()), (False, (0,)), (True, (0, 1, 2))]
)
def test_mmdit(qk_norm, dual, dtype):
    config = replace(CONFIG.mmdit, depth=3, qk_norm=qk_norm, dual_attention=dual)
    ours = perturbed(MMDiT(config)).to(dtype)
    settings = mmdit_json(replace(CONFIG, mmdit=config))
    theirs = twin("mmdit", ours, diffusers.SD3Transformer2DModel.from_config(settings))
    z, context, pooled = draw(3, 16, 8, 14, dtype=dtype), draw(3, 9, 256, dtype=dtype), draw(3, 192)
    pooled, t = pooled.to(dtype), torch.tensor([1.0, 0.4321, 0.0089])
    mine = ours(z, t, context, pooled)
    (expected,) = theirs(z, context, pooled, 1000 * t, return_dict=False)
    # diffusers' RMSNorm always takes its mean in float32
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
    ours = perturbed(AutoencoderKL(CONFIG.vae)).to(dtype)
    theirs = twin("vae", ours, diffusers.AutoencoderKL.from_config(vae_json(CONFIG)))
    exact = 1e-11 if dtype == torch.float64 else 5e-6
    x, z = draw(2, 3, 32, 48, dtype=dtype), draw(2, 16, 4, 6, dtype=dtype)
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    near(f"VAE encode {dtype}", mean, posterior.mean, exact)
    near(f"VAE log-variance {dtype}", logvar, posterior.logvar, exact)
    near(f"VAE decode {dtype}", ours.decode(z), theirs.decode(z).sample, exact)


# --- schedules and solvers ------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 28, 50, 100, 1000])
def test_schedule(steps, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    near("schedule", schedule(steps, shift), theirs.sigmas, 3e-7)
    near("timesteps", 1000 * schedule(steps, shift)[:-1], theirs.timesteps, 3e-7)


def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A velocity that depends on both z and t."""
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


def test_skip_layer_guidance_acts_only_in_its_interval():
    calls = []

    def model(z, t, context, pooled, skip=()):
        calls.append((len(z), float(t), skip))
        return z * 0 + (2.0 if skip else 3.0) + context

    z, prompt, negative = torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1)
    velocity = guided(
        model, (prompt, prompt), (negative, negative), 5.0, SkipLayerGuidance((7,), 2.0, 0.9, 0.5)
    )
    assert torch.equal(velocity(z, torch.tensor(0.95)), torch.full((2, 1), 8.0))
    assert torch.equal(velocity(z, torch.tensor(0.6)), torch.full((2, 1), 10.0))
    assert [call[0] for call in calls] == [4, 4, 2] and calls[-1][2] == (7,)


# --- from prompt to pixels ------------------------------------------------------------------------

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
    arguments = {"prompt": PROMPTS, "negative_prompt": ["dull"] * 2, "num_inference_steps": 4,
                 "guidance_scale": 5.0, "output_type": "latent", **SIZE}  # fmt: skip
    return theirs(**arguments | changes, latents=noise.clone()).images


def answer(ours, noise, **changes):
    arguments = {"negative": "dull", "steps": 4, "guidance": 5.0, "sampler": "euler",
                 "output": "latent", **SIZE}  # fmt: skip
    return ours(PROMPTS, noise=noise, **arguments | changes)


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
    """The diffusers pipeline and ours, in float64."""
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
        official_folder, torch_dtype=torch.float64
    )
    return theirs, weights.load(official_file, dtype=torch.float64, staged=False)


def encoded(pipeline, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled vector, from either pipeline."""
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        context, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=length, do_classifier_free_guidance=False
        )
        return context, pooled
    return pipeline.encode_text(prompts, t5_length=length)


def same_text(ours, theirs, in_float64, prompts: list[str], length: int) -> None:
    """Assert equality in float64 (up to diffusers' RMSNorm, which takes its mean in float32), and
    in float32 an error no larger than theirs, which depends on the processor."""
    expected, exact = (encoded(pipeline, prompts, length) for pipeline in in_float64)
    mine, other = (encoded(pipeline, prompts, length) for pipeline in (ours, theirs))
    for i, name in enumerate(("context", "pooled")):
        near(f"{name} float64", exact[i], expected[i], 2e-6)
        assert mine[i].shape == other[i].shape and mine[i].dtype == other[i].dtype
        errors = [(x[i].double() - exact[i]).abs().max() for x in (mine, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-7 * exact[i].abs().max()


def test_text(ours, theirs, in_float64):
    """Context and pooled vector, at diffusers' T5 length and at the paper's."""
    for length in (256, 77):
        assert ours.encode_text(PROMPTS, t5_length=length)[0].shape == (2, 77 + length, 256)
        same_text(ours, theirs, in_float64, PROMPTS, length)


HOSTILE = ["", " ", "🐈🏳️‍🌈", "mixed Кириллица 漢字 عربي", "word " * 300, "tab\tnew\nline\x00\x07",
           "<|endoftext|>", "it's  a 'don't'", "１２３ ﬁne"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts(ours, theirs, in_float64, prompt):
    """Truncated alike. No exclamation marks: diffusers takes them for CLIP-G's padding."""
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
    """Make diffusers encode to the posterior's mean, as we do, rather than to a sample."""
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
def test_inpainting(ours, theirs, mean_latents, strength):
    other = diffusers.StableDiffusion3InpaintPipeline(**theirs.components)
    other.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:64] = 255  # aligned with latent pixels, where all mask resizing agrees
    expected = other(
        PROMPTS[0], image=Image.fromarray(photo()), mask_image=Image.fromarray(mask),
        strength=strength, num_inference_steps=5, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(5), **SIZE,
    ).images  # fmt: skip
    mine = ours(PROMPTS[0], image=photo(), mask=mask, strength=strength, steps=5, guidance=5.0,
                noise=noise, sampler="euler", output="latent")  # fmt: skip
    near("inpainting", mine, expected, 1e-5)


# --- trained here, sampled in diffusers -----------------------------------------------------------


def test_the_mnist_model_draws_the_same_digits_in_diffusers(tiny_run, tmp_path):
    """Exported and sampled with diffusers' own classes: the same pixels."""
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


def test_exported_pipeline_opens_in_diffusers(tiny_run, tmp_path):
    """Tokenizers and text encoders included; prompts may have capitals."""
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
    """The README's example, from prompt to pixels."""
    weights.main(["export", str(tiny_run), "--layout", "diffusers", "--out", str(tmp_path / "d")])
    ours = weights.load(tiny_run)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "d")
    prompts = ["a bold 3", "a thin seven leaning left", "8"]
    context, pooled = ours.encode_text([""] * 3)  # zeros for an empty prompt
    noise = ours.noise(3, 0, (8, 8))
    pixels = theirs(
        prompts, negative_prompt_embeds=context, negative_pooled_prompt_embeds=pooled,
        max_sequence_length=ours.config.text.t5.length, guidance_scale=guidance,
        num_inference_steps=6, latents=noise.clone(), output_type="np",
    ).images[:, 2:-2, 2:-2, 0]  # fmt: skip
    mine = ours(prompts, noise=noise, steps=6, guidance=guidance, sampler="euler")
    assert np.abs(mine - (pixels * 255).round()).max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_is_off(ours, theirs, guidance):
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    expected = expect(theirs, noise, guidance_scale=guidance)
    near("no guidance", answer(ours, noise, negative="", guidance=guidance), expected, 1e-5)


# --- do these tests catch mistakes? ---------------------------------------------------------------


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
            layer.mlp.activation = clip.ACTIVATION_FUNCTIONS[activation]


def pooled_at_the_last_token(monkeypatch, pipeline):
    for name in ("clip_l", "clip_g"):
        module = pipeline.parts[name]
        final = module.text_model.final_layer_norm
        final.register_forward_hook(lambda module, args, out: out[:, -1:].expand_as(out))


def unscaled_time(monkeypatch, pipeline):
    monkeypatch.setattr(embeddings, "TIMESTEP_SCALE", 1)


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
def test_mistakes_are_caught(official_file, theirs, monkeypatch, mistake):
    """With the mistake injected into our code, the end-to-end comparison fails."""
    noise = draw(2, 16, 8, 12, dtype=torch.float32)
    pipeline = weights.load(official_file, staged=False)
    answer(pipeline, noise, output="image")  # loads all components
    mistake(monkeypatch, pipeline)
    if mistake is forgotten_latent_shift:
        pixels = (expect(theirs, noise, output_type="np") * 255).round()
        assert np.abs(answer(pipeline, noise, output="image") - pixels).max() > 1
        return
    latents = answer(pipeline, noise)
    expected = expect(theirs, noise)
    difference = ((latents - expected).abs().max() / expected.abs().max()).item()
    print(f"\ncaught: {mistake.__name__}: {difference:.0e}")
    assert difference > 1e-4  # ten times the tolerance


def test_export_swaps_shift_and_scale(official_file, official_folder):
    """Without the swap, outputs differ by only 0.018 on known weights: easy to miss."""
    single = load_file(official_file)
    folder = load_file(official_folder / "transformer/diffusion_pytorch_model.safetensors")
    for ours, other in (
        ("final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight"),
        ("joint_blocks.1.context_block.adaLN_modulation.1.bias",
         "transformer_blocks.1.norm1_context.linear.bias"),
    ):  # fmt: skip
        shift, scale = single[f"model.diffusion_model.{ours}"].chunk(2)
        assert torch.equal(folder[other], torch.cat([scale, shift]))
