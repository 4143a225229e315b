"""Formulations in one time: against each paper's own formulas, the weights of SD3's table, and
samplers on data whose velocity is known."""

import math
from functools import partial

import pytest
import torch

from nanosd3.flow import cosmap, interpolate, logit_normal, velocity_target
from nanosd3.related import formulations
from nanosd3.related.ddpm import ddim, spaced_steps
from nanosd3.related.formulations import (
    FORMULATIONS,
    Formulation,
    edm,
    even_angles,
    karras,
    latent_diffusion_schedule,
    noise_coefficients,
    v_coefficients,
)
from nanosd3.related.paths import PATHS
from nanosd3.related.train_dit import flow_times
from nanosd3.samplers import euler

NAMES = list(FORMULATIONS)
EACH = pytest.mark.parametrize("name", NAMES)
U = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def pair(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x0, noise


# --- what is predicted --------------------------------------------------------------------------


@EACH
def test_the_right_answer_is_the_velocity(name):
    """One time each, or one for all."""
    formulation, (x0, noise) = FORMULATIONS[name], pair()
    for t in (torch.linspace(0.05, 0.9, 5).double(), torch.tensor(0.3).double()):
        z = interpolate(x0, noise, t)
        answer = formulation.target(x0, noise, t)
        torch.testing.assert_close(formulation.to_velocity(answer, z, t), noise - x0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("rf")])
def test_rectified_flow_is_the_core(name):
    x0, noise = pair()
    t = torch.linspace(0.05, 0.9, 5).double()
    target = FORMULATIONS[name].target(x0, noise, t)
    torch.testing.assert_close(target, velocity_target(x0, noise))
    assert torch.equal(FORMULATIONS[name].network_input(x0, t), x0)


@EACH
def test_the_networks_input_has_unit_variance(name):
    """Of all but rectified flow's, for data that has it: at t = 1/2, z has half."""
    x0, noise = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(0)).unsqueeze(-1)
    t = torch.full((4000,), 0.5)
    scaled = FORMULATIONS[name].network_input(interpolate(x0, noise, t), t)
    assert scaled.var().item() == pytest.approx(0.5 if name.startswith("rf") else 1, rel=0.06)


def test_cosine_is_the_path_of_that_name():
    """v-prediction is its velocity, but for the angle's pace."""
    path, formulation, (x0, noise) = PATHS["cosine"], FORMULATIONS["v/cos"], pair()
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    t = formulation.density(u)
    z = formulation.network_input(interpolate(x0, noise, t), t)
    torch.testing.assert_close(z, path.interpolate(x0, noise, u))
    target = math.pi / 2 * formulation.target(x0, noise, t)
    torch.testing.assert_close(target, path.velocity_target(x0, noise, u))
    torch.testing.assert_close(even_angles(4).double(), cosmap(torch.linspace(1, 0, 5).double()))
    assert even_angles(4)[0] == 1 and even_angles(4)[-1] == 0


def test_latent_diffusion():
    """Its steps see what we show; 0.00466 of the variance is left of the image (SD's betas)."""
    schedule, formulation, (x0, noise) = (
        latent_diffusion_schedule(), FORMULATIONS["eps/linear"], pair()
    )  # fmt: skip
    assert schedule.alpha_bar[-1].item() == pytest.approx(0.00466, abs=5e-6)
    assert schedule.betas[0].item() == pytest.approx(0.00085)
    assert schedule.betas[-1].item() == pytest.approx(0.012)
    n = torch.tensor([0, 10, 500, 900, 999])
    t = flow_times(schedule)[n]
    z = formulation.network_input(interpolate(x0, noise, t), t)
    torch.testing.assert_close(z, schedule.add_noise(x0, noise, n))
    torch.testing.assert_close(formulation.density((n + 0.5) / 1000), t.float())


