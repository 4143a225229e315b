"""DDPM: closed forms for Gaussian data, diffusers' schedulers, the bound, guidance."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from nanosd3.related.ddpm import (
    NoiseSchedule,
    ancestral,
    binned_nll,
    ddim,
    ddpm_loss,
    guided_noise,
    linear_schedule,
    spaced_steps,
    split_answer,
    variance_bound,
)
from nanosd3.samplers import euler

FULL = linear_schedule()
STEPS = [0, 1, 2, 500, 998, 999]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the schedule -------------------------------------------------------------------------------


def test_alpha_bar_is_the_product():
    product = 1.0
    for n in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * n / 999
        product *= 1 - beta
        assert FULL.alpha_bar[n].item() == pytest.approx(product, rel=1e-12)
        assert FULL.betas[n].item() == pytest.approx(beta, rel=1e-9)
    assert product == pytest.approx(4.0358e-5, rel=1e-4)
    assert FULL.previous.tolist() == [1.0, *FULL.alpha_bar[:-1].tolist()]
    assert FULL.times[:2].tolist() == pytest.approx([0, 0.001]) and FULL.times[-1] == 0.999


def test_noise_step_by_step():
    """Adding noise in single steps gives the mean and variance that `add_noise` jumps to."""
    mean = variance = torch.zeros((), dtype=torch.float64)
    mean = mean + 3
    for n in range(300):
        beta = FULL.betas[n]
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
    one, zero = torch.tensor([1.0, 3.0]).double(), torch.tensor(0.0).double()
    assert FULL.add_noise(3 * one[:1], zero, 299).item() == pytest.approx(mean.item())
    assert FULL.add_noise(zero, one[:1], 299).square().item() == pytest.approx(variance.item())


def test_respaced():
    steps = torch.tensor([3, 50, 999])
    few = FULL.respaced(steps)
    assert few.steps.tolist() == [3, 50, 999]
    torch.testing.assert_close(torch.cumprod(1 - few.betas, 0), FULL.alpha_bar[steps])
    assert few.betas[1].item() == pytest.approx(
        1 - math.prod(1 - beta for beta in FULL.betas[4:51].tolist())
    )
    again = few.respaced(torch.tensor([0, 2]))
    assert again.steps.tolist() == [3, 999]
    assert torch.equal(again.alpha_bar, FULL.alpha_bar[[3, 999]])


def test_spread():
    assert spaced_steps(1).tolist() == [999]
    assert spaced_steps(2).tolist() == [0, 999]
    assert spaced_steps(5).tolist() == [0, 250, 500, 749, 999]
    assert torch.equal(spaced_steps(1000), FULL.steps)
    for count in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"between 1 and 1000, got {count}"):
            spaced_steps(count)


@pytest.mark.parametrize("n", STEPS)
def test_conversions(n):
    """Image, noise, v and z: each from two others; v is the derivative along the circle."""
    x0, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    z, v = FULL.add_noise(x0, noise, n), FULL.v_target(x0, noise, n)
    tight = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(FULL.noise_to_x0(noise, z, n), x0, **tight)
    torch.testing.assert_close(FULL.x0_to_noise(x0, z, n), noise, **tight)
    torch.testing.assert_close(FULL.v_to_x0(v, z, n), x0, **tight)
    torch.testing.assert_close(FULL.v_to_noise(v, z, n), noise, **tight)
    angle = math.acos(FULL.alpha_bar[n].sqrt())
    ahead = math.cos(angle + 1e-6) * x0 + math.sin(angle + 1e-6) * noise
    torch.testing.assert_close((ahead - z) / 1e-6, v, atol=1e-5, rtol=1e-5)


def test_a_step_for_each_sample():
    x0, noise = normal(6, 3, 4), normal(6, 3, 4, seed=1)
    n = torch.tensor(STEPS)
    for function in (FULL.add_noise, FULL.noise_to_x0, FULL.x0_to_noise, FULL.v_target,
                     FULL.v_to_x0, FULL.v_to_noise, FULL.posterior_mean):  # fmt: skip
        one_by_one = [function(x0[i], noise[i], step) for i, step in enumerate(STEPS)]
        torch.testing.assert_close(function(x0, noise, n), torch.stack(one_by_one))
        assert function(x0.float(), noise.float(), n).dtype == torch.float32
    s = normal(6, 3, 4)
    one_by_one = [FULL.log_variance(s[i], step) for i, step in enumerate(STEPS)]
    torch.testing.assert_close(FULL.log_variance(s, n), torch.stack(one_by_one))
    assert FULL.log_variance(s.half(), n).dtype == torch.float16


# --- the posterior, for Gaussian data -------------------------------------------------------------


def moments(schedule: NoiseSchedule, n: int, mean: float, var: float) -> tuple[float, float]:
    """Of z_n, for data N(mean, var); step -1 is the data."""
    a = schedule.alpha_bar[n].item() if n >= 0 else 1.0
    return a**0.5 * mean, a * var + 1 - a


def one_step_back(schedule, n, mean, var, z):
    """Mean and variance of z_{n-1} given z_n, by conditioning the joint Gaussian of both."""
    (before, var_before), (after, var_after) = (moments(schedule, k, mean, var) for k in (n - 1, n))
    gain = (1 - schedule.betas[n].item()) ** 0.5 * var_before / var_after
    return before + gain * (z - after), var_before - gain**2 * var_after


def exact_noise(schedule, n, mean, var, z):
    """What a perfect network predicts: the mean of the noise given z."""
    centre, total = moments(schedule, n, mean, var)
    return (1 - schedule.alpha_bar[n].item()) ** 0.5 * (z - centre) / total


@pytest.mark.parametrize("schedule", [FULL, FULL.respaced(spaced_steps(11))])
@pytest.mark.parametrize("var", [0.0, 0.3, 1.0, 4.0])
def test_posterior_of_gaussian_data(schedule, var):
    z = torch.tensor([-1.0, 0.2, 2.0]).double()
    for n in (0, 1, 5, len(schedule.steps) - 1):
        expected, variance = one_step_back(schedule, n, 0.7, var, z)
        x0 = schedule.noise_to_x0(exact_noise(schedule, n, 0.7, var, z), z, n)
        torch.testing.assert_close(schedule.posterior_mean(x0, z, n), expected)
        if var == 0:  # x0 is known
            assert schedule.posterior_variance[n].item() == pytest.approx(variance, abs=1e-12)
        if var == 1:
            assert schedule.betas[n].item() == pytest.approx(variance)


def test_log_variance():
    """From log beta~ at -1 to log beta at 1, and on; at the first step with the second's beta~."""
    s = torch.tensor([-1.0, 1.0, 0.0, 3.0]).double()
    for n in STEPS:
        low = FULL.posterior_variance[max(n, 1)].log().item()
        high = FULL.betas[n].log().item()
        expected = [low, high, (low + high) / 2, 2 * high - low]
        assert FULL.log_variance(s, n).tolist() == pytest.approx(expected)
    one = FULL.respaced(spaced_steps(1))
    assert one.log_variance(s, 0).tolist() == [one.betas.log().item()] * 4


