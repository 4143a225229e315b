# %% [markdown]
# # 00 · A tour: from a sentence to a picture
#
# **How does "a bold 3" become an image?** This notebook trains a small Stable Diffusion 3, asks it
# for digits, and then takes the path from words to pixels apart, one step at a time. The classes
# are those of the 2-billion-parameter model; only the numbers in the configuration are smaller.
#
# Wherever you see **PREDICT**, stop and write down what you expect before you run the next cell.
# Wrong guesses are welcome: they show where there is something to learn.

# %%
from itertools import pairwise

import torch
from lab import images, lines, trained

from nanosd3.exercises import check, show
from nanosd3.samplers import euler, guided

# %% [markdown]
# ## The model
#
# The first run takes about four minutes on two cores: an autoencoder learns to compress digits, two
# CLIPs and a T5 learn to read captions, and a transformer learns the flow from noise to digits. (A
# classifier is trained as well. It is not part of the model; it reads the samples so that we can
# count how many are correct.) The result is cached for all notebooks.

# %%
lesson = trained()
pipeline = lesson.pipeline

# %% [markdown]
# **PREDICT.** We ask for "a bold 3" eight times. Will the eight pictures be the same? If not, what
# makes them differ?

# %%
prompts = ["a bold 3", "a thin 3", "a handwritten seven leaning right", "8"]
shown = {prompt: pipeline([prompt] * 8, seed=1) for prompt in prompts}
images(shown, "Eight samples per prompt. Within a row only the noise differs.")

# %% [markdown]
# Look down a column: the same noise under four prompts. What stays the same?
#
# ## Step 1: words to numbers
#
# A network cannot read. Two tokenizers split the prompt into numbered pieces: *byte pairs* for the
# CLIPs and *unigram* pieces for T5. Notebook 08 builds both.

# %%
prompt = "a bold 3"
tokenizers = pipeline.text.tokenizers
for tokenizer in (tokenizers.bpe, tokenizers.unigram):
    ids = tokenizer.encode(prompt)
    print(f"{type(tokenizer).__name__:8}", ids, [tokenizer.decode([i]) for i in ids])

# %% [markdown]
# Three encoders turn the pieces into vectors. SD3 uses them in two ways: as a **context**, a
# sequence of tokens for the transformer to attend to, and as one **pooled** vector that summarises
# the whole prompt.
#
# **PREDICT.** CLIP reads 9 tokens and T5 reads 8. Their outputs are concatenated along the token
# axis. What is the shape of the context for two prompts?

# %%
context, pooled = pipeline.encode_text([prompt, "a thin 3"])
print("context (B, M, Dc):", tuple(context.shape))
print("pooled  (B, Dp):   ", tuple(pooled.shape))
config = pipeline.config
assert context.shape[1] == config.text.clip_l.length + config.text.t5.length

# %% [markdown]
# ## Step 2: noise
#
# The picture starts as noise; not in pixels, but in **latents**: 4 channels of 8 x 8 numbers, which
# the autoencoder's decoder turns into 32 x 32 pixels (of which a border of 2 is cropped).
#
# **PREDICT.** What does the decoder make of pure noise?

# %%
noise = pipeline.noise(6, seed=1, size=(8, 8))
print("noise (B, C, h, w):", tuple(noise.shape))
images({"decoded noise": pipeline.decode(noise)}, "Noise, decoded: strokes, but no digit.")

# %% [markdown]
# The decoder knows what strokes look like, but the latents decide where they go. That is what the
# transformer has learned.
#
# ## Step 3: from noise to data
#
# Time `t` runs from 1 (noise) to 0 (data). At every point along the path the network answers one
# question: **in which direction, and how fast, do we move towards noise from here?** That is the
# *velocity*. We follow it backwards, from 1 to 0, in small straight steps. In plain Python:

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
# That is a complete sampler. The package's `euler` is the same loop over any list of times, with a
# callback at every step so that we can watch. The assertion below checks that the two agree; from
# here on we use the package's.

# %%
path = []


def record(step, t, z, x0):
    path.append((float(t), z[:1], x0[:1]))


times = torch.linspace(1, 0, steps + 1)
unguided = guided(pipeline.mmdit, prompt_text, prompt_text, scale=1.0)
with torch.no_grad():
    z_package = euler(unguided, noise, times, record)
torch.testing.assert_close(z_package, z, atol=1e-4, rtol=1e-4)

# %% [markdown]
# At every step the velocity also tells us where the path would end if it were straight: at
# `x0 = z - t v`, the network's current guess of the clean picture.
#
# **PREDICT.** At the very first step there is only noise to look at. What does the network guess
# then: a clean digit, an average of all threes, or noise?

