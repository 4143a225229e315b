# %% [markdown]
# # 05 · Training: cell by cell the real loop
#
# **What does it take to train Stable Diffusion 3?** Images with captions, an autoencoder, three
# text encoders, and then one loop of thirty lines. This notebook is `train_mnist.py`, taken apart:
# the same functions on the same data, with fewer steps. You will write the loop yourself and see
# that it gives the same losses as the package's, bit for bit.

# %%
import copy
import math
from dataclasses import replace

import torch
from lab import CACHE, begin_job, images, lines, maps, pick, trained

from nanosd3.buckets import bucket_sizes, nearest
from nanosd3.checkpoint import Run
from nanosd3.data import to_uint8
from nanosd3.exercises import check, show
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.loop import Draw, decay_groups, fit, learning_rate, make_ema, update_ema
from nanosd3.mmdit import MMDiT
from nanosd3.runtime import rng
from nanosd3.text import drop_encoders

# %% [markdown]
# ## 1. Data: images, and captions that say what is in them
#
# MNIST has labels, not captions. So captions are made: "a 3", "the digit three", and half of
# them say more, "a bold 3 leaning left", because weight and slant can be *measured* in the image,
# from its moments. Whether the model obeys can later be measured with the same ruler.

# %%
job = begin_job()
source = job.source
first = torch.arange(8)
index = source.captions(first, torch.rand(8, generator=torch.Generator().manual_seed(3)))
images({"images": source.images.train_images[first]}, "The first eight images to train on.")
print(*(source.texts[i] for i in index), sep="\n")

# %% [markdown]
# **PREDICT.** Each image has many captions that fit it. Why is a new one drawn at every step,
# instead of one for good?
#
# (Because the model should understand all ways to say it; with one caption an image it could
# learn images by heart from their captions.)
#
# Digits are all of one size. Photographs are not, and a batch is one tensor. `python -m
# nanosd3.train --data FOLDER`, which trains the same stages on pictures of your own, sends each to
# the nearest of a few sizes of *about equal area*, a **bucket**, and draws each batch from one of
# them. So all batches have about as many tokens.
#
# **PREDICT.** A photograph of 3:2, cut to its middle square: how much of it is lost? And cut to the
# nearest of the sizes below?

