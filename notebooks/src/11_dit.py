# %% [markdown]
# # 11 · DiT: a transformer in place of the U-Net
#
# **How do you tell a plain transformer what it should draw, and how noisy its input is?** Until
# 2022 diffusion models were U-Nets. DiT (Peebles and Xie, arXiv 2212.09748) took a vision
# transformer instead, and tried four answers to this question. SD3 kept the best of them: a DiT is
# an MMDiT with one stream, told a class instead of a text. This notebook trains small ones in the
# latents of the lesson model, first with DiT's own objective, **DDPM**, then with the flow's.

# %%
from dataclasses import replace

import torch
from lab import cached, images, lines, pick, trained

from nanosd3.config import Recipe
from nanosd3.data.mnist import to_model
from nanosd3.exercises import check, guess, show
from nanosd3.flow import stratified
from nanosd3.random_streams import rng
from nanosd3.related import ddpm, train_dit
from nanosd3.related.dit import BLOCKS, DIT_CONFIGS, AdaptiveBlock, DiT, multiply_adds
from nanosd3.training.ema import make_ema, update_ema
from nanosd3.training.metrics import frechet_distance
from nanosd3.training.optimizer import learning_rate

# %%
lesson = trained()
source, features, pipeline = lesson.job.source, lesson.features, lesson.pipeline
config, labels = DIT_CONFIGS["mnist"], source.labels
x0 = features.normalise(features.latents(torch.arange(8))[0])
model = DiT(config)
print("images", tuple(source.pixels(torch.arange(8)).shape), "latents", tuple(x0.shape))
print("tokens", tuple(model.x_embedder(x0).shape), "classes", config.classes, "and none")
images({"images": lesson.images.train_images[:8]}, f"Labels: {labels[:8].tolist()}")

# %% [markdown]
# ## What a patch costs
#
# An image or latent of $I \times I$ is cut into patches of $p \times p$, which makes $N = (I/p)^2$
# tokens of width $D$ (notebook 03). The paper's models have four sizes, S, B, L and XL, each with
# patches of 8, 4 and 2, for latents of $32 \times 32$. The paper measures a model by its
# **multiply-adds** for one image, which it calls flops.
#
# **PREDICT.** From patches of 4 to patches of 2: by what factor does the cost of a model grow? Is
# it the same factor for the smallest and the largest?

# %%
guess("...")

# %%
patches, costs = (8, 4, 2), {}
for size in pick(("S", "B", "L", "XL"), ("S",)):
    cost = [multiply_adds(DIT_CONFIGS[f"DiT-{size}/{p}"]) / 1e9 for p in patches]
    costs[f"DiT-{size}"] = (patches, cost)
    print(f"DiT-{size}:", ", ".join(f"{x:.2f}" for x in cost), f"(4 to 2: {cost[2] / cost[1]:.2f})")
lines(
    costs,
    "patch size",
    "multiply-adds of an image (10^9)",
    "The twelve published models.",
    "xy",
    patches,
)

# %% [markdown]
# <details><summary>What happened</summary>
#
# Four times the tokens: a little more than four times the cost, 4.3 times for S and 4.1 for XL. The
# linear layers cost the same for each token, however many there are. Only attention has pairs of
# tokens, and for wide tokens its share is small. In the paper smaller patches make better images at
# every size, so what counts is the work, not the number of weights: from XL/8 to XL/2, which have
# nearly the same number, FID falls from 106 to 19 (section 5, at 400,000 steps).
#
# </details>

# %%
show("block_cost")


# %%
def block_cost(side, patch, width):
    raise NotImplementedError("your code here")


solved = check("block_cost", block_cost)

# %%
if solved:
    sides = (16, 32, 64, 128, 256, 512)
    curves = {f"width {D}": (sides, [block_cost(side, 2, D) / 1e9 for side in sides])
              for D in (384, 1152)}  # fmt: skip
    linear = [block_cost(16, 2, 1152) / 1e9 * (side / 16) ** 2 for side in sides]
    curves["as many pixels, as much work"] = (sides, linear)
    lines(curves, "side of the latents", "multiply-adds of a block (10^9)",
          "Drawn with your block_cost, for patches of 2.", "xy", sides)  # fmt: skip