# %%
every_third = path[::3]
rows = {
    "z": pipeline.decode(torch.cat([z for _, z, _ in every_third])),
    "x0, the guess": pipeline.decode(torch.cat([x0 for _, _, x0 in every_third])),
}
images(
    rows,
    "From t = 1 (left) to t = 0.1 (right). The guess starts as a blurry average 3 and sharpens.",
)

# %%
speed = [float((a[1] - b[1]).norm()) / (a[0] - b[0]) for a, b in pairwise(path)]
lines(
    {"one path": ([t for t, _, _ in path[:-1]], speed)},
    "t (1 noise, 0 data)",
    "speed |v| (latent units per unit of time)",
    "On a perfectly straight path the speed would be constant.",
)

# %% [markdown]
# ## Step 4: guidance
#
# During training the text was sometimes dropped, so the network can predict two velocities: one
# *with* the prompt and one *without*. **Guidance** extrapolates from the second through the first
# and beyond: `v = v_without + scale (v_with - v_without)`.
#
# **PREDICT.** What will scale 6 do to the digits? And what do we get at scale 0, without any text?

# %%
rows, accuracy = {}, {}
digits = [f"the digit {i % 10}" for i in range(40)]
for scale in (1.0, 1.6, 3.0, 6.0):
    drawn = pipeline(digits, guidance=scale, seed=2)
    rows[f"scale {scale}"] = drawn[:10]
    correct = [digit == i % 10 for i, digit in enumerate(lesson.classify(drawn))]
    accuracy[scale] = sum(correct) / len(correct)
print("share that the classifier reads as the requested digit:", accuracy)
images(rows, "The digits 0 to 9 at four guidance scales: clearer at first, then overdone.")

# %%
without = pipeline(["8"] * 8, "", drop=("clip_l", "clip_g", "t5"), seed=3)
images({"no text at all": without}, "Without text the model draws any digit.")

# %% [markdown]
# ## Step 5: pixels
#
# The decoder expects latents as the encoder produced them, but the flow works on normalised ones
# (mean 0, deviation 1). The two are related by a shift and a scale, measured once after the
# autoencoder has been trained. `pipeline.decode` undoes them.
#
# **PREDICT.** Will you notice if that step is forgotten?

# %%
latents = pipeline("a bold 3", output="latent", seed=1)
vae = pipeline.vae
with torch.no_grad():
    right, wrong = (vae.decode(x)[0, 0] for x in (vae.denormalise(latents), latents))
images(
    {"right": right[None], "forgotten": wrong[None]},
    f"With and without undoing the scale {vae.config.scale:.3f} and shift {vae.config.shift:.3f}.",
    cell=1.5,
)

# %% [markdown]
# Hardly: this autoencoder's latents happen to have a deviation of nearly 1. SD3's have 1 / 1.53, so
# there the mistake makes every picture slightly wrong; published training scripts had it for
# months. Notebook 07 shows it at full strength. *If you cannot see a mistake, write a test for it;
# do not trust your eyes.*
#
# Here is the whole path once more, from caption to pixels:
#
# ![Diagram of the whole model: three text encoders, joint blocks, sampler and
# decoder](../nanosd3/assets/pictures/model.svg)
#
# Shapes in bold are those of our model, shapes in grey those of the official model with 8 billion
# parameters. The arrows and boxes are the same for both.
#
# ## An experiment: how many steps?
#
# **PREDICT.** Below, the same noise with 1, 2, 4, 8 and 16 Euler steps. Which is the first row that
# you would accept?

# %%
rows = {}
for count in (1, 2, 4, 8, 16):
    drawn = pipeline(digits[:10], sampler="euler", steps=count, seed=2)
    rows[f"{count} steps"] = drawn
images(rows, "More steps follow the curved path more closely. One step gives a blurred average.")

# %% [markdown]
# ## Exercises
#
# `show` prints the task, with a specification in plain loops; `check` grades your answer. An
# exercise you have not started is reported as such and does not stop the notebook.

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
# **Open questions.** What does a prompt with a word that the model has never seen give? Which of
# the three encoders could you leave out (`drop=("t5",)`) without noticing?
#
# ## What was left out
#
# The inside of every box: the flow (notebooks 01, 02), the transformer (03, 04), its training (05),
# better samplers (06), the autoencoder (07), the text encoders (08). And size: the real model is
# the same code with depth 24 to 38 instead of 2 (09). The complete model is figure 2 of the paper,
# arXiv 2403.03206, explained in its section 4.
