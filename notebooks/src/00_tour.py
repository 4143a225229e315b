# %% [markdown]
# # 00 · A tour: from a sentence to a picture
#
# **How does "a bold 3" become an image?** This notebook trains a small Stable Diffusion 3, asks it
# for digits, and then takes the way from words to pixels apart, step by step, until nothing of it
# is left in the dark. The classes are those of the 2-billion-parameter model; only the numbers
# in the configuration are smaller.
#
# Wherever you read **PREDICT**, stop and write down what you expect before you run the next cell.
# Being wrong is the point: it shows where there is something to learn.

# %%
from itertools import pairwise

import torch
from lab import images, lines, trained

from nanosd3.exercises import check, show
from nanosd3.samplers import euler, guided

# %% [markdown]
# ## The model
#
# The first time this takes about four minutes on two cores: an autoencoder learns to shrink
# digits, two CLIPs and a T5 learn to read captions, and a transformer learns the way from noise
# to digits. (The judge is no part of the model; it reads digits, so that we can count.)
# The result stays in a cache for all notebooks.

# %%
lesson = trained()
pipeline = lesson.pipeline

# %% [markdown]
# **PREDICT.** We ask eight times for "a bold 3". Will the eight pictures be the same? What do you
# think makes them differ, if they do?

# %%
prompts = ["a bold 3", "a thin 3", "a handwritten seven leaning right", "8"]
shown = {prompt: pipeline([prompt] * 8, seed=1) for prompt in prompts}
images(shown, "Eight samples for each prompt. Within a row only the noise differs.")

# %% [markdown]
# Look down a column: the same noise under four prompts. What is kept?
#
# ## Step 1: words to numbers
#
# A network cannot read. Two tokenizers cut the prompt into pieces with numbers: *byte pairs* for
# the CLIPs and *unigram* pieces for T5. Notebook 08 builds both.

# %%
prompt = "a bold 3"
tokenizers = pipeline.text.tokenizers
for tokenizer in (tokenizers.bpe, tokenizers.unigram):
    ids = tokenizer.encode(prompt)
    print(f"{type(tokenizer).__name__:8}", ids, [tokenizer.decode([i]) for i in ids])

# %% [markdown]
# Three encoders turn the pieces into vectors. SD3 uses them twice: as a **context**, a sequence
# of tokens for the transformer to look at, and as one **pooled** vector that says roughly what
# the prompt is about.
#
# **PREDICT.** CLIP reads 9 tokens and T5 reads 8. Their states are put one behind the other. What
# shape has the context of two prompts?

# %%
context, pooled = pipeline.encode_text([prompt, "a thin 3"])
print("context (B, M, Dc):", tuple(context.shape))
print("pooled  (B, Dp):   ", tuple(pooled.shape))
config = pipeline.config
assert context.shape[1] == config.text.clip_l.length + config.text.t5.length

# %% [markdown]
# ## Step 2: noise
#
# The picture starts as noise; not in pixels, but as **latents**: 4 channels of 8 x 8 numbers,
# from which the autoencoder's decoder paints 32 x 32 pixels (and cuts off a border of 2).
#
# **PREDICT.** What does the decoder paint if it is given pure noise?

# %%
noise = pipeline.noise(6, seed=1, size=(8, 8))
print("noise (B, C, h, w):", tuple(noise.shape))
images({"decoded noise": pipeline.decode(noise)}, "Noise, decoded: strokes, but no digit.")

# %% [markdown]
# The decoder knows how strokes look, but where they go is the latents' business. That is what
# the transformer has learned.
#
# ## Step 3: the way from noise to data
#
# Time `t` runs from 1 (noise) to 0 (data). At each place on the way the network answers one
# question: **in which direction, and how fast, is noise from here?** That is the *velocity*.
# We walk against it, from 1 to 0, in small straight steps. In plain Python:

# %%
steps = 20
prompt_text = pipeline.encode_text([prompt] * 6)

z = noise
with torch.no_grad():
    for step in range(steps):
        t, t_next = 1 - step / steps, 1 - (step + 1) / steps
        velocity = pipeline.mmdit(z, torch.tensor(t), *prompt_text)
        z = z + (t_next - t) * velocity
images({"20 steps": pipeline.decode(z)}, "Six latents after twenty steps from noise, decoded.")

# %% [markdown]
# That is a complete sampler. The package's `euler` is the same loop over any list of times, and
# calls back at every step, so that we can watch. The assertion below ties the two together; from
# here on we use the package's.

# %%
path = []


def watch(step, t, z, x0):
    path.append((float(t), z[:1], x0[:1]))


times = torch.linspace(1, 0, steps + 1)
alone = guided(pipeline.mmdit, prompt_text, prompt_text, scale=1.0)
with torch.no_grad():
    ours = euler(alone, noise, times, watch)
torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)