def test_edm_in_its_own_words():
    """Preconditioning of Karras et al. with sigma_data 1: c_in, and F = (x0 - c_skip y) / c_out."""
    x0, noise = pair()
    formulation = edm(-1.2, 1.2)
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    sigma = torch.exp(-1.2 + 1.2 * torch.special.ndtri(u))
    t = formulation.density(u)
    torch.testing.assert_close(t, sigma / (1 + sigma))
    sigma = sigma.view(-1, 1, 1, 1)
    y = x0 + sigma * noise
    c_in, c_skip = 1 / torch.sqrt(sigma**2 + 1), 1 / (sigma**2 + 1)
    c_out = sigma / torch.sqrt(sigma**2 + 1)
    torch.testing.assert_close(formulation.network_input(interpolate(x0, noise, t), t), c_in * y)
    torch.testing.assert_close(formulation.target(x0, noise, t), -(x0 - c_skip * y) / c_out)


def test_karras_levels():
    """sigma from 80 to 0.002, even in the seventh root, then 0."""
    t = karras(5).double()
    sigma = t / (1 - t)
    assert sigma[0].item() == pytest.approx(80, rel=1e-4) and t[-1] == 0
    assert sigma[-2].item() == pytest.approx(0.002, rel=1e-4)
    assert len(t) == 6 and (t.diff() < 0).all()
    steps = (sigma[:-1] ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(4), rtol=1e-4, atol=1e-4)


# --- densities and weights ----------------------------------------------------------------------


def log_snr(t: torch.Tensor) -> torch.Tensor:
    return 2 * torch.log((1 - t) / t)