# %%
sizes = bucket_sizes(1024, 64, 2048)
print(", ".join(f"{h}x{w}" for h, w in sizes))
tokens = [h * w // 16**2 for h, w in sizes]
assert 0.97 * 64**2 < min(tokens) and max(tokens) < 1.03 * 64**2
shapes = torch.logspace(-1, 1, 201, base=2)  # height / width, from 1:2 to 2:1


def lost(height, width, shape):  # of an image of this shape, scaled and cut to a size
    factor = float(shape) * width / height
    return 1 - min(factor, 1 / factor)


bucketed = [lost(*nearest(sizes, int(1e6 * shape), 10**6), shape) for shape in shapes]
curves = {"the middle square": (shapes, [lost(1, 1, shape) for shape in shapes]),
          "the nearest of nine sizes": (shapes, bucketed)}  # fmt: skip
caption = "Of a photograph of 3:2 the square loses a third, the nearest size a fortieth."
lines(curves, "height / width", "share cut off", caption, "x")

# %% [markdown]
# ## 2. Autoencoder and text encoders
#
# Both are trained first and then frozen; notebooks 07 and 08 are about them. `trained()` runs all
# stages of the job, or finds them in the cache.

# %%
lesson = trained()
pipeline, features = lesson.pipeline, lesson.features
test = torch.arange(source.trained, source.trained + 8)  # behind those that are trained on
pixels = source.pixels(test)
with torch.no_grad():
    back = pipeline.vae.decode(pipeline.posterior(pixels)[0])
rows = {"test images": to_uint8(pixels), "through the latents": to_uint8(back)}
images(rows, "1024 pixels, 256 latents, and back.")

# %% [markdown]
# What is frozen need not be computed again and again. All latents (mean and deviation) and the
# features of all captions are computed **once** and kept on disk; each step then only looks them
# up. With the real model this saves most of the time and nearly all of the memory: the encoders
# are 5 of its 7 billion parameters.

# %%
latents = features.latents(first)
torch.testing.assert_close(latents, pipeline.posterior(source.pixels(first)), atol=2e-3, rtol=2e-3)
context, pooled = features.text(index)
print("of", len(first), "images: latents", tuple(latents[0].shape), "context", tuple(context.shape))

# %% [markdown]
# ## 3. One step
#
# Draw images, captions, times and noise; go to the place on the line; compare the velocity.
# Generators that are named after the step make all draws: step 17 draws the same today and
# tomorrow, whatever happened before it. This is why an interrupted run can go on exactly. The
# package calls a step's random numbers a `Draw`. Its `generator()` is for what everyone draws
# alike; of its `noise` each row has a generator of its own, so that of several processes, which
# share a batch, each need draw only its own rows.


# %%
def batch(draw):
    g, size = draw.generator(), len(draw.rows)  # all rows: we are alone
    i = source.draw(size, g)
    caption = source.captions(i, torch.rand(size, generator=g))
    keep = torch.rand(size, 3, generator=g) >= training.encoder_dropout
    t = logit_normal(stratified(size, g), training.time_mean, training.time_std)
    mean, std = features.latents(i)
    noise, posterior = draw.noise((2, *mean.shape[1:])).unbind(1)
    x0 = features.normalise(mean + std * posterior)
    return x0, noise, t, drop_encoders(*features.text(caption), keep, job.config.text)


training = job.config.training
x0, noise, t, conditioning = batch(Draw((0, "flow", 0), range(6)))
two = Draw((0, "flow", 0), range(2, 4))
assert torch.equal(two.noise((2, *x0.shape[1:]))[:, 0], noise[2:4]), "a share of the same numbers"
print("x0", tuple(x0.shape), "t", [round(x, 2) for x in t.tolist()])

# %% [markdown]
# `encoder_dropout` silences each text encoder on its own with probability 0.464, so that about a
# tenth of all samples has no text at all: 0.464 to the power of 3. Guidance will need that.
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

# %% [markdown]
# **PREDICT.** A fresh MMDiT answers exactly 0 (its gates and last layer are zero). Latents have
# mean 0 and deviation 1, noise too. What is the loss, before any training?

# %%
print(f"loss of a fresh model: {loss.item():.3f}")
print(f"1 + mean of x0^2, on average over the noise: {1 + float(x0.square().mean()):.3f}")
assert float(velocity.detach().abs().max()) == 0

# %% [markdown]
# ## 4. The loop
#
# Around the step stands what every training has: AdamW, a warm-up and a cosine for the learning
# rate, a limit for the gradient's norm, and an **average of the weights** (EMA), which is what we
# sample from. What the package's loop has besides: the log, a progress bar, saving, stopping at
# Ctrl-C, leaving out a step whose loss is not finite, and sharing a batch among processes.


# %%
def train_by_hand(model, recipe, watch=lambda step, ema: None):
    ema, losses = make_ema(model), []
    groups = decay_groups(model, recipe.weight_decay)  # matrices decay, biases and norms do not
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        x0, noise, t, conditioning = batch(Draw((0, "flow", step), range(recipe.batch)))
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
# Is that all? The package's `fit` gets the same fresh model, the same batches and eight steps. It
# asks for the loss of each row, and for numbers that the log should keep besides (here none).


# %%
def loss_of(draw):
    x0, noise, t, conditioning = batch(draw)
    return flow_loss(model(interpolate(x0, noise, t), t, *conditioning), x0, noise), {}


short = replace(training.flow, steps=8, warmup=4, batch=16)
_, by_hand = train_by_hand(copy.deepcopy(model), short)
run = Run.open(CACHE / "eight-steps", {"config": {"name": "eight"}}, fresh=True)
fit(run, "flow", model, loss_of, short, seed=0, ema=make_ema(model), ema_decay=0.999)
logged = [entry["loss"] for entry in run.read_log("flow")]
assert logged == by_hand, "the same losses, bit for bit"
print([round(x, 4) for x in logged])

# %% [markdown]
# ## 5. Watch it learn
#
# A new model, some hundred steps, and a look at what its average would draw along the way.
#
# **PREDICT.** Which comes first: that the samples look like strokes, that they look like digits,
# or that they are the digit asked for?

# %%
torch.manual_seed(1)
learner = MMDiT(job.config.mmdit)
recipe = replace(training.flow, steps=pick(600, 6), warmup=pick(50, 2))
moments = pick((24, 74, 149, 299, 599), (2, 5))
asked = [f"the digit {i}" for i in range(10)]
rows = {}


def look(step, ema):
    if step in moments:
        rows[f"step {step + 1}"] = lesson.drawing_with(ema)(asked, seed=2)


average, losses = train_by_hand(learner, recipe, look)
rows["the lesson's model"] = pipeline(asked, seed=2)
images(rows, "The digits 0 to 9, drawn by the average of the weights at several steps.")

# %%
window = max(1, len(losses) // 30)
smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
lines(
    {"training loss": (torch.arange(window, len(losses) + 1), smooth)},
    "step", "velocity loss (per latent)",
    f"Mean of {window} steps. It starts at 2 and falls fast, then slowly; the digits come late.",
)  # fmt: skip

# %% [markdown]
# The loss falls fast while the model learns what all digits have in common, and hardly moves
# while it learns to tell them apart. **A loss that has "stopped" is not a model that has stopped.**
#
# ## 6. The whole run
#
# The loss of a batch depends on the times that were drawn for it. So the package looks ten times
# in a run at images that are **held out**, never trained on, at eight equally spaced times, always
# with the same captions and noise. The log keeps these losses: `validation` of the weights
# themselves, `validation_ema` of their average. (They are lower than in training, since latents
# here are the encoder's means, without its own noise, which no network can know.)
#
# **PREDICT.** At which t is the loss largest, at which smallest?

# %%
log = [entry["validation_ema"] for entry in job.run.read_log() if "validation_ema" in entry]
ts = (torch.arange(8) + 0.5) / 8
held = torch.arange(source.trained, source.count)
x0 = features.normalise(features.latents(held)[0])
noise = torch.stack([torch.randn(x0.shape[1:], generator=rng("validation", int(i))) for i in held])
text = features.text(source.captions(held, torch.zeros(len(held))))
with torch.no_grad():
    by_hand = [flow_loss(pipeline.mmdit(interpolate(x0, noise, t), t, *text), x0, noise).mean()
               for t in ts]  # fmt: skip
torch.testing.assert_close(torch.stack(by_hand), torch.tensor(log[-1]), atol=1e-3, rtol=0)
curves = {"a tenth of the run": (ts, log[0]), "all of it": (ts, log[-1])}
lines(curves, "t (0 data, 1 noise)", "velocity loss (per latent)",
      "Near t = 0 noise and data cannot be told apart by so small a model; near t = 1 only the "
      "average digit can be guessed; between them training helps most.")  # fmt: skip
maps({"held-out loss": torch.tensor(log).T}, "tenth of training", "eighth of t (0 data, 7 noise)",
     "Dark is a large loss. It falls everywhere, first near noise.", "loss")  # fmt: skip

# %% [markdown]
# ## 7. Is it any good?
#
# A judge network reads the samples: is it the digit asked for? On its own that rewards blur, so
# `train_mnist.py` also measures how far the samples' features are from real images' (the Frechet
# distance) and whether "thin" and "leaning left" were obeyed.

# %%
many = [f"the digit {i % 10}" for i in range(pick(500, 20))]
share = {}
for name, network in (("600 steps", average), ("lesson", pipeline.mmdit)):
    read = lesson.reads(lesson.drawing_with(network)(many, seed=9))
    share[name] = sum(r == i % 10 for i, r in enumerate(read)) / len(many)
print({name: f"{value:.1%}" for name, value in share.items()})

# %% [markdown]
# Why an average with a *growing* memory? With a fixed decay of 0.999 a run of 600 steps would
# still be half made of its random start.


# %%
def decay_product(steps, decay):
    return math.prod(min(decay, (1 + s) / (10 + s)) for s in range(steps))


steps = torch.logspace(0, 4, 60)
curves = {
    "0.999 from the start": (steps, 0.999**steps),
    "with warm-up": (steps, [decay_product(int(s), 0.999) for s in steps]),
}
lines(curves, "steps", "share of the initial weights",
      "What is left of the random start in the average.", log="x")  # fmt: skip

# %% [markdown]
# ## Exercises

# %%
show("learning_rate")


# %%
def learning_rate(step, steps, warmup, lr):
    raise NotImplementedError("your code here")


check("learning_rate", learning_rate)

# %%
show("ema_update")


# %%
def ema_update(average, weights, step, decay):
    raise NotImplementedError("your code here")


check("ema_update", ema_update)

# %%
show("accumulate_gradient")


# %%
def accumulate_gradient(weight, x0, noise, t, size):
    raise NotImplementedError("your code here")


check("accumulate_gradient", accumulate_gradient)

# %%
show("bucket_sizes")


# %%
def bucket_sizes(side, multiple, most, ratio):
    raise NotImplementedError("your code here")


check("bucket_sizes", bucket_sizes)

# %% [markdown]
# **Open ends.** Train with `encoder_dropout = 0` and sample with guidance: what goes wrong?
# (Notebook 10 shows it.) Draw one caption an image for good: does the loss fall further, and are
# the samples better? `python train_mnist.py` in a terminal is this notebook with three times the
# steps.
#
# ## What was left out
#
# Many GPUs and half precision (both are in `nanosd3/parallel.py`); a set of a billion images,
# filtered, with captions half of which a model wrote (paper, arXiv 2403.03206, section 5.2,
# appendix B); a second training at high resolution with a shifted time (section 5.3.2); and
# fine-tuning to people's preferences (appendix C).