def perfect(schedule: NoiseSchedule, mean: float, var: float, calls: list):
    """A network that knows everything about Gaussian data, the variance of each step too."""

    def model(z: Tensor, t: Tensor) -> Tensor:
        calls.append(t.item())
        n = int((schedule.steps == round(1000 * t.item())).nonzero())
        _, variance = one_step_back(schedule, n, mean, var, z)
        low, high = (schedule.log_variance(torch.tensor(s).double(), n) for s in (-1.0, 1.0))
        s = 2 * (math.log(variance) - low) / (high - low) - 1
        noise = exact_noise(schedule, n, mean, var, z)
        return torch.cat([noise, torch.full_like(noise, s.item())], dim=1)

    return model


@pytest.mark.parametrize("count", [10, 100])
def test_ancestral_sampling_of_gaussian_data(count):
    """With the right mean and variance at each step the distribution is right for any count."""
    schedule, calls = FULL.respaced(spaced_steps(count)), []
    z = normal(40_000, 1, seed=2)
    generator = torch.Generator().manual_seed(3)
    x = ancestral(perfect(schedule, 0.7, 0.3, calls), z, schedule, generator)
    assert x.mean().item() == pytest.approx(0.7, abs=0.015)  # 5 standard errors
    # at the first step the exact variance is beyond x0's mean, which is what is returned
    left = one_step_back(schedule, 0, 0.7, 0.3, z)[1]
    assert x.var().item() == pytest.approx(0.3 - left, rel=0.03)
    assert calls == pytest.approx([n / 1000 for n in reversed(spaced_steps(count).tolist())])


def test_ddim_of_gaussian_data():
    """Exact in the limit of many steps: z keeps its place in the distribution."""
    z = normal(100, 1)
    for count, error in ((1000, 0.01), (10, 0.5)):
        schedule, calls = FULL.respaced(spaced_steps(count)), []
        x = ddim(perfect(schedule, 0.7, 0.3, calls), z, schedule)
        torch.testing.assert_close(x, 0.7 + 0.3**0.5 * z, atol=error, rtol=0)
        assert calls == pytest.approx([n / 1000 for n in reversed(spaced_steps(count).tolist())])


