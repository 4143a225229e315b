# %% [markdown]
# # 02 · Timesteps: at which times to train
#
# **The network has to answer at every time between noise and data. At which times should it
# practise?** Notebook 01 draws the time $t$ uniformly. Stable Diffusion 3 does not, and for large
# images it also shifts the times. This notebook measures what a trained model does at each time,
# and then builds the densities from that.

# %%
import math
from dataclasses import replace
from functools import partial
from statistics import NormalDist

import torch
import torch.nn.functional as F
from lab import densities, images, lines, pick, trained, turn

from nanosd3 import flow
from nanosd3.data.mnist import to_model
from nanosd3.exercises import check, guess, show
from nanosd3.samplers import euler, guided
from nanosd3.training.train_flow import train_flow

lesson = trained()
pipeline = lesson.pipeline
mmdit = pipeline.mmdit

# %% [markdown]
# ## The question, as a picture
#
# A digit $x_0$ that the model has never seen, as latents, with more and more noise $\epsilon$:
# $z_t = (1 - t) x_0 + t \epsilon$. Below it is the model's guess of the clean picture,
# $z_t - t v$, where $v$ is the velocity that it predicts without being told which digit it is.

# %%
g, count = torch.Generator().manual_seed(0), pick(600, 40)
test = lesson.images.test_images[:count]
labels = lesson.images.test_labels[:count].tolist()
mean, std = pipeline.posterior(to_model(test, 32))
x0 = pipeline.vae.normalise(mean + std * torch.randn(mean.shape, generator=g))
noise, nothing = torch.randn(x0.shape, generator=g), pipeline.encode_text([""] * count)

t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
z = flow.interpolate(x0[4:5], noise[4:5], t)
with torch.no_grad():
    v = mmdit(z, t, *(part[:8] for part in nothing))
rows = {"z, decoded": pipeline.decode(z), "the guess": pipeline.decode(z - t.view(-1, 1, 1, 1) * v)}
images(rows, "t = 0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9 and 1, from left to right.")

# %% [markdown]
# On the left the picture is visible and there is nothing left to decide. On the right the guess is
# a smear, the average of all digits. On the way from right to left the model changes its mind: an
# 8, then a 9, and finally the 4 that it is.
#
# ## Both ends, and between them
#
# The loss at time $t$ is the mean square error per latent,
#
# $$L(t) = E | v - (\epsilon - x_0) |^2$$
#
# Noise and data both have variance 1, so a prediction of zero costs 2.
#
# **PREDICT.** Sketch the loss against $t$: where is it high, where low, and what is it at the two
# ends? And where does it help most to know which digit it is?

# %%
guess("...")

# %%
texts = pipeline.encode_text([f"the digit {label}" for label in labels])


@torch.no_grad()
def losses_at(t):
    t = torch.tensor(t)
    z = flow.interpolate(x0, noise, t)
    multiple = (z * (noise - x0)).sum() / z.square().sum()
    predictions = mmdit(z, t, *texts), mmdit(z, t, *nothing), multiple * z
    return torch.stack([flow.flow_loss(v, x0, noise).mean() for v in predictions])


