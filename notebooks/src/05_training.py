# %% [markdown]
# # 05 · Training: the real loop, cell by cell
#
# **What does it take to train Stable Diffusion 3?** Images with captions, an autoencoder, three
# text encoders, and then one loop of thirty lines. This notebook is `train_mnist.py`, taken apart:
# the same functions on the same data, with fewer steps. Its hand-written loop gives the same losses
# as the package's, bit for bit, and leaves some parts to you.

# %%
import copy
import math
from dataclasses import replace

import torch
from films import film
from lab import CACHE, begin_job, finish, images, lines, maps, panels, pick, trained

from nanosd3.data import buckets
from nanosd3.data.mnist import to_uint8
from nanosd3.exercises import check, guess, show
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.mmdit import MMDiT
from nanosd3.random_streams import rng
from nanosd3.storage.run import Run
from nanosd3.text import drop_encoders
from nanosd3.training import optimizer as tuning
from nanosd3.training.ema import make_ema, update_ema
from nanosd3.training.loop import StepRNG, fit

# %% [markdown]
# ## 1. Data: images, and captions that describe them
#
# MNIST has labels, not captions, so the captions are generated: "a 3", "the digit three". Half of
# them say more, such as "a bold 3 leaning left", because stroke weight and slant can be *measured*
# from the moments of the image. With the same measurement we can later check whether the model
# follows the prompt.

# %%
job = begin_job()
source = job.source
first = torch.arange(8)
index = source.captions(first, torch.rand(8, generator=torch.Generator().manual_seed(3)))
images({"images": source.images.train_images[first]}, "The first eight training images.")
print(*(source.texts[i] for i in index), sep="\n")

# %% [markdown]
# **PREDICT.** Each image has many captions that fit it. Why draw a new one at every step, instead
# of fixing one per image?

# %%
guess("...")

# %% [markdown]
# <details><summary>One answer</summary>
#
# The model should understand every way to say it. With one caption per image it could memorise
# images by their captions.
#
# </details>
#
# The digits all have one size. Photographs do not, but a batch is one tensor.
# `python -m nanosd3.train --data FOLDER`, which trains the same stages on your own pictures,
# assigns each picture to the nearest of a few sizes, a **bucket**, and draws each batch from one
# bucket. A bucket of height $H$ and width $W$ has about the area of the square of side $S$ (paper,
# arXiv 2403.03206, section 5.3.2),
#
# $$H W \approx S^2$$
#
# so that all batches have about the same number of tokens.
#
# **PREDICT.** If a 3:2 photograph is cropped to its central square, how much of it is lost? And if
# it is cropped to the nearest size of about 1024 x 1024 pixels whose sides are multiples of 64?

# %%
guess("...")