# --- diffusers ------------------------------------------------------------------------------------


def network(z: Tensor, t: Tensor) -> Tensor:
    """Some smooth function, (B, C, ...) to (B, 2 C, ...)."""
    return torch.cat([torch.sin(z + t) * 0.9, torch.cos(2 * z - t)], dim=1)


def their_scheduler(name: str, **settings: object):
    """A scheduler of diffusers, in float64."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(clip_sample=False, **settings)
    torch.testing.assert_close(scheduler.betas.double(), FULL.betas, atol=1e-8, rtol=1e-5)
    scheduler.alphas_cumprod = FULL.alpha_bar
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("count", [1000, 250, 7])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_ancestral_sampling_against_diffusers(count, variance):
    scheduler = their_scheduler(
        "DDPMScheduler", variance_type=variance, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == spaced_steps(count).flip(0).tolist()

    def answer(z: Tensor, t: Tensor) -> Tensor:
        both = network(z, t)
        return both if variance == "learned_range" else both.chunk(2, dim=1)[0]

    z, theirs = normal(3, 2, 4), torch.Generator().manual_seed(5)
    expected = z
    for step in scheduler.timesteps:
        output = answer(expected, step / 1000)
        expected = scheduler.step(output, int(step), expected, generator=theirs).prev_sample
    ours = torch.Generator().manual_seed(5)
    x = ancestral(answer, z, FULL.respaced(spaced_steps(count)), ours)
    torch.testing.assert_close(x, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1000, 50, 4])
def test_ddim_against_diffusers(spacing, count):
    scheduler = their_scheduler("DDIMScheduler", timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    z = expected = normal(3, 2, 4)
    for step in scheduler.timesteps:
        output, _ = network(expected, step / 1000).chunk(2, dim=1)
        expected = scheduler.step(output, int(step), expected).prev_sample
    x = ddim(network, z, FULL.respaced(scheduler.timesteps.flip(0)))
    torch.testing.assert_close(x, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n", STEPS)
def test_noising_against_diffusers(n):
    scheduler = their_scheduler("DDPMScheduler")
    x0, noise, step = normal(2, 3), normal(2, 3, seed=1), torch.tensor([n, n])
    z = scheduler.add_noise(x0, noise, step)
    torch.testing.assert_close(FULL.add_noise(x0, noise, n), z, atol=1e-12, rtol=0)
    v = scheduler.get_velocity(x0, noise, step)
    torch.testing.assert_close(FULL.v_target(x0, noise, n), v, atol=1e-12, rtol=0)


def test_ddim_is_euler_on_straight_lines():
    """Rescaled, z is on rectified flow's line from x0 to noise, at t = sigma / (alpha + sigma)."""
    schedule = FULL.respaced(spaced_steps(9))
    alpha, sigma = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    ts = torch.cat([(sigma / (alpha + sigma)).flip(0), torch.zeros(1)])

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        n = int((ts[:-1].flip(0) - t).abs().argmin())
        z = z * (alpha + sigma)[n]
        noise, _ = network(z, schedule.times[n]).chunk(2, dim=1)
        return noise - schedule.noise_to_x0(noise, z, n)

    z = normal(3, 2, 4)
    expected = euler(velocity, z / (alpha + sigma)[-1], ts)
    torch.testing.assert_close(ddim(network, z, schedule), expected)


# --- the loss -----------------------------------------------------------------------------------


def batch() -> tuple[Tensor, ...]:
    """x0, noise, n and an answer for each of STEPS; x0 beyond -1 and 1 as well."""
    x0, noise = normal(6, 2, 3), normal(6, 2, 3, seed=1)
    answer = torch.cat([noise + 0.3 * normal(6, 2, 3, seed=2), normal(6, 2, 3, seed=3)], dim=1)
    return x0, noise, torch.tensor(STEPS), answer


def test_bound():
    """KL divergences from torch's distributions; minus log-likelihood of bins from erf, at 0."""
    x0, noise, n, answer = batch()
    z = FULL.add_noise(x0, noise, n)
    predicted, s = answer.chunk(2, dim=1)
    bound = variance_bound(FULL, predicted, s, x0, z, n)
    for i, step in enumerate(STEPS):
        std = (FULL.log_variance(s[i], step) / 2).exp()
        mean = FULL.posterior_mean(FULL.noise_to_x0(predicted[i], z[i], step), z[i], step)
        if step == 0:
            expected = bins_one_by_one(x0[i], mean, std)
        else:
            true_std = FULL.posterior_variance[step].sqrt()
            wanted = Normal(FULL.posterior_mean(x0[i], z[i], step), true_std)
            expected = kl_divergence(wanted, Normal(mean, std))
        assert bound[i].item() == pytest.approx(expected.mean().item() / math.log(2)), step