else:
    print("Solve `block_cost`, and this cell draws what a block costs as images grow.")

# %% [markdown]
# ## Four ways to tell it
#
# The time $t$ and the class $y$ become two vectors of width $D$; $c$ is their sum. A block of the
# transformer has two branches $F$, attention and MLP, each behind a LayerNorm, LN. The paper
# (section 3.2) tries four ways to condition such blocks (`BLOCKS` in `nanosd3/related/dit.py`):
#
# * **in-context**: the two vectors are two more tokens, cut off at the end;
# * **cross-attention**: a third branch, in which each token attends to the two vectors;
# * **adaLN**: $x \leftarrow x + F((1 + \gamma) LN(x) + \beta)$, where a linear layer computes the
#   scale $\gamma$ and the shift $\beta$ from $c$, separately for each branch;
# * **adaLN-Zero**: $x \leftarrow x + \alpha F((1 + \gamma) LN(x) + \beta)$, with a
#   gate $\alpha$ in addition, and that linear layer starts at zero.
#
# And one that is not in the paper, `adaln_gates`: with gates, but without the zeros. A block of
# adaLN-Zero in loops over the tokens:


# %%
def block_slowly(block, x, c):  # x (N, D), c (D), one image
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.adaLN_modulation(c).chunk(6)

    def modulated(x, shift, scale):
        rows = [torch.nn.functional.layer_norm(row, row.shape, eps=1e-6) for row in x]
        return torch.stack([(1 + scale) * row + shift for row in rows])

    heard = block.attn(modulated(x, shift, scale)[None])[0]
    x = torch.stack([row + gate * new for row, new in zip(x, heard, strict=True)])
    said = block.mlp(modulated(x, mlp_shift, mlp_scale))
    return torch.stack([row + mlp_gate * new for row, new in zip(x, said, strict=True)])


x, c, block = torch.randn(2, 5, 64), torch.randn(2, 64), AdaptiveBlock(64, heads=1, gated=True)
ours, theirs = block_slowly(block, x[1], c[1]), block(x, c, None)[1]
torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

# %% [markdown]
# **PREDICT.** Fresh networks, before any training. By how much does the first block of each of the
# five change its tokens, relative to their size? And which of the ways costs most at XL/2?

# %%
guess("...")

# %%
small, XL = replace(config, width=64, heads=1, learned_variance=False), DIT_CONFIGS["DiT-XL/2"]
for kind in BLOCKS:
    torch.manual_seed(0)
    fresh = DiT(replace(small, block=kind))
    x, pair = torch.randn(8, 16, 64), torch.randn(8, 2, 64)
    with torch.no_grad():
        change = (fresh.blocks[0](x, pair.sum(1), pair) - x).norm() / x.norm()
    cost = multiply_adds(replace(XL, block=kind)) / 1e9
    print(f"{kind:16} changes its tokens by {change:4.0%}; XL/2 costs {cost:.2f} x 10^9")

# %% [markdown]
# <details><summary>What happened</summary>
#
# A block of adaLN-Zero changes nothing: it is the identity. All others begin with noise of their
# own, which the layers above have to live with. Cross-attention costs a seventh more; the rest cost
# the same to within a hundredth. (One reads that adaLN-Zero is *cheaper* than adaLN. It makes six
# vectors from $c$ where adaLN makes four, so it costs a little more.)
#
# </details>
#
# ## Which way is best?
#
# The objective is DDPM's (Ho et al., arXiv 2006.11239): noise is added in 1000 steps, and the
# network is told the step and predicts the noise $\epsilon$. What is left of the image after step
# $n$ is a share $\bar{\alpha}_n$ of its variance, the product of all $1 - \beta_k$ so far, where
# $\beta_k$ is the variance that step $k$ adds:
#
# $$z_n = \sqrt{\bar{\alpha}_n} x_0 + \sqrt{1 - \bar{\alpha}_n} \epsilon$$
#
# $$\bar{\alpha}_n = (1 - \beta_0)(1 - \beta_1) \cdots (1 - \beta_n)$$
#
# The loss is the mean square of $\hat{\epsilon}(z_n, n, y) - \epsilon$, the network's error. Every
# variant sees the same images, labels, noise and steps.


