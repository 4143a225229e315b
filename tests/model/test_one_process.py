"""In a process that lives long, as a notebook's, a call leaves nothing to the next: neither does
what the caller has set for tensors of its own change the model's, nor the other way round."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tqdm import tqdm

import train_mnist
from nanosd3 import train, weights
from nanosd3.claims import __main__ as claims
from nanosd3.claims.decoder_price import ways_to_decode
from nanosd3.claims.hdit_costs import pass_of
from nanosd3.clip import CLIPText
from nanosd3.components import shapes
from nanosd3.config import CONFIGS
from nanosd3.data.scenes import arrangements
from nanosd3.errors import InputError
from nanosd3.pipeline import Pipeline
from nanosd3.related import __main__ as related
from nanosd3.related.finished_run import open_finished_run
from nanosd3.storage.files import read_module, save_weights
from nanosd3.torch_settings import usual_settings

PROMPT = "a bold seven"


@pytest.fixture(scope="module")
def pipeline(tiny_run):
    return Pipeline.load(tiny_run)


@pytest.fixture(scope="module")
def image(pipeline):
    return pipeline(PROMPT)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


# --- what the caller has set ----------------------------------------------------------------------


def set_now() -> tuple:
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return torch.get_default_dtype(), torch.get_default_device(), *grad


def test_usual_settings(setting):
    usual, gradients = set_now()[:2], torch.is_grad_enabled()
    with setting():
        before = set_now()
        with usual_settings():
            assert set_now() == (*usual, before[2], False)
        assert set_now() == before
        with pytest.raises(KeyboardInterrupt), usual_settings():
            raise KeyboardInterrupt
        assert set_now() == before
    assert torch.is_grad_enabled() == gradients


def test_one_seed_one_image(pipeline, tiny_run, image, setting):
    """Read before or now, at once or when it is used."""
    with setting():
        again = [load(tiny_run)(PROMPT) for load in (Pipeline.load, weights.load)]
        again.append(pipeline(PROMPT, noise=pipeline.noise(1, 0, (8, 8))))
        latents = pipeline.encode(torch.zeros(1, 1, 28, 28, device="cpu", dtype=torch.float32))
        pipeline.decode(latents)
    for other in again:
        assert np.array_equal(other, image)


def test_what_is_read_in_inference_mode_can_be_trained(tiny_run):
    with torch.inference_mode():
        lazy = weights.load(tiny_run, staged=False)
        assert lazy.parts.ready.keys() == lazy.parts.keys()
    z = torch.zeros(1, 4, 8, 8, requires_grad=True)
    lazy.mmdit(z, torch.tensor(0.5), *lazy.encode_text(PROMPT)).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("call", [Pipeline.__call__, Pipeline.encode_text])
def test_warnings_name_the_callers_line(pipeline, call):
    with pytest.warns(UserWarning, match="too long for") as warned:
        call(pipeline, "seven " * 20)
    assert {warning.filename for warning in warned} == {__file__}


@pytest.mark.parametrize(
    ("module", "first", "words"),
    [
        (train_mnist, "make_plan", []),
        (train, "make_plan", ["--data", "x"]),
        (related, "run_system", ["dit"]),
        (claims, "set_up", ["x-fm-1"]),
    ],
)
def test_commands_compute_as_in_a_process_of_their_own(monkeypatch, module, first, words):
    def stop(*_: object) -> None:
        assert set_now()[:2] == (torch.float32, torch.device("cpu"))
        raise InputError("far enough")

    monkeypatch.setattr(module, first, stop)
    with default_dtype(torch.float64), torch.device("meta"):
        with pytest.raises(InputError, match="far enough"):
            module.main(words)


def test_a_decoder_of_ones_own_too(pipeline, setting):
    drawn = []
    pipeline.decoder = lambda z: drawn.append(torch.ones(1)) or z[:, :1].repeat(1, 1, 4, 4)
    try:
        with setting():
            pipeline.decode(pipeline.noise(1, 0, (8, 8)))
    finally:
        pipeline.decoder = None
    assert drawn[0].dtype == torch.float32 and drawn[0].device.type == "cpu"


# --- the caller's random numbers ------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        Pipeline.load,
        lambda run: weights.load(run)(PROMPT),
        lambda run: open_finished_run(run, None, torch.device("cpu")),
        lambda run: pass_of("HDiT", 32, 0),
        lambda run: ways_to_decode(CONFIGS["tiny"].vae, 1, 0),
    ],
    ids=["load", "call", "run", "pass", "decode"],
)
def test_random_numbers_of_the_caller_go_on(tiny_run, call):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    call(tiny_run)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_that_are_read(tmp_path, setting):
    save_weights(torch.nn.Linear(3, 3), tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    with setting():
        module = read_module(lambda: torch.nn.Linear(3, 3), tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    x = torch.ones(1, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


# --- what a caller does with what it gets ---------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("start", [{}, {"strength": 1.0}, {"mask": np.eye(28, dtype=bool)}])
def test_callbacks_may_write_to_what_they_see(pipeline, image, sampler, start, monkeypatch):
    """To show it, for example; neither this batch of images nor the next takes notice."""
    monkeypatch.setattr("nanosd3.pipeline.latents_at_once", lambda *_: 1)
    options = {"steps": 6, "sampler": sampler} | start | ({"image": image[0]} if start else {})

    def spoil(step: int, t: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> None:
        for tensor in (t, z, x0):
            tensor.mul_(0.5)

    prompts = [PROMPT, "a thin two"]
    spoilt = pipeline(prompts, **options, callback=spoil)
    assert np.array_equal(spoilt, pipeline(prompts, **options))


def test_nothing_given_or_returned_is_shared(pipeline, image):
    """Arguments stay as they are, and results are the caller's to change."""
    noise, start, mask = pipeline.noise(1, 0, (8, 8)), image[0].copy(), np.eye(28, dtype=bool)
    for options in {"noise": noise}, {"image": start}, {"image": start, "mask": mask}:
        latents = pipeline(PROMPT, output="latent", **options)
        before = latents.clone()
        first = pipeline.decode(latents)
        assert torch.equal(latents, before)
        results = [latents, first, *pipeline.encode_text(PROMPT), pipeline(PROMPT)]
        for result in results:
            result *= 0
    assert torch.equal(noise, pipeline.noise(1, 0, (8, 8)))
    assert np.array_equal(start, image[0]) and np.array_equal(mask, np.eye(28, dtype=bool))
    assert np.array_equal(pipeline(PROMPT), image)


def test_an_error_half_way_ends_the_bar(pipeline):
    """Bars that stay open push the next ones down, and the notebook keeps the error's frames."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        pipeline(PROMPT, progress=True, callback=stop)
    assert kept and "sampling" not in [bar.desc for bar in tqdm._instances]


@pytest.mark.parametrize("where", ["encoding", "sampling", "decoding"])
def test_an_error_half_way_frees_the_network(tiny_run, monkeypatch, where):
    """The next call would have the transformer in memory beside T5."""
    staged = weights.load(tiny_run)

    def stop(*_: object) -> None:
        assert len(staged.parts.ready) == 1
        raise KeyboardInterrupt

    if where == "encoding":
        monkeypatch.setattr(CLIPText, "forward", stop)
    staged.decoder = stop if where == "decoding" else None
    with pytest.raises(KeyboardInterrupt):
        staged(PROMPT, callback=stop if where == "sampling" else None)
    assert not staged.parts.ready


def test_what_is_kept_is_nobodys_to_change():
    with pytest.raises(TypeError):
        shapes(CONFIGS["tiny"], "vae")["new"] = (1,)
    assert isinstance(arrangements(1, (32, 32)), tuple)
