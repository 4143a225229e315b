# %% [markdown]
# # 07 · The autoencoder and its latents
#
# **Why does the flow not work on pixels?** The transformer of Stable Diffusion 3 never sees a
# pixel. It works on latents, small tensors that a decoder turns into the picture. This notebook
# looks at what is lost, what is gained, and what can go wrong between the two.

# %%
import torch
from lab import images, lines, maps, pick, trained

from nanosd3 import flow
from nanosd3 import vae as autoencoder
from nanosd3.data.mnist import to_model, to_uint8
from nanosd3.exercises import check, guess, show
from nanosd3.samplers import heun
from nanosd3.vae import AutoencoderKL

lesson = trained()
pipeline, vae = lesson.pipeline, lesson.pipeline.vae
labels = lesson.images.test_labels[: pick(300, 50)]
test = to_model(lesson.images.test_images[: len(labels)], 32)
with torch.no_grad():
    mean, logvar = vae.encode(test)
    decoded = vae.decode(mean)
rows = {"test images": to_uint8(test[:10]), "decoded": to_uint8(decoded[:10])}
rows["error, amplified"] = (decoded - test)[:10, 0].abs()
images(rows, f"{test[0].numel()} pixels, encoded as {mean[0].numel()} latents and decoded again.")

# %% [markdown]
# A quarter of the numbers, and the eye notices little difference. For SD3 it is a twelfth: 3 x 1024
# x 1024 pixels become 16 x 128 x 128 latents (latent diffusion: Rombach et al., arXiv 2112.10752).
#
# Attention compares every token with every other. One token is a patch of 2 x 2, so a picture of
# side $S$, first reduced by a factor $f$, has $N$ tokens and $N^2$ pairs:
#
# $$N = \left(\frac{S}{2 f}\right)^2$$
#
# **PREDICT.** Latents are 8 times smaller in height and width. By what factor does the number of
# pairs that one attention compares go down?

# %%
guess("...")

# %%
sides = torch.tensor([256, 512, 1024, 2048])
pixels, latents = (((sides / factor / 2) ** 2) ** 2 for factor in (1, 8))
curves = {"patches of pixels": (sides, pixels), "patches of latents": (sides, latents)}
lines(curves, "side of the image (pixels)", "pairs in one attention", "Every token with every "
      "token.", "xy", sides.tolist())  # fmt: skip
print(f"pairs of pixels' patches for each of latents' patches: {pixels[0] / latents[0]:,.0f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# There are $8^2 = 64$ times fewer tokens, and $64^2 = 4096$ times fewer pairs, at every size.
#
# </details>
#
# ## The block everything is made of
#
# Encoder and decoder are stacks of one residual block: (group norm, SiLU, 3 x 3 convolution) twice,
# added to the input; between some of them the sides halve, or double:
#
# ![The autoencoder: the encoder halves the image level by level down to a mean and a log-variance,
# a latent is drawn and normalised, and the decoder doubles it
# back](../nanosd3/assets/pictures/vae.svg)
#
# *Group norm* takes groups of neighbouring channels of one image and, with the
# mean $\mu$ and the variance $\sigma^2$ of a group, normalises each of its values $x$, so that
# nothing depends on the other images of the batch. *SiLU* is the activation $a(x)$:
#
# $$n(x) = \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-6}}}, \quad a(x) = \frac{x}{1 + e^{-x}}$$
#
# After the norm come a weight and a bias for each channel. With convolutions $C_1$ and $C_2$ the
# block is
#
# $$y = x + C_2(a(n_2(C_1(a(n_1(x))))))$$
#
# Between levels of blocks the encoder halves the size with a convolution of stride 2, and the
# decoder doubles it by repeating pixels. There are two halvings here, three in SD3. (We use
# PyTorch's convolution instead of a loop over pixels; the exercise has that loop.)


# %%
def norm_slowly(x, norm):
    out = torch.empty_like(x)
    for b in range(len(x)):
        for group in torch.arange(x.shape[1]).chunk(norm.num_groups):
            part = x[b, group]
            out[b, group] = (part - part.mean()) / (part.var(correction=0) + 1e-6).sqrt()
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def block_slowly(x, block):
    h = norm_slowly(x, block.norm1)
    h = norm_slowly(block.conv1(h * h.sigmoid()), block.norm2)
    return x + block.conv2(h * h.sigmoid())


with torch.no_grad():
    x = vae.encoder.conv_in(test[:2])
    block = vae.encoder.down[0].block[0]
    torch.testing.assert_close(block_slowly(x, block), block(x), atol=1e-4, rtol=1e-4)

# %%
show("resblock")


# %%
def resblock(x, weight1, weight2, groups):
    raise NotImplementedError("your code here")


solved = check("resblock", resblock)

# %%
if solved:
    edges = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]).view(1, 1, 3, 3)
    out = resblock(test[:10], edges, torch.full((1, 1, 3, 3), 1 / 9), 1)
    images({"in": test[:10, 0], "out": out[:, 0]}, "Ten digits through your block. Its first "
           "convolution finds edges, its second one blurs.")  # fmt: skip