# %%
def alpha_bar_slowly():
    left, found = 1.0, []
    for k in range(1000):
        left *= 1 - (1e-4 + k / 999 * (0.02 - 1e-4))  # beta grows evenly
        found.append(left)
    return torch.tensor(found, dtype=torch.float64)


torch.testing.assert_close(alpha_bar_slowly(), ddpm.linear_schedule().alpha_bar)


def batch(step, B=pick(64, 8)):  # noqa: B008
    g = rng("dit", step)
    i, keep = source.draw(B, g), torch.rand(B, generator=g) >= 0.1
    mean, std = features.latents(i)
    noise, posterior = torch.randn(2, *mean.shape, generator=g)
    x0, y = features.normalise(mean + std * posterior), labels[i]
    return x0, noise, stratified(B, g), train_dit.drop_labels(y, keep, config.null)


# %%
def train(config, steps, objective="ddpm", lr=6e-3):
    torch.manual_seed(0)
    model, recipe, log = DiT(config), Recipe(steps, 64, lr, min(50, steps // 4), 0), []
    ema, task = make_ema(model), train_dit.DiTLoss(objective, train_dit.steps_evenly)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe)
        loss = task.losses(model, *batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, model, step, 0.99)
        log.append(loss.detach())
    return dict(ema.state_dict()) | {"log": torch.stack(log)}


def restored(run, config):
    model = DiT(config).requires_grad_(False)
    model.load_state_dict({name: weights for name, weights in run.items() if name != "log"})
    return model


# %% [markdown]
# **PREDICT.** All five kinds of block, 300 steps each, width 64. In which order do you expect their
# losses? Is it the gates of adaLN-Zero that help, or its zeros?

# %%
guess("...")

# %%
steps, width = pick(300, 6), pick(100, 2)
logs = {kind: cached(f"dit_{kind}", lambda k=kind: train(replace(small, block=k), steps))["log"]
        for kind in BLOCKS}  # fmt: skip
smooth = {kind: log.unfold(0, width, 1).mean(1) for kind, log in logs.items()}
curves = {kind: (range(width, steps + 1), y / smooth["adaln_zero"]) for kind, y in smooth.items()}
lines(curves, "step", "loss, relative to adaLN-Zero's", f"Means of {width} steps, one seed.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The curves come from one seed, so neighbours may change places: here `adaln_gates` ends a little
# below adaLN-Zero. With three seeds, 600 steps and width 128 the errors are 0.175 in-context, 0.174
# cross-attention, 0.169 adaLN, 0.169 with gates that do not start at zero, and 0.166 adaLN-Zero
# ([x-dit-1-gates](../nanosd3/claims/README.md#x-dit-1-gates)): the gates alone bring nothing; the
# zeros help. The paper's networks are far larger and trained for 400,000 steps. Their FIDs are
# further apart: 35, 26, 25 and 19, in the order of the list above.
#
# </details>
#
# ## Without a class
#
# One row of the table of classes is for *none*: a tenth of all labels are replaced by it, so that
# the same network also learns what noise looks like without being told the class. Guidance takes
# the difference of the two (notebook 06), at scale $s$:
#
# $$\hat{\epsilon} = \hat{\epsilon}_{none} + s (\hat{\epsilon}_y - \hat{\epsilon}_{none})$$
#
# From here on we use a wider network, trained for longer.

# %%
wide, longer, B = config, pick(600, 6), pick(200, 10)
model = restored(cached("dit_wide_ddpm", lambda: train(wide, longer)), wide)
digits, noise = torch.arange(B) % 10, pipeline.noise(B, 0, (8, 8))
show("drop_labels")


# %%
def drop_labels(y, keep, null):
    raise NotImplementedError("your code here")


solved = check("drop_labels", drop_labels)

# %%
if solved:
    y = drop_labels(digits[:10], digits[:10] < 5, config.null)
    z = train_dit.sample_dit(model, "ddpm", noise[:10], y, pick(20, 2), 1.0)
    images({"0, 1, 2, 3, 4, then nothing": pipeline.decode(z)}, "Told by your drop_labels.")
else:
    print("Solve `drop_labels`, and this cell draws ten digits, of which five are told a class.")

# %% [markdown]
# ## Backwards
#
# If $x_0$ were known, then $z_{n-1}$, given $z_n$, would be a Gaussian. Its mean $\mu_n$ and its
# variance $\tilde{\beta}_n$ are, with the share of noise $r_n = 1 - \bar{\alpha}_n$,
#
# $$\mu_n = (\sqrt{\bar{\alpha}_{n-1}} \beta_n x_0 + \sqrt{1 - \beta_n} r_{n-1} z_n) / r_n$$
#
# $$\tilde{\beta}_n = \beta_n r_{n-1} / r_n$$
#
# (arXiv 2006.11239, eq. 7). In place of $x_0$ we put the network's estimate; add noise, and go on.
# This is **ancestral sampling**. To sample in fewer than 1000 steps, keep some of them as if there
# were no others.


# %%
@torch.no_grad()
def backwards(count, mean_of, log_variance_of):
    schedule = ddpm.linear_schedule().respaced(ddpm.spaced_steps(count))
    z, g = noise, rng("fresh")
    for n in reversed(range(count)):
        predicted, s = ddpm.split_answer(model(z, schedule.times[n], digits), 4)
        estimate, here = schedule.noise_to_x0(predicted, z, n), torch.full((B,), n)
        mean = mean_of(estimate, z, schedule.alpha_bar, here).float()
        spread = (log_variance_of(s, schedule.alpha_bar, here) / 2).exp().float()
        z = mean + (n > 0) * spread * torch.randn(z.shape, generator=g)
    return pipeline.decode(z)


# %%
mean_of = lambda x0, z, left, n: ddpm.NoiseSchedule(n, left).posterior_mean(x0, z, n)  # noqa: E731
learned = lambda s, left, n: ddpm.NoiseSchedule(n, left).log_variance(s, n)  # noqa: E731
few = pick(10, 3)
kept = ddpm.linear_schedule().respaced(ddpm.spaced_steps(few))
ours = backwards(few, mean_of, learned)
with torch.no_grad():
    z = ddpm.ancestral(lambda z, t: model(z, t, digits), noise, kept, rng("fresh"))
assert abs(ours.astype(int) - pipeline.decode(z)).max() <= 1
show("posterior_mean")


# %%
def posterior_mean(x0, z, alpha_bar, n):
    raise NotImplementedError("your code here")


solved = check("posterior_mean", posterior_mean)

# %%
if solved:
    rows = {f"{n} steps": backwards(n, posterior_mean, learned)[:10] for n in pick((5, 25), (2, 3))}
    images(rows, "Ancestral sampling with your posterior_mean.")
else:
    print("Solve `posterior_mean`, and this cell draws digits with it.")

# %% [markdown]
# ## The learned variance
#
# $\tilde{\beta}_n$ is right if $x_0$ is known, and $\beta_n$ if nothing is known but that $x_0$ is
# Gaussian. The truth lies between, so DiT's networks learn where (Nichol and Dhariwal, arXiv
# 2102.09672, eq. 15): a second set of output channels $s$, between about -1 and 1, says
#
# $$\log \sigma_n^2 = f \log \beta_n + (1 - f) \log \tilde{\beta}_n, \qquad f = \frac{s + 1}{2}$$
#
# **PREDICT.** With 1000 steps, and with 10: how far apart are the two ends, and where? Drawn in 10
# steps, with which of the variances $\beta$, $\tilde{\beta}$ and the learned one are the digits
# nearest to real ones?

# %%
guess("...")

# %%
curves = {}
for count in (1000, 50, 10):
    some = ddpm.linear_schedule().respaced(ddpm.spaced_steps(count))
    ratio = (some.posterior_variance / some.betas).sqrt()[1:]
    curves[f"{count} steps"] = (some.steps[1:], ratio)
lines(curves, "step (of 1000)", "deviation of beta~ / of beta", "The two ends.")


# %%
def score(drawn):
    """Share that is read as asked, and Frechet distance to real digits."""
    size, seen = pipeline.config.image_size, lesson.classifier.features
    with torch.no_grad():
        real, ours = (seen(to_model(torch.as_tensor(x), size)) for x in (test, drawn))
    right = [a == b for a, b in zip(lesson.classify(drawn), digits.tolist(), strict=True)]
    return f"read as asked {sum(right) / B:4.0%}, distance {frechet_distance(ours, real):3.0f}"


test, ends = lesson.images.test_images[:2000], {"beta": 1.0, "beta~": -1.0}
rows = {"learned": ours} | {name: backwards(few, mean_of, lambda s, left, n, end=end: learned(
    torch.full_like(s, end), left, n)) for name, end in ends.items()}  # fmt: skip
images({name: x[:10] for name, x in rows.items()}, "Ten steps, the same noise.")
for name, x in rows.items():
    print(f"{name:8} {score(x)}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# With 1000 steps the two ends agree except in the first few: it hardly matters which one you take.
# With 10 steps they differ over half of the way, most near the data, where $\beta$ adds noise that
# nothing removes again. The learned variance needs no choice, but here its digits are the farthest
# from real ones, and those of $\tilde{\beta}$ the nearest. (The scores come from one seed and 200
# digits: a tenth more or less means nothing.)
#
# </details>

# %%
show("log_variance")


# %%
def log_variance(s, alpha_bar, n):
    raise NotImplementedError("your code here")


solved = check("log_variance", log_variance)

# %%
if solved:
    yours = backwards(few, mean_of, log_variance)
    images({"learned, by yours": yours[:10]}, "Ten steps, the same noise, your log_variance.")
    print(score(yours))
else:
    print("Solve `log_variance`, and this cell draws ten digits with it.")

# %% [markdown]
# ## The flow instead
#
# Now the same network, without the second set of channels, learns the velocity of rectified flow:
# from the same images and noise, at the same levels of noise (step $n$ is the time $t$ at which
# $z_t$ holds image and noise in the same proportion), for as many steps.
#
# **PREDICT.** Both are sampled without guidance, with 5, 10 and 50 evaluations: DDPM with its
# deterministic sampler, DDIM (arXiv 2010.02502), the flow with Euler. Which is nearer to real
# digits, and do more evaluations help?

# %%
guess("...")

# %%
plain = replace(wide, learned_variance=False)
flow = restored(cached("dit_wide_flow", lambda: train(plain, longer, "flow")), plain)
rows, networks = {}, {"ddpm": model, "flow": flow}
for count in pick((5, 10, 50), (2, 3)):
    for name, network in networks.items():
        z = train_dit.sample_dit(network, name, noise, digits, count, 1.0)
        rows[f"{name}, {count} evaluations"] = pipeline.decode(z)
images({name: x[:10] for name, x in rows.items()}, "The same noise and labels.")
for name, x in rows.items():
    print(f"{name:20} {score(x)}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The flow is nearer with five evaluations than DDPM with fifty. (More evaluations make neither
# better here: fewer digits are read as asked.) At the same level of noise a velocity is noise in
# disguise: both say where the image is, and DDIM's steps are Euler's steps on the flow's straight
# lines (`nanosd3/related/ddpm.py`). What differs is the weight of the levels. Near $t = 1$ an error
# in the noise means an error in the image many times as large, and the loss does not see it; an
# error in the velocity means one of about the same size. The first steps of sampling are there.
#
# </details>
#
# **Open questions.** Does in-context conditioning get better with more than two tokens? Train
# `adaln_gates` and `adaln_zero` with four times the depth: does the difference grow? Guide only
# three of the four channels, as DiT's released code does: what do you see?
#
# ## What was left out
#
# Text: MMDiT's second stream (notebook 04). The published weights, which
# `nanosd3/related/published_dit.py` opens. The bound that trains the variance (`variance_bound` in
# `nanosd3/related/ddpm.py`), and FID over model size, the paper's main figure; small versions are
# in [the claims](../nanosd3/claims/README.md#x-dit-1). The paper of SD3, arXiv 2403.03206, compares
# its MMDiT with a DiT that reads text in section 5.2.2.