def bins_one_by_one(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    def below(value: float, m: float, deviation: float) -> float:
        return 0.5 * (1 + math.erf((value - m) / deviation / 2**0.5))

    values = []
    for number, m, deviation in zip(x.flatten(), mean.flatten(), std.flatten(), strict=True):
        low, high = number - 1 / 255, number + 1 / 255
        upper = 1.0 if number > 0.999 else below(high, m, deviation)
        lower = 0.0 if number < -0.999 else below(low, m, deviation)
        values.append(-math.log(max(upper - lower, 1e-12)))
    return torch.tensor(values).double()


def test_bins_add_up_to_one():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.0, 0.3), (0.9, 1.0), (-2.0, 0.5)):
        log_variance = torch.full_like(x, 2 * math.log(std))
        nll = binned_nll(x, torch.full_like(x, mean), log_variance)
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_loss_is_error_and_bound():
    x0, noise, n, answer = batch()
    predicted, s = answer.chunk(2, dim=1)
    error = (predicted - noise).square().mean((1, 2))
    bound = variance_bound(FULL, predicted, s, x0, FULL.add_noise(x0, noise, n), n)
    torch.testing.assert_close(ddpm_loss(FULL, answer, x0, noise, n), error + bound)
    torch.testing.assert_close(ddpm_loss(FULL, predicted, x0, noise, n), error)


def test_the_bound_trains_the_variance_only():
    x0, noise, n, answer = batch()
    answer.requires_grad_()
    ddpm_loss(FULL, answer, x0, noise, n).sum().backward()
    of_noise, of_s = answer.grad.chunk(2, dim=1)
    torch.testing.assert_close(of_noise, 2 * (answer[:, :2] - noise).detach() / 6)
    assert (of_s.abs() > 0).all()


def test_the_bound_is_least_at_the_right_variance():
    """That is beta~ plus the square of the error of the mean."""
    x0, noise, n = normal(1, 1, 1), normal(1, 1, 1, seed=1), 400
    z = FULL.add_noise(x0, noise, n)
    predicted = noise + 0.3
    s = torch.linspace(-3, 3, 6001, dtype=torch.float64).view(-1, 1, 1)
    steps = torch.full((6001,), n)
    bound = variance_bound(FULL, *(v.expand_as(s) for v in (predicted,)), s,
                           x0.expand_as(s), z.expand_as(s), steps)  # fmt: skip
    means = [FULL.posterior_mean(FULL.noise_to_x0(e, z, n), z, n) for e in (noise, predicted)]
    right = FULL.posterior_variance[n] + (means[0] - means[1]).square()
    best = FULL.log_variance(s, n)[bound.argmin()].exp()
    assert best.item() == pytest.approx(right.item(), rel=1e-4)


def test_first_loss_of_an_answer_of_zero():
    x0, noise = normal(1000, 2), normal(1000, 2, seed=1)
    n = torch.full((1000,), 700)
    loss = ddpm_loss(FULL, torch.zeros(1000, 2).double(), x0, noise, n)
    assert loss.mean().item() == pytest.approx(1, abs=0.1)


def test_split_answer():
    answer = normal(2, 6, 3)
    noise, s = split_answer(answer, 3)
    assert torch.equal(torch.cat([noise, s], dim=1), answer)
    noise, s = split_answer(answer, 6)
    assert torch.equal(noise, answer) and torch.equal(s, torch.ones_like(answer))


# --- guidance -------------------------------------------------------------------------------------


def labelled(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    both = torch.cat([z, -z], dim=1)
    return both * (1 + y.view(-1, 1, 1)) + t


@pytest.mark.parametrize("channels", [None, 3, 1])
def test_guidance(channels):
    z, y, t = normal(2, 4, 3), torch.tensor([1, 5]), torch.tensor(0.5)
    with_class, without = labelled(z, t, y), labelled(z, t, torch.tensor([10, 10]))
    answer = guided_noise(labelled, y, null=10, scale=4.0, channels=channels)(z, t)
    k = channels or 4
    torch.testing.assert_close(answer[:, :k], (4 * with_class - 3 * without)[:, :k])
    assert torch.equal(answer[:, k:], with_class[:, k:])


def test_guidance_of_one_is_the_class_alone():
    z, y, t, seen = normal(2, 4, 3), torch.tensor([1, 5]), torch.tensor(0.5), []

    def model(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(len(z))
        return labelled(z, t, y)

    answer = guided_noise(model, y, null=10, scale=1.0)(z, t)
    assert torch.equal(answer, labelled(z, t, y)) and seen == [2]