else:
    print("Solve `resblock`, and this cell sends ten digits through it.")

# %% [markdown]
# ## A Gaussian for every latent
#
# For each latent $z$ of an image the encoder outputs not a number but a mean $\mu$ and a
# log-variance $\ln \sigma^2$. In training $z$ is drawn from that Gaussian $q = N(\mu, \sigma^2)$,
# and the decoder has to cope with the noise (Kingma and Welling, arXiv 1312.6114).
#
# **PREDICT.** Which is larger: the variation of the means over the image, or the deviation of the
# noise around them?

# %%
guess("...")

# %%
deviation = (0.5 * logvar).exp()
shown = {"mean, channel 0": mean[0, 0], "mean, channel 1": mean[0, 1]}
maps(shown | {"deviation, channel 0": deviation[0, 0]}, "column", "row",
     "The latents of a seven: two channels of means, and the deviations of one.",
     "latent")  # fmt: skip
print(f"deviation of the means {mean.std():.2f}, of the noise (average) {deviation.mean():.2f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The means look like a small picture of the seven. The noise is much weaker than they are.
#
# </details>
#
# How does a gradient get through a random draw? The obvious way fails silently:

# %%
g = torch.Generator().manual_seed(0)
m, s = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
torch.normal(m, s, generator=g).square().sum().backward()
print("gradient of the mean:", *m.grad.tolist(), "and of the deviation:", *s.grad.tolist())

# %% [markdown]
# Zero: the draw is not differentiable. The solution is to draw the noise $\epsilon$ from $N(0, 1)$
# first and then compute
#
# $$z = \mu + \sigma \epsilon$$
#
# whose derivatives are 1 and $\epsilon$. In loops, and in the package:


# %%
def sample_slowly(mean, logvar, noise):
    z = torch.zeros(mean.shape)
    for i in range(mean.numel()):
        variance = logvar.flatten()[i].exp()
        z.view(-1)[i] = mean.flatten()[i] + variance.sqrt() * noise.flatten()[i]
    return z


noise = torch.randn(mean[:1].shape, generator=g)
z = autoencoder.sample_posterior(mean[:1], logvar[:1], noise)
torch.testing.assert_close(z, sample_slowly(mean[:1], logvar[:1], noise))
m = mean[:1].clone().requires_grad_()
autoencoder.sample_posterior(m, logvar[:1], noise).square().sum().backward()
torch.testing.assert_close(m.grad, 2 * z)

# %%
show("sample_posterior")


# %%
def sample_posterior(mean, logvar, noise):
    raise NotImplementedError("your code here")


solved = check("sample_posterior", sample_posterior)

# %%
if solved:
    m, v = mean[:1].expand(10, -1, -1, -1), logvar[:1].expand(10, -1, -1, -1)
    draws, rows = torch.randn(m.shape, generator=g), {}
    for k in (1.0, 5.0, 20.0):
        with torch.no_grad():
            drawn = vae.decode(sample_posterior(m, v + 2 * torch.tensor(k).log(), draws))
        rows[f"deviation times {k:g}"] = to_uint8(drawn)
    images(rows, "Ten of your draws for one image, decoded.")
else:
    print("Solve `sample_posterior`, and this cell decodes ten draws for one image.")

# %% [markdown]
# ## Holding latents together: the KL term
#
# So far nothing keeps the encoder from making its means huge and its noise tiny. A penalty does:
# the KL divergence of $q$ from $p = N(0, 1)$, summed over the latents $z_j$ of an image:
#
# $$D = \frac{1}{2} \sum_j (\mu_j^2 + \sigma_j^2 - 1 - \ln \sigma_j^2)$$
#
# **PREDICT.** The same number is the mean of $\ln q(z) - \ln p(z)$ over draws $z$ from $q$. How
# many draws does it take to be within a percent?

# %%
guess("...")

# %%
total = 0.0
for a, b in zip(mean[0].flatten(), logvar[0].flatten(), strict=True):
    total += 0.5 * (a**2 + b.exp() - 1 - b)
exact = autoencoder.kl_divergence(mean[:1], logvar[:1])
torch.testing.assert_close(exact, total[None], atol=1e-2, rtol=1e-4)

draws = torch.randn(3000, *mean[0].shape, generator=g)
z = autoencoder.sample_posterior(mean[0], logvar[0], draws)
log_ratio = 0.5 * (z.square() - draws.square() - logvar[0]).flatten(1).sum(1)
count = torch.arange(1, 3001)
running = log_ratio.cumsum(0) / count
curves = {"mean over draws": (count, running), "closed form": (count, exact.expand(3000))}
lines(curves, "draws", "KL of one image (nats)", "A mean over more and more draws.", "x")
off = 100 * (running / exact - 1)
for n in (1, 10, 100, 1000):
    print(f"off after {n:4} draw{'s' * (n > 1)}: {off[n - 1]:5.2f}%")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Few: here the first is already close. The two logarithms are sums over 256 latents, and what is
# too large in one is offset by what is too small in another.
#
# </details>

# %%
show("kl_divergence")


# %%
def kl_divergence(mean, logvar):
    raise NotImplementedError("your code here")


solved = check("kl_divergence", kl_divergence)

# %%
if solved:
    order = kl_divergence(mean, logvar).argsort()
    rows = {"fewest nats": to_uint8(test[order[:10]]), "most nats": to_uint8(test[order[-10:]])}
    images(rows, f"Of {len(test)} test images: those whose latents tell least and most, by you.")
else:
    print("Solve `kl_divergence`, and this cell draws the images with most and fewest nats.")

# %% [markdown]
# ## How many channels?
#
# The training loss is the squared error, summed over the pixels of the image $x$ and its decoded
# latents $\tilde{x}$, plus a weight $\beta$ times the KL:
#
# $$L = \sum_i (x_i - \tilde{x}_i)^2 + \beta D$$
#
# We train small autoencoders of our own with the package's function, 200 steps each, and change one
# setting at a time. (The results are cached.)

# %%
from dataclasses import replace

from nanosd3.config import Recipe
from nanosd3.training.train_autoencoder import train_autoencoder


def small_vae(channels, kl_weight):
    config = lesson.job.config
    recipe = Recipe(steps=pick(200, 3), batch=32, lr=2e-3, warmup=1, weight_decay=0.0)
    training = replace(config.training, autoencoder=recipe, kl_weight=kl_weight)
    config = replace(config, training=training,
                     vae=replace(config.vae, latent_channels=channels))  # fmt: skip
    return train_autoencoder(lesson.new_job(f"07-vae-{channels}-{kl_weight}", config))


# %% [markdown]
# Errors are given as PSNR, in decibels. Pixels span 2, from -1 to 1, so for a mean square error $e$
# it is
#
# $$10 \, \log_{10} \frac{2^2}{e}$$
#
# **PREDICT.** 1, 4 or 16 channels of 8 x 8: how will the error change, and will you see it?

# %%
guess("...")

# %%
rows, psnr, channels = {"test images": to_uint8(test[:10])}, [], (1, 4, 16)
for c in channels:
    net = small_vae(c, 1e-2)
    with torch.no_grad():
        decoded = net.decode(net.encode(test)[0])
    rows[f"{c * 64} latents"] = to_uint8(decoded[:10])
    psnr.append(10 * (4 / (decoded - test).square().mean()).log10())
images(rows, "The same ten digits through 1, 4 and 16 channels.")
caption = f"Of {len(test)} test images."
lines({"": (channels, psnr)}, "latent channels", "PSNR (dB)", caption, "x", channels)

# %% [markdown]
# <details><summary>What happened</summary>
#
# One channel loses detail; from 4 to 16 there is little left to gain on digits. Photographs contain
# more: SD3 has 16 channels where its predecessors had 4, and in the paper's table 3 the PSNR is
# 25.1 dB with 4 channels, 26.4 with 8 and 28.6 with 16. But more channels are harder to generate:
# small models do worse with 16, and only large ones can afford them (section 5.2.1).
#
# </details>
#
# ## How much KL?
#
# Both terms of the loss are sums, so $\beta$ is the price of one nat in squared pixel error.
# (With means instead of sums the same weight means something else. That is the most common
# confusion about it.)
#
# **PREDICT.** With KL weights 0, 0.01 and 1: what are the statistics of the latents, and what does
# the decoder make of pure noise $N(0, 1)$?

# %%
guess("...")

# %%
rows, noise = {}, torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
for weight in (0.0, 1e-2, 1.0):
    net = small_vae(4, weight)
    with torch.no_grad():
        m, v = net.encode(test)
        deviation, decoded, from_noise = (0.5 * v).exp(), net.decode(m), net.decode(noise)
    rows[f"KL weight {weight:g}"] = to_uint8(torch.cat([decoded[:5], from_noise]))
    spread = " ".join(f"{d:.2f}" for d in m.std((0, 2, 3)))
    print(f"  with KL weight {weight:g}: error {(decoded - test).square().mean():.4f}, deviations",
          f"of channels {spread}, of the noise {deviation.mean():.2f}")  # fmt: skip
images(rows, "Five decoded digits, then six decoded noise samples.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Without the term the latents have arbitrary statistics and their noise is close to zero. With
# weight 1 noise drowns most channels and the digits blur. In between, weight 0.01 costs little. But
# no weight turns decoded noise into a digit: the decoder does not know which strokes belong
# together. **That is what the flow is for**; the autoencoder only has to make its work easy.
#
# </details>
#
# ## Shift and scale
#
# The flow mixes latents with noise of deviation 1, so it wants latents of mean 0 and deviation 1.
# We get them from the encoder's $z$ with a shift $a$, subtracted first, and a scale $b$:
#
# $$x_0 = (z - a) b$$
#
# Both numbers are measured once, after the autoencoder has been trained. Suppose the scale is
# forgotten and the deviation $s$ of the latents is 0.3 or 3: the flow mixes $s x_0$ with noise,
#
# $$z_t = (1 - t) s x_0 + t \epsilon$$
#
# **PREDICT.** At which time $t$ can the classifier then no longer read the digit?

# %%
guess("...")

# %%
x0, config = vae.normalise(mean), vae.config
torch.testing.assert_close(vae.denormalise(x0), mean, atol=1e-5, rtol=1e-5)
eps = torch.randn(x0.shape, generator=g)
times, curves = torch.linspace(0.1, 0.95, pick(12, 3)), {}
for s in (0.3, 1.0, 3.0):
    accuracy = []
    for t in times:
        z = flow.interpolate(s * x0, eps, t)
        correct = torch.tensor(lesson.classify(pipeline.decode(z / z.std()))) == labels
        accuracy.append(correct.float().mean())
    curves[f"deviation {s:g}"] = (times, accuracy)
lines(curves, "t (0 data, 1 noise)", "accuracy", "Noisy latents, decoded and classified.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The digit drowns too late or too early, although training draws its times as before. In fact a
# forgotten scale *is* a timestep shift (notebook 02) of $1 / s$. Divide $z_t$ by the sum of its two
# factors, and it is a correct mixture at another time:
#
# $$\frac{z_t}{(1 - t) s + t} = (1 - t') x_0 + t' \epsilon, \quad t' = \frac{t}{(1 - t) s + t}$$
#
# Nothing crashes; the network merely trains at the wrong times.
#
# </details>
#
# Our latents need little correction. SD3's numbers are $a = 0.0609$ and $b = 1.5305$; here are our
# samples, decoded with those.

# %%
for t in times:
    z = flow.interpolate(3 * x0, eps, t) / (t + (1 - t) * 3)
    same = flow.interpolate(x0, eps, flow.shift(t, 1 / 3))
    torch.testing.assert_close(z, same, atol=1e-4, rtol=1e-4)
latents = pipeline(["a bold 3", "a thin 5", "8", "the digit 4"], output="latent", seed=1)
official = AutoencoderKL(replace(config, shift=0.0609, scale=1.5305))
variants = {"right": vae.denormalise(latents), "SD3's numbers": official.denormalise(latents),
            "scaled the wrong way": vae.denormalise(latents) * 1.5305}  # fmt: skip
with torch.no_grad():
    rows = {name: to_uint8(vae.decode(z)) for name, z in variants.items()}
images(rows, "One set of samples, decoded three ways.")

# %% [markdown]
# Nothing in the picture tells you that a number is wrong: the strokes are just thinner and fainter,
# or heavier.

# %%
show("normalise")


# %%
def normalise(z, shift, scale):
    raise NotImplementedError("your code here")


solved = check("normalise", normalise)

# %%
if solved:
    text = pipeline.encode_text([f"the digit {d}" for d in labels[:10].tolist()])
    ts, start = flow.schedule(pick(20, 4)), pick(8, 1)
    with torch.no_grad():
        z = flow.interpolate(normalise(mean[:10], config.shift, config.scale), eps[:10], ts[start])
        z = heun(lambda z, t: pipeline.mmdit(z, t, *text), z, ts[start:])
    images({"test images": to_uint8(test[:10]), "drawn again": pipeline.decode(z)}, "Normalised by "
           "you, mixed with noise, and sampled back.")  # fmt: skip
else:
    print("Solve `normalise`, and this cell mixes ten digits with noise and samples them back.")

# %% [markdown]
# ## Between two digits
#
# Noise has deviation 1, and a mixture of two keeps it only if the squares of the weights add up to
# 1. So the way from $\epsilon_1$ to $\epsilon_2$ is a quarter circle, for $w$ from 0 to 1:
#
# $$\cos \left(\frac{\pi w}{2}\right) \epsilon_1 + \sin \left(\frac{\pi w}{2}\right) \epsilon_2$$
#
# **PREDICT.** Halfway between a two and a seven: in pixels, in latents, and in the noise from which
# the flow would generate them. Which halfway picture is a digit?

# %%
guess("...")

# %%
ends = to_model(lesson.images.test_images, 28)
ends = torch.cat([ends[lesson.images.test_labels == d][1:2] for d in (2, 7)])
w = torch.linspace(0, 1, 9)[:, None, None, None]
ts, empty = flow.schedule(pick(20, 3)), pipeline.encode_text([""] * 9)


def velocity(z, t):
    return pipeline.mmdit(z, t, *(part[: len(z)] for part in empty))


with torch.no_grad():
    x0 = pipeline.encode(ends)
    eps = heun(velocity, x0, ts.flip(0))  # the flow in reverse: from data to noise
    mixed = torch.cos(w * torch.pi / 2) * eps[:1] + torch.sin(w * torch.pi / 2) * eps[1:]
    rows = {"pixels": to_uint8(torch.lerp(ends[:1], ends[1:], w)),
            "latents": pipeline.decode(torch.lerp(x0[:1], x0[1:], w)),
            "noise": pipeline.decode(heun(velocity, mixed, ts))}  # fmt: skip
images(rows, "From a two to a seven, in three spaces.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# In pixels the two digits are superimposed. In latents, strokes begin to move but break. When the
# noise is interpolated, every picture consists of complete strokes, even where it is neither a two
# nor a seven. Only that space knows what digits are.
#
# </details>
#
# **Open questions.** Train the flow of notebook 05 on 16 channels: is it really harder? In the
# flow's training, use the posterior's mean instead of a sample: LOG.md has a number for that.
#
# ## What was left out
#
# Autoencoders of this family are also trained with a perceptual and an adversarial term, which need
# networks trained on photographs; SD3's own recipe is unpublished. The paper's study of channels is
# in section 5.2.1, arXiv 2403.03206.