def weight_of_noise(formulation: Formulation) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-SNR, and how much an error of the estimated noise counts there: the density of log-SNR
    times the square of what a change of the noise, with the image's at the same z, does to the
    answer."""
    u = U.clone().requires_grad_()
    t = formulation.density(u)
    density = 1 / torch.autograd.grad(log_snr(t).sum(), u)[0].abs()
    t = t.detach()
    x0, noise = torch.zeros(2, len(t), 1, dtype=torch.float64)
    moved = formulation.target(x0 - (t / (1 - t))[:, None], noise + 1, t)
    return log_snr(t), density * (moved - formulation.target(x0, noise, t))[:, 0] ** 2


def normal(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def logit_normal_density(t: torch.Tensor) -> torch.Tensor:
    return normal(torch.logit(t), 0, 1) / (t * (1 - t))


def of_t(function):
    """A function of t as one of log-SNR."""
    return lambda l: function(torch.sigmoid(-l / 2))  # noqa: E741


def cosmap_density(t: torch.Tensor) -> torch.Tensor:
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


WEIGHTS = {  # the paper's table of w_t, by log-SNR
    "rf": of_t(lambda t: t / (1 - t)),
    "rf/lognorm(0, 1)": of_t(lambda t: t / (1 - t) * logit_normal_density(t)),
    "rf/cosmap": of_t(lambda t: t / (1 - t) * cosmap_density(t)),
    "v/cos": lambda l: torch.exp(-l / 2),  # noqa: E741
    "edm(-1.2, 1.2)": lambda l: normal(l, 2.4, 2.4) * (torch.exp(-l) + 1),  # noqa: E741
    "edm(0, 0.6)": lambda l: normal(l, 0, 1.2) * (torch.exp(-l) + 1),  # noqa: E741
}


def assert_proportional(found: torch.Tensor, wanted: torch.Tensor) -> None:
    ratio = found / wanted
    torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_of_the_paper(name):
    levels, weight = weight_of_noise(FORMULATIONS[name])
    assert_proportional(weight, WEIGHTS[name](levels))


def test_weight_of_the_noise_with_cosine():
    """eps/cos: sech of half the log-SNR."""
    levels, weight = weight_of_noise(Formulation(cosmap, noise_coefficients, even_angles))
    assert_proportional(weight, 1 / torch.cosh(levels / 2))


@EACH
def test_densities_are_transforms_of_the_uniform(name):
    """One to one, so that they integrate to 1, and within [0, 1]."""
    u = torch.linspace(1e-4, 1 - 1e-4, 2001, dtype=torch.float64)
    t = FORMULATIONS[name].density(u)
    assert t.min() >= 0 and t.max() <= 1
    assert (t.diff() >= 0).all() or (t.diff() <= 0).all()


def test_edm_is_v_with_the_times_of_rectified_flow():
    times = edm(0.0, 1.0).density(U)
    torch.testing.assert_close(times, FORMULATIONS["rf/lognorm(0, 1)"].density(U))
    torch.testing.assert_close(times, logit_normal(U))
    assert edm(0.0, 1.0).coefficients is v_coefficients
    mode, published = FORMULATIONS["rf/mode(1.29)"].density(U), 1.29
    wanted = 1 - U - published * (torch.cos(math.pi / 2 * U) ** 2 - 1 + U)
    torch.testing.assert_close(mode, wanted)


# --- sampling -----------------------------------------------------------------------------------


def right_answer(formulation: Formulation, std: float):
    """The best network for data from N(0, std^2): linear in its input."""

    def model(scaled: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = scaled * formulations.deviation(t) if formulation.unit_variance else scaled
        variance = (1 - t) ** 2 * std**2 + t**2
        return formulation.target((1 - t) * std**2 / variance * z, t / variance * z, t)

    return model


@EACH
def test_times_of_a_sampler(name):
    for steps in (1, 5, 50):
        times = FORMULATIONS[name].steps(steps)
        assert len(times) == steps + 1 and times[-1] == 0 and 0.9 < times[0] <= 1
        assert (times.diff() < 0).all() and times.dtype == torch.float32


@EACH
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_samplers_reach_a_gaussian(name, std):
    """By the exact velocity, deviation goes as that of z: from the noisiest level to the data."""
    formulation = FORMULATIONS[name]
    velocity = formulation.flow_model(right_answer(formulation, std))
    times = formulation.steps(1000).double()
    z = times[0] * torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    first = torch.sqrt((1 - times[0]) ** 2 * std**2 + times[0] ** 2)
    torch.testing.assert_close(euler(velocity, z, times), std / first * z, rtol=2e-2, atol=0)


@EACH
def test_a_point_is_reached_in_one_step(name):
    formulation = FORMULATIONS[name]
    velocity = formulation.flow_model(right_answer(formulation, 0.0))
    z = torch.ones(2, 1, dtype=torch.float64)
    end = euler(velocity, z, formulation.steps(1).double())
    torch.testing.assert_close(end, torch.zeros_like(z), atol=1e-6, rtol=0)


def test_euler_in_flow_time_is_ddim():
    """Of latent diffusion's noise, with any network."""
    formulation, schedule = FORMULATIONS["eps/linear"], latent_diffusion_schedule()
    steps, (_, z) = schedule.respaced(spaced_steps(10)), pair()

    def model(scaled, t):
        return torch.tanh(2 * scaled)

    times = formulation.steps(10).double()
    signal = steps.alpha_bar[-1].sqrt() + (1 - steps.alpha_bar[-1]).sqrt()
    ours = euler(formulation.flow_model(model), z / signal, times)
    torch.testing.assert_close(ours, ddim(model, z, steps), rtol=1e-4, atol=1e-5)


def test_others_are_passed_on():
    """Text, for guidance."""
    given = []

    def model(z, t, *others):
        given.append(others)
        return z

    context, pooled = torch.zeros(1), torch.ones(1)
    FORMULATIONS["v/cos"].flow_model(model)(torch.ones(1, 1), torch.tensor(0.5), context, pooled)
    assert given == [(context, pooled)]


def test_names():
    """Parameters are in the names."""
    for name, times in (("edm(-1.2, 1.2)", (-1.2, 1.2)), ("edm(0, 0.6)", (0.0, 0.6))):
        wanted = partial(logit_normal, mean=times[0], std=times[1])(U)
        torch.testing.assert_close(FORMULATIONS[name].density(U), wanted)