# %% [markdown]
# At every step the velocity also says where the way would end if it were straight: at
# `x0 = z - t v`, the network's present guess of the clean picture.
#
# **PREDICT.** At the very first step there is nothing but noise to see. What does the network
# guess then: a clean digit, an average of all threes, or noise?

# %%
seen = path[::3]
rows = {
    "z, on its way": pipeline.decode(torch.cat([z for _, z, _ in seen])),
    "x0, the guess": pipeline.decode(torch.cat([x0 for _, _, x0 in seen])),
}
images(
    rows,
    "From t = 1 (left) to t = 0.1 (right). The guess begins as a blurred, average 3 and sharpens.",
)

# %%
moved = [float((a[1] - b[1]).norm()) / (a[0] - b[0]) for a, b in pairwise(path)]
lines(
    {"one path": ([t for t, _, _ in path[:-1]], moved)},
    "t (1 noise, 0 data)",
    "speed |v| (latent units per unit of time)",
    "A perfectly straight path would have the same speed everywhere.",
)

# %% [markdown]
# ## Step 4: guidance
#
# The network was sometimes trained without text. So it can say two velocities: one *with* the
# prompt and one *without*. **Guidance** goes from the second through the first and beyond:
# `v = v_without + scale (v_with - v_without)`.
#
# **PREDICT.** What will scale 6 do to the digits? And what is left at scale 0, without any text?

# %%
rows, share = {}, {}
digits = [f"the digit {i % 10}" for i in range(40)]
for scale in (1.0, 1.6, 3.0, 6.0):
    drawn = pipeline(digits, guidance=scale, seed=2)
    rows[f"scale {scale}"] = drawn[:10]
    right = [read == i % 10 for i, read in enumerate(lesson.reads(drawn))]
    share[scale] = sum(right) / len(right)
print("share the judge reads as asked:", share)
images(rows, "The digits 0 to 9 at four guidance scales. More is clearer, then overdone.")

# %%
without = pipeline(["8"] * 8, "", drop=("clip_l", "clip_g", "t5"), seed=3)
images({"no text at all": without}, "Without text the model draws whatever it likes: all digits.")

# %% [markdown]
# ## Step 5: pixels
#
# The decoder expects latents as the encoder made them, not as the flow likes them (mean 0,
# deviation 1). Between the two stand a shift and a scale, measured once after training the
# autoencoder. `pipeline.decode` undoes them.
#
# **PREDICT.** Will you see it if one forgets to?

# %%
latents = pipeline("a bold 3", output="latent", seed=1)
vae = pipeline.vae
with torch.no_grad():
    right, wrong = (vae.decode(x)[0, 0] for x in (vae.denormalise(latents), latents))
images(
    {"as it should be": right[None], "forgotten": wrong[None]},
    f"With and without: latents / {vae.config.scale:.3f} + {vae.config.shift:.3f}.",
    cell=1.5,
)

# %% [markdown]
# Hardly: this autoencoder's latents happen to have a deviation of nearly 1. SD3's have 1 / 1.53,
# and there it is a mistake that makes every picture a little wrong; published training scripts
# had it for months. Notebook 07 shows it at full strength. *A mistake that cannot be seen here is
# a reason for a test, not for trust.*
#
# Here is the whole way once more, from the caption to the pixels:
#
# ![Diagram of the whole model: three text encoders, joint blocks, sampler and
# decoder](../nanosd3/assets/pictures/model.svg)
#
# Bold shapes are those of our model, grey ones those of the official one with 8 billion parameters.
# Arrows and boxes are the same.
#
# ## An experiment: how many steps?
#
# **PREDICT.** Below, the same noise with 1, 2, 4, 8 and 16 Euler steps. Which is the first row
# that you would accept?

# %%
rows = {}
for count in (1, 2, 4, 8, 16):
    drawn = pipeline(digits[:10], sampler="euler", steps=count, seed=2)
    rows[f"{count} steps"] = drawn
images(rows, "More steps follow the curved path more closely. One step gives a blurred average.")

# %% [markdown]
# ## Exercises
#
# `show` prints the task, with a specification in plain loops; `check` tells you what came of
# your answer. An exercise you have not begun says so and stops nothing.

# %%
show("guide")


# %%
def guide(v_prompt, v_negative, scale):
    raise NotImplementedError("your code here")


check("guide", guide)

# %%
show("denormalise")


# %%
def denormalise(x0, shift, scale):
    raise NotImplementedError("your code here")


check("denormalise", denormalise)

# %% [markdown]
# **Open ends.** What does a prompt with a word the model has never seen give? Which of the three
# encoders could you leave out (`drop=("t5",)`) without noticing?
#
# ## What was left out
#
# Everything inside the four boxes: the flow (notebooks 01, 02), the transformer (03, 04), its
# training (05), better samplers (06), the autoencoder (07), the text encoders (08). And size:
# the real model is the same code with depth 24 to 38 instead of 2 (09). The whole is figure 2 of
# the paper, arXiv 2403.03206, and its section 4.