ts = [0.001, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]
table = torch.stack([losses_at(t) for t in ts])
names = ["model, with the digit", "model, without text", "best multiple of z"]
curves = {name: (ts, column) for name, column in zip(names, table.T, strict=True)}
lines(curves, "t (0 data, 1 noise)", "loss (mean square of velocity)", "Mean over test images.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# At $t = 0$ we see $x_0$. Of the target $\epsilon - x_0$ one part is known, the other unknowable.
# The best prediction is $-x_0$; its loss is the variance of the noise, 1, and no network can do
# better. At $t = 1$ we see $\epsilon$, and the best prediction is $\epsilon - E[x_0]$; its loss is
# the variance of the data. At both ends a *multiple of z* is about right. There is little to learn.
#
# At $t = 0.5$ we see half of the *sum* of noise and data and have to predict their *difference*. To
# tell them apart one must know what digits look like. There the best multiple of $z$ is worthless
# (its loss is 2), and the network improves on it most. That is what the paper means by a hard
# middle.
#
# Knowing the digit helps only from about $t = 0.5$ on, most near 0.8 and 0.9: below that, the
# picture itself shows which digit it is. And near $t = 0$ the model is *worse* than a multiple of
# $z$. We shall see why.
#
# </details>
#
# ## What is decided when
#
# The loss does not tell us what happens to the picture at a given time. An experiment does: start
# with one prompt and switch to another partway through.
#
# **PREDICT.** We ask for a digit d until time s, and for d + 3 from then on. Which digit will the
# picture show for s = 0.9? For s = 0.5? Where is the transition, and is it sudden?

# %%
guess("...")

# %%
first, second = ((torch.arange(pick(60, 10)) + k) % 10 for k in (0, 3))
start, times = pipeline.noise(len(first), 7, (8, 8)), torch.linspace(1, 0, 21)


def velocity_for(digits, model=mmdit, scale=1.6):
    text = pipeline.encode_text([f"the digit {d}" for d in digits])
    return guided(model, text, pipeline.encode_text([""] * len(digits)), scale)


@torch.no_grad()
def draw(velocity):
    return pipeline.decode(euler(velocity, start, times))


early, late = velocity_for(first), velocity_for(second)
switches = pick([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.3], [0.8, 0.4])
drawn = {s: draw(lambda z, t, s=s: (early if t > s else late)(z, t)) for s in switches}

# %%
curves = {}
for name, digits in {"the first prompt": first, "the second prompt": second}.items():
    share = [(torch.tensor(lesson.classify(drawn[s])) == digits).float().mean() for s in switches]
    curves[name] = (switches, share)
lines(
    curves, "s, where the prompt switches", "share of samples that match", "Read by the classifier."
)
rows = {f"s = {s}": drawn[s][:10] for s in switches[1::2]}
images(rows, "The first prompt asks for 0 to 9, the second for 3 to 9 and 0 to 2.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The prompt has hardly any influence while $t$ is above 0.85 or below 0.6. The digit is decided in
# between, in about a quarter of the time. That is where a density should put its weight.
#
# </details>
#
# ## Densities
#
# How do we draw numbers in (0, 1), mostly from the middle? A first idea is a normal distribution
# around 0.5, clipped at the ends:

# %%
clipped = (0.5 + 0.5 * torch.randn(10000, generator=g)).clamp(0, 1)
print(f"exactly at 0 or 1: {(clipped % 1 == 0).float().mean():.0%} of the draws")

# %% [markdown]
# A third of the draws would be wasted exactly at the ends. The *logit-normal* density takes a
# normal number $n$ of mean $m$ and deviation $s$, anywhere on the real line, and maps the line into
# (0, 1) with a sigmoid. With $u$ uniform in (0, 1) and $\Phi$ the distribution function of a
# standard normal number, it is an **inverse transform**, a map from $u$ to $t$:
#
# $$t = \frac{1}{1 + e^{-n}}, \quad n = m + s \Phi^{-1}(u)$$
#
# In plain Python, compared with the package's, which works on whole tensors:


# %%
def logit_normal_slowly(u, mean=0.0, std=1.0):
    t = []
    for quantile in u.tolist():
        n = mean + std * NormalDist().inv_cdf(quantile)
        t.append(1 / (1 + math.exp(-n)))
    return torch.tensor(t)


u = torch.rand(20000, generator=g).clamp(1e-4, 1 - 1e-4)
ours = logit_normal_slowly(u, 0.8, 0.6)
torch.testing.assert_close(ours, flow.logit_normal(u, 0.8, 0.6), atol=1e-5, rtol=1e-3)

# %% [markdown]
# Why maps, and not densities? A map is all one needs for sampling, and it gives the density $p$
# for free: where the map is flat, many $u$ land close together, so at $t(u)$
#
# $$p(t) = 1 / |dt/du|$$
#
# For the logit-normal map that is the paper's density (arXiv 2403.03206, equation 19), here for
# $m = 0$ and $s = 1$, where $\ell = \ln \frac{t}{1 - t}$ is the *logit* of $t$:
#
# $$p(t) = \frac{1}{\sqrt{2 \pi}} \frac{1}{t (1 - t)} e^{-\ell^2 / 2}$$


# %%
def density(transform, u):  # t(u), and the density there
    u = u.clone().requires_grad_()
    t = transform(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    return t.detach(), 1 / slope.abs()


def weight(t):  # the density of logit-normal(0, 1)
    return torch.exp(-(t.logit() ** 2) / 2) / math.sqrt(2 * math.pi) / (t * (1 - t))


even = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
t, p = density(flow.logit_normal, even)
torch.testing.assert_close(p, weight(t))


# %%
def draw_densities(maps, caption):
    densities({name: (f(u), *density(f, even)) for name, f in maps.items()}, "t", caption)


# %%
transforms = {
    "uniform": flow.uniform,
    "logit-normal(0, 1)": flow.logit_normal,
    "mode(1.29)": flow.mode,
    "cosmap": flow.cosmap,
    "logit-normal(0.8, 1)": partial(flow.logit_normal, mean=0.8),
}
draw_densities(transforms, "20,000 draws, and the density from the slope of the map. Our model was "
               "trained with the last one.")  # fmt: skip

# %%
show("logit_normal")


# %%
def logit_normal(u, mean, std):
    raise NotImplementedError("your code here")


solved = check("logit_normal", logit_normal)

# %%
if solved:
    settings = [(-0.8, 1.0), (0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.8, 0.6)]
    mine = {f"({m}, {s})": partial(logit_normal, mean=m, std=s) for m, s in settings}
    draw_densities(mine, "Your draws, for five means and deviations.")
else:
    print("Solve `logit_normal`, and this cell draws from it.")

# %% [markdown]
# The paper has two more maps, equations 20 and 21. The tasks below give the formulas: *mode* is
# heavier in the middle without neglecting the ends, and *cosmap* draws the times of the cosine
# schedule, an older path from data to noise.

# %%
show("mode")


# %%
def mode(u, scale):
    raise NotImplementedError("your code here")


solved = check("mode", mode)

# %%
if solved:
    mine = {f"scale {s}": partial(mode, scale=s) for s in (-0.5, 0.0, 0.5, 1.0, 1.5)}
    draw_densities(mine, "Your draws, for five scales.")
else:
    print("Solve `mode`, and this cell draws from it.")

# %%
show("cosmap")


# %%
def cosmap(u):
    raise NotImplementedError("your code here")


solved = check("cosmap", cosmap)

# %%
if solved:
    both = {"t": cosmap, "angle": lambda u: (cosmap(u) / (1 - cosmap(u))).atan() / (math.pi / 2)}
    draw_densities(both, "Your times, and the angles whose tangent is the "
                   "ratio of noise to data: the cosine schedule draws them evenly.")  # fmt: skip
else:
    print("Solve `cosmap`, and this cell draws from it.")

# %% [markdown]
# ## The density is the weight
#
# Drawing $t$ from a density $p$ with the plain loss is, on average, the same as drawing it
# uniformly and multiplying each loss by $p(t)$:
#
# $$E_{t \sim p} L(t) = \int_0^1 p(t) L(t) dt$$
#
# So the density *is* a weight, and multiplying by it as well would apply it twice. For data of
# variance 1 the best multiple of $z$ has the loss
#
# $$L(t) = 2 - \frac{(2 t - 1)^2}{t^2 + (1 - t)^2}$$
#
# so we can compute all three averages without randomness.


# %%
def loss(t):
    return 2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2)


t = flow.logit_normal(even)
once, weighted = loss(t).mean(), (weight(even) * loss(even)).mean()
twice = (weight(t) * loss(t)).mean() / weight(t).mean()
print(f"plain {loss(even).mean():.3f}, drawn {once:.3f}, weighted {weighted:.3f}, both {twice:.3f}")
torch.testing.assert_close(once, weighted, atol=1e-4, rtol=0)

# %% [markdown]
# **PREDICT.** The averages are equal. Is there any reason to prefer drawing to weighting? And what
# if the u of a batch are not drawn independently, but one from each of 64 equal intervals
# (`flow.stratified`)?

# %%
guess("...")

# %%
each = torch.rand(2000, 64, generator=g, dtype=torch.float64)
stratified = torch.stack([flow.stratified(64, g) for _ in range(2000)]).double()
for name, batches in {
    "uniform t, weighted loss": weight(each) * loss(each),
    "t drawn from the density": loss(flow.logit_normal(each)),
    "the same, stratified": loss(flow.logit_normal(stratified)),
}.items():
    print(f"{name}: deviation of the batch mean {batches.mean(1).std():.4f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Drawing wastes no samples on times that hardly count, so the mean of a batch varies less.
# Stratified draws cover the whole range of times in every batch. (The loss of a real batch also
# varies with its images and its noise, and no choice of $t$ removes that.)
#
# </details>
#
# ## Tails
#
# The logit-normal density vanishes at both ends. Of the 115,200 times that our model saw in
# training (900 batches of 128), how many were near the ends?

# %%
fine = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
print(f"{'':22}{'t < 0.02':>10}{'t < 0.05':>10}{'t > 0.95':>10}{'t > 0.99':>10}")
for name, transform in transforms.items():
    t = transform(fine)
    shares = [end.double().mean() for end in (t < 0.02, t < 0.05, t > 0.95, t > 0.99)]
    print(f"{name:22}" + "".join(f"{115200 * share:10,.1f}" for share in shares))

# %% [markdown]
# With mean 0.8 (the last row) the model never saw a $t$ below 0.02. That explains the first plot of
# the loss, where near 0 it is worse than a multiple of $z$. It also saw hardly any $t$ above 0.99,
# where every sample starts, and yet is no worse there than at 0.95. Near $t = 1$ the answer hardly
# changes with $t$; near $t = 0$ the network must detect ever smaller noise. This does not hurt the
# picture: an error $e$ in the velocity moves the guess of the clean picture by only $t e$.
#
# ## Does it matter?
#
# We train four small transformers from scratch, for 160 steps each, identical except for the mean
# of the logit-normal density. (This takes about a minute each, once; the results are cached. If no
# notebook has trained a transformer yet, the images are encoded first, in under a minute.)
#
# **PREDICT.** Which of the means -0.8, 0, 0.8 and 1.6 gives the best digits this early in training?
# And which reports the smallest training loss?

# %%
guess("...")


# %%
def train_with_mean(mean):
    config = lesson.job.config
    recipe = replace(config.training.flow, steps=pick(160, 1), warmup=pick(25, 1))
    training = replace(config.training, flow=recipe, time_mean=mean, encoder_dropout=0.0,
                       ema_decay=0.95)  # fmt: skip
    job = lesson.new_job(f"mean {mean}", replace(config, training=training))
    return train_flow(job, lesson.features), job.run


rows, curves = {}, {}
for mean in (-0.8, 0.0, 0.8, 1.6):
    network, run = train_with_mean(mean)
    drawn = draw(velocity_for(first, network, scale=1.0))
    accuracy = (torch.tensor(lesson.classify(drawn)) == first).float().mean()
    rows[f"mean {mean}: {accuracy:.0%} correct"] = drawn[:10]
    curves[f"mean {mean}"] = ((torch.arange(8) + 0.5) / 8, run.read_log()[-1]["validation_ema"])
    print(f"mean {mean:4}: training loss {run.stages['flow']['loss']:.2f}")
images(rows, "The digits 0 to 9 after 160 steps, and the share of 60 that the classifier reads.")
lines(curves, "t (0 data, 1 noise)", "held-out loss", "The same images and noise for all four.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The more the density leans towards noise, the more digits are right at this early stage. The
# digit's identity is decided near noise. The training losses fall in the same order, but that is no
# evidence: each is an average over *its own* density. Only losses at the same $t$ can be compared.
# The log contains such losses, on images that are never trained on, and the last figure shows them:
# each run is good where it practised, and the one with the smallest training loss is the worst of
# all below $t = 0.6$.
#
# </details>
#
# Do not generalise from one run of 160 steps and one metric. Strokes and edges are decided at
# smaller $t$. With long training on photographs, SD3's authors found mean 0 the best of those they
# tried; for our short training 0.8 was chosen.
#
# ## Larger images: shift
#
# A larger picture has more pixels for the same content, so neighbouring pixels are similar. Their
# noise is independent, and averaging neighbours removes it. So at the same t *less is hidden*.
#
# **PREDICT.** Below, a digit of 28 x 28 pixels and the same one enlarged to 112 x 112, with noise
# at the same $t$. In the third row each block of 4 x 4 pixels of the second is averaged. How much
# of the noise's deviation remains?

# %%
guess("...")

# %%
small = to_model(test[4:5], 28)
large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
small_noise, large_noise = (torch.randn(x.shape, generator=g) for x in (small, large))
print(f"deviation of the noise, averaged: {F.avg_pool2d(large_noise, 4).std():.3f}")
t = torch.tensor([0.2, 0.5, 0.8, 0.9, 0.95])
same_t = flow.interpolate(large, large_noise, t)
rows = {
    "28 x 28": flow.interpolate(small, small_noise, t),
    "112 x 112": same_t,
    "its 4 x 4 averaged": F.avg_pool2d(same_t, 4),
}
alike = {name: F.instance_norm(z)[:, 0] for name, z in rows.items()}  # of one contrast
images(alike, "t = 0.2, 0.5, 0.8, 0.9 and 0.95.", cell=0.9, span=(-3, 3))

# %% [markdown]
# <details><summary>What happened</summary>
#
# A quarter. The mean of $k$ independent numbers has a deviation smaller by the square root of $k$,
# and $k = 16$.
#
# </details>
#
# What counts is the ratio of noise to data, $t / (1 - t)$. To hide as much as before, it must
# become $\alpha$ times larger, where $\alpha$ is the square root of the ratio of pixel counts.
# Solved for the new time $t'$ (paper, equation 23):
#
# $$\frac{t'}{1 - t'} = \alpha \frac{t}{1 - t}, \quad t' = \frac{\alpha t}{1 + (\alpha - 1) t}$$
#
# Step by step:


# %%
def shift_slowly(t, alpha):
    shifted = []
    for time in t.tolist():
        ratio = alpha * time / (1 - time)  # noise to data
        shifted.append(ratio / (1 + ratio))  # and back to a time
    return torch.tensor(shifted)


t_shifted = flow.shift(t, 4.0)
torch.testing.assert_close(shift_slowly(t, 4.0), t_shifted)
torch.testing.assert_close(-2 * t_shifted.logit(), -2 * t.logit() - 2 * math.log(4))  # log-SNR
torch.testing.assert_close(flow.shift(flow.shift(t, 2.0), 3.0), flow.shift(t, 6.0))

# %% [markdown]
# The **log-SNR** $\lambda$ is the logarithm of the ratio of the data's variance to the noise's. A
# shift changes it by a constant, the same at all times; so shifts compose by multiplication:
#
# $$\lambda = 2 \ln \frac{1 - t}{t}, \quad \lambda' = \lambda - 2 \ln \alpha$$
#
# The same function shifts the times of training and the times of sampling. SD3 uses $\alpha = 3$ at
# 1024 x 1024, where the formula would give 4 for a model trained at 256.
#
# Maps, densities and shifts in one drawing, for our model and for the official one:
#
# ![Four maps from u to t and their densities; below, the densities, the shift and the sampled times
# of two models](../nanosd3/assets/pictures/timesteps.svg)

# %%
show("shift")


# %%
def shift(t, alpha):
    raise NotImplementedError("your code here")


solved = check("shift", shift)

# %%
if solved:
    at_shifted = flow.interpolate(large, large_noise, shift(t, 4.0))
    alike["112 x 112 at your t', averaged"] = F.instance_norm(F.avg_pool2d(at_shifted, 4))[:, 0]
    images(alike, "The last row at times that you shifted by 4.", cell=0.9, span=(-3, 3))
else:
    print("Solve `shift`, and this cell hides the large digit as well as the small one.")

# %% [markdown]
# Here you can turn the mean, the deviation and the shift. Shift by 3, then turn the mean until the
# density is where it was. Which function of 3 is that mean?


# %%
def shifted_draws(mean, std, shift):
    def transform(u):
        return flow.shift(flow.logit_normal(u, mean, std), shift)

    return {"": (transform(u), *density(transform, even))}


turn(shifted_draws, partial(densities, xlabel="t"), "20,000 draws of t, and the density.",
     [{"mean": -0.8}, {"std": 0.5}, {"std": 2.0}, {"mean": 0.8}, {"shift": 3.0}],
     mean=(-2.0, 2.0, 0.1, 0.0), std=(0.1, 3.0, 0.1, 1.0), shift=(0.2, 6.0, 0.2, 1.0))  # fmt: skip

# %% [markdown]
# **Open questions.** Measure when *bold* and *thin* are decided, with the prompt-switching
# experiment: earlier or later than the digit? Does `pipeline(prompts, shift=...)` help with four
# steps? On the two half circles of notebook 01, does the density matter at all, and is mean 0.8
# good there?
#
# ## What was left out
#
# The study behind SD3's choice: 61 variants of path and density, ranked over 24 settings; the
# logit-normal(0, 1) came out first (section 5.1 of the paper, arXiv 2403.03206). The densities are
# in section 3.1, the shift in section 5.3.2, which derives it from a constant image, as we did with
# the averaged digit. The densities of EDM and of the cosine path (section 3) are in
# `nanosd3/related/formulations.py`.