# %%
sizes = buckets.bucket_sizes(1024, 64, 2048)
print(", ".join(f"{h}x{w}" for h, w in sizes))
tokens = [h * w // 16**2 for h, w in sizes]
assert 0.97 * 64**2 < min(tokens) and max(tokens) < 1.03 * 64**2
shapes = torch.logspace(-1, 1, 201, base=2)  # height / width, from 1:2 to 2:1
heights = (1e6 * shapes).int().tolist()  # of photographs that are a million pixels wide
square = [buckets.cropped_share((1, 1), h, 10**6) for h in heights]
bucketed = [buckets.cropped_share(buckets.nearest(sizes, h, 10**6), h, 10**6) for h in heights]
curves = {"the central square": (shapes, square), "the nearest size": (shapes, bucketed)}
ticks = [0.5, 0.67, 1, 1.5, 2]
lines(curves, "height / width", "share cropped", "Shapes from 1:2 to 2:1.", "x", ticks)

# %% [markdown]
# <details><summary>What happened</summary>
#
# A 3:2 photograph has height / width 2/3, or 3/2 if it is upright. The square loses a third of it,
# the nearest size a fortieth.
#
# </details>
#
# ### Exercises: buckets

# %%
show("bucket_sizes")


# %%
def bucket_sizes(side, multiple, most, ratio):
    raise NotImplementedError("your code here")


solved = check("bucket_sizes", bucket_sizes)

# %%
if solved:
    figure, (axis,) = panels(1, 3.4, 3.4)
    for h, w in bucket_sizes(512, 64, 1024, 2.0):
        axis.plot([0, w, w], [h, h, 0], color="0", linestyle="-", linewidth=0.7)
    axis.set(xlabel="width", ylabel="height", aspect="equal")
    finish(figure, "Top and right edges of your sizes for 512 x 512, in multiples of 64.")
else:
    print("Solve `bucket_sizes`, and this cell draws the sizes.")

# %%
show("nearest_bucket")


# %%
def nearest_bucket(sizes, height, width):
    raise NotImplementedError("your code here")


solved = check("nearest_bucket", nearest_bucket)

# %%
if solved:
    mine = [buckets.cropped_share(nearest_bucket(sizes, h, 10**6), h, 10**6) for h in heights]
    lines({"mine": (shapes, mine)}, "height / width", "share cropped", "By you.", "x", ticks)
else:
    print("Solve `nearest_bucket`, and this cell draws how much your choice crops.")

# %% [markdown]
# ## 2. Autoencoder and text encoders
#
# Both are trained first and then frozen; notebooks 07 and 08 are about them. `trained()` runs all
# stages of the job, or loads them from the cache.

# %%
lesson = trained()
pipeline, features = lesson.pipeline, lesson.features
test = torch.arange(source.trained, source.trained + 8)  # the first held-out images
pixels = source.pixels(test)
with torch.no_grad():
    decoded = pipeline.vae.decode(pipeline.posterior(pixels)[0])
rows = {"test images": to_uint8(pixels), "reconstructed": to_uint8(decoded)}
images(rows, "1024 pixels, 256 latents, and back.")

# %% [markdown]
# What is frozen need not be recomputed. All latents (mean and deviation) and the features of all
# captions are computed **once** and stored on disk; each step only looks them up. With the real
# model this matters more: 5.7 of its 7.7 billion parameters belong to the encoders, and none of
# those need be in memory during training.

# %%
latents = features.latents(first)
torch.testing.assert_close(latents, pipeline.posterior(source.pixels(first)), atol=2e-3, rtol=2e-3)
context, pooled = features.text(index)
print("of", len(first), "images: latents", tuple(latents[0].shape), "context", tuple(context.shape))

# %% [markdown]
# ## 3. One step
#
# Draw images with captions $c$, their latents $x_0$, times $t$ and noise $\epsilon$; move to the
# point on the line, $z_t = (1 - t) x_0 + t \epsilon$; compare the predicted velocity $v_\theta$
# (the network's weights are $\theta$) with the one along the line:
#
# $$L(\theta) = E | v_\theta(z_t, t, c) - (\epsilon - x_0) |^2$$
#
# All random numbers come from generators that are seeded by the step: step 17 draws the same
# numbers today and tomorrow, whatever happened before it. That is why an interrupted run can be
# resumed exactly. The package calls the random numbers of a step a `StepRNG`. Its `generator()` is
# for draws that all processes share; each row of its `noise` has its own generator, so that
# processes which share a batch only need to draw their own rows.


# %%
def batch(step_rng):
    g, size = step_rng.generator(), len(step_rng.rows)  # all rows: there is one process
    i = source.draw(size, g)
    caption = source.captions(i, torch.rand(size, generator=g))
    keep = torch.rand(size, 3, generator=g) >= training.encoder_dropout
    t = logit_normal(stratified(size, g), training.time_mean, training.time_std)
    mean, std = features.latents(i)
    noise, posterior = step_rng.noise((2, *mean.shape[1:])).unbind(1)
    x0 = features.normalise(mean + std * posterior)
    return x0, noise, t, drop_encoders(*features.text(caption), keep, job.config.text)


training = job.config.training
x0, noise, t, conditioning = batch(StepRNG((0, "flow", 0), range(6)))
two_rows = StepRNG((0, "flow", 0), range(2, 4))
assert torch.equal(two_rows.noise((2, *x0.shape[1:]))[:, 0], noise[2:4]), "the same numbers"
print("x0", tuple(x0.shape), "at t =", ", ".join(f"{x:.2f}" for x in t))

# %% [markdown]
# `encoder_dropout` drops each text encoder independently with probability 0.464, so that about a
# tenth of all samples have no text at all: $0.464^3 = 0.0999$. Guidance will need that.
#
# The loss in plain loops, and the package's:


# %%
def loss_slowly(velocity, x0, noise):
    total = 0.0
    for v, a, b in zip(velocity.flatten(), x0.flatten(), noise.flatten(), strict=True):
        total += (v - (b - a)) ** 2  # the velocity from data to noise
    return total / velocity.numel()


torch.manual_seed(0)
model = MMDiT(job.config.mmdit)
velocity = model(interpolate(x0, noise, t), t, *conditioning)
loss = flow_loss(velocity, x0, noise).mean()
torch.testing.assert_close(loss, loss_slowly(velocity, x0, noise))
assert float(velocity.detach().abs().max()) == 0

# %% [markdown]
# **PREDICT.** A fresh MMDiT predicts exactly 0 (its gates and last layer are zero). Latents have
# mean 0 and deviation 1, and so does the noise. What is the loss before any training?

# %%
guess("...")

# %%
print(f"loss of a fresh model, for the six images: {loss.item():.3f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# It is the mean of $(\epsilon - x_0)^2$, which is 1 + 1 = 2 on average. Six images are few, so this
# batch is off by a little.
#
# </details>
#
# ## 4. The loop
#
# Around the step there is what every training loop has: AdamW, a warm-up and a cosine schedule for
# the learning rate, gradient clipping, and an **exponential moving average of the weights** (EMA),
# $\bar\theta$, which is what we sample from. After step $k$, counted from 0, it moves towards the
# weights:
#
# $$\bar\theta \leftarrow d \bar\theta + (1 - d) \theta$$
#
# with $d = \min(0.999, (1 + k) / (10 + k))$.
#
# The package's loop also has the log, a progress bar, checkpoints, a clean stop at Ctrl-C, skipping
# of steps whose loss is not finite, and data parallelism. And it trains most matrices of the digit
# model with Muon instead of AdamW, in half the steps (`nanosd3/training/muon.py`).


# %%
def train_by_hand(model, recipe, watch=lambda step, ema: None):
    ema, losses = make_ema(model), []
    # Matrices decay, biases and norms do not.
    groups = tuning.decay_groups(model.parameters(), recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate(step, recipe)
        x0, noise, t, conditioning = batch(StepRNG((0, "flow", step), range(recipe.batch)))
        loss = flow_loss(model(interpolate(x0, noise, t), t, *conditioning), x0, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, step, training.ema_decay)
        losses.append(loss.item())
        watch(step, ema)
    return ema, losses


# %% [markdown]
# Is that all? We give the package's `fit` the same fresh model, the same batches and eight steps.
# It asks for the loss of each row, and for further numbers to log (none here).


# %%
def loss_of(step_rng):
    x0, noise, t, conditioning = batch(step_rng)
    return flow_loss(model(interpolate(x0, noise, t), t, *conditioning), x0, noise), {}


short = replace(training.flow, steps=8, warmup=4, batch=16, optimizer="adamw")
_, by_hand = train_by_hand(copy.deepcopy(model), short)
run = Run.open(CACHE / "eight-steps", {"config": {"name": "eight"}}, fresh=True)
fit(run, "flow", model, loss_of, short, seed=0, ema=make_ema(model), ema_decay=0.999)
logged = [entry["loss"] for entry in run.read_log("flow")]
assert logged == by_hand, "the same losses, bit for bit"
print("the losses of both:", ", ".join(f"{x:.3f}" for x in logged))

# %% [markdown]
# ### Exercises: two parts of the loop
#
# The learning rate, and a batch that does not fit into memory: the gradient of a mean over samples
# can be accumulated piece by piece.

# %%
show("learning_rate")


# %%
def learning_rate(step, steps, warmup, lr):
    raise NotImplementedError("your code here")


solved = check("learning_rate", learning_rate)

# %%
if solved:
    rates = {f"warm-up {w}": (range(600), [learning_rate(k, 600, w, 1e-3) for k in range(600)])
             for w in (10, 50, 200)}  # fmt: skip
    lines(rates, "step", "learning rate", "Your schedule, for three lengths of the warm-up.")
else:
    print("Solve `learning_rate`, and this cell draws the schedule.")

# %%
show("accumulate_gradient")


# %%
def accumulate_gradient(weight, x0, noise, t, size):
    raise NotImplementedError("your code here")


solved = check("accumulate_gradient", accumulate_gradient)

# %%
if solved:
    g = torch.Generator().manual_seed(0)
    some = [torch.randn(20, 12, generator=g) for _ in range(2)] + [torch.rand(20, generator=g)]
    tables = {f"{n} at once": accumulate_gradient(torch.eye(12), *some, n) for n in (20, 7, 1)}
    maps(tables, "output", "input", "Your gradient of the same 20 samples.", "gradient")
else:
    print("Solve `accumulate_gradient`, and this cell draws the gradient for three sizes.")

# %% [markdown]
# ## 5. Watch it learn
#
# A new model, a few hundred steps, and a look at what its averaged weights would draw along the
# way.
#
# **PREDICT.** What comes first: samples that look like strokes, samples that look like digits, or
# samples that are the requested digit? And how will the loss fall meanwhile?

# %%
guess("...")

# %%
torch.manual_seed(1)
learner = MMDiT(job.config.mmdit)
recipe = replace(training.flow, steps=pick(600, 6), warmup=pick(50, 2))
watched = pick((1, *range(10, 91, 10), *range(120, 241, 30), *range(300, 601, 60)), (2, 3, 6))
prompts = [f"the digit {i}" for i in range(10)]
drawn = {}


def draw(step, ema):
    if step + 1 in watched:
        drawn[f"step {step + 1}"] = lesson.pipeline_with(ema)(prompts, seed=2)


average, losses = train_by_hand(learner, recipe, draw)
some = {f"step {n}": drawn[f"step {n}"] for n in pick((20, 90, 150, 300, 600), (2, 6))}
images(some | {"the trained model": pipeline(prompts, seed=2)}, "The digits 0 to 9, sampled from "
       "the averaged weights at several steps.")  # fmt: skip

# %% [markdown]
# The same as a film, always from the same noise. Look for the moment at which a smear splits into
# strokes, for digits that are first read as other ones, and for what changes after step 300.

# %%
moments = zip(*drawn.values(), strict=True)  # of each digit
film(dict(zip("0123456789", moments, strict=True)), [*drawn], "A new model learns to draw.")
window = max(1, len(losses) // 30)
smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
lines(
    {"training loss": (torch.arange(window, len(losses) + 1), smooth)},
    "step", "velocity loss (per latent)",
    f"Mean of {window} steps.",
)  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# Strokes come first, then digits, and only then the requested ones. The loss starts at 2. It falls
# fast while the model learns what all digits have in common, and hardly moves while it learns to
# tell them apart. **When the loss has flattened out, the model may still be improving.**
#
# </details>
#
# ## 6. The whole run
#
# The loss of a batch depends on the times that were drawn for it. So five times in a run the
# package evaluates **held-out** images, which are never trained on, at eight equally spaced times
# and always with the same captions and noise. The log keeps these losses: `validation` for the
# weights themselves, `validation_ema` for their average. (They are lower than in training, since
# here the latents are the encoder's means, without its own noise, which no network can predict.)
#
# **PREDICT.** At which $t$ is the loss largest, at which smallest? And at which $t$ does it fall
# most in the course of training?

# %%
guess("...")

# %%
log = [entry["validation_ema"] for entry in job.run.read_log() if "validation_ema" in entry]
ts = (torch.arange(8) + 0.5) / 8
index = torch.arange(source.trained, source.count)  # the held-out images
x0 = features.normalise(features.latents(index)[0])
noise = torch.stack([torch.randn(x0.shape[1:], generator=rng("validation", int(i))) for i in index])
text = features.text(source.captions(index, torch.zeros(len(index))))
with torch.no_grad():
    by_hand = [flow_loss(pipeline.mmdit(interpolate(x0, noise, t), t, *text), x0, noise).mean()
               for t in ts]  # fmt: skip
torch.testing.assert_close(torch.stack(by_hand), torch.tensor(log[-1]), atol=1e-3, rtol=0)
curves = {"after a fifth of the run": (ts, log[0]), "at the end": (ts, log[-1])}
lines(curves, "t (0 data, 1 noise)", "velocity loss (per latent)", "Held-out images.")
maps({"held-out loss": torch.tensor(log).T}, "evaluation", "t (0 data, 1 noise)",
     "The same, for all evaluations.", "loss", yticks=[f"{t:.2f}" for t in ts])  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# Largest near $t = 0$, where so small a model cannot tell noise from data, and smallest in the
# middle. Near $t = 1$ it can only predict the average digit, and learns that first: after a fifth
# of the run the loss hardly falls there. It falls most around $t = 0.3$.
#
# </details>
#
# ## 7. Is it any good?
#
# A classifier reads the samples: is each the requested digit? On its own that rewards blur, so
# `train_mnist.py` also measures how far the features of the samples are from those of real images
# (the Frechet distance) and whether "thin" and "leaning left" were followed.

# %%
many = [f"the digit {i % 10}" for i in range(pick(500, 20))]
for name, network in (("after 600 steps", average), ("the trained model", pipeline.mmdit)):
    drawn = lesson.pipeline_with(network)(many, seed=9)
    share = lesson.right(drawn, [i % 10 for i in range(len(many))])
    print(f"{name:17} {share:.1%} are read as the requested digit")

# %% [markdown]
# Why does the decay $d$ of the average *increase* during training? With a fixed decay of 0.999,
# after 600 steps half of the average would still be the random initial weights, since
# $0.999^{600} = 0.55$.


# %%
def decay_product(steps, decay):
    return math.prod(min(decay, (1 + s) / (10 + s)) for s in range(steps))


steps = torch.logspace(0, 4, 60)
curves = {
    "0.999 from the start": (steps, 0.999**steps),
    "with warm-up": (steps, [decay_product(int(s), 0.999) for s in steps]),
}
lines(curves, "steps", "share of the initial weights",
      "How much of the random initial weights is left in the average.", log="x")  # fmt: skip

# %%
show("ema_update")


# %%
def ema_update(average, weights, step, decay):
    raise NotImplementedError("your code here")


solved = check("ema_update", ema_update)

# %%
if solved:
    steps, mine = range(len(losses)), [torch.tensor(losses[0])]
    for step in steps:
        mine.append(ema_update(mine[-1], torch.tensor(losses[step]), step, 0.95))
    curves = {"the losses": (steps, losses), "your average": (steps, mine[1:])}
    lines(curves, "step", "velocity loss (per latent)", "Losses this time, not weights.")
else:
    print("Solve `ema_update`, and this cell smooths the loss of your training with it.")

# %% [markdown]
# **Open questions.** Train with `encoder_dropout = 0` and sample with guidance: what goes wrong?
# (Notebook 10 shows it.) Fix one caption per image: does the loss fall further, and are the samples
# better? `python train_mnist.py` in a terminal is this notebook with more steps.
#
# ## What was left out
#
# Many GPUs and half precision (both in `nanosd3/machine/distributed.py`); a data set of a billion
# images, filtered, with half of the captions written by a model (paper, arXiv 2403.03206, section
# 5.2, appendix B); a second training at high resolution with shifted times (section 5.3.2); and
# fine-tuning to human preferences (appendix C).
