# %% [markdown]
# # 00 · A tour: from a sentence to a picture
#
# **How does "a bold 3" become an image?** This notebook asks a small Stable Diffusion 3
# for digits, and then takes the path from words to pixels apart, one step at a time. The classes
# are those of the 2-billion-parameter model; only the numbers in the configuration are smaller.
#
# Wherever you see **PREDICT**, stop. Write what you expect between the quotes of the cell below it,
# and only then go on. Your answer stays in the notebook. Wrong guesses are welcome: they show where
# there is something to learn. What happened is folded; open it once you have looked for yourself.

# %%
from itertools import pairwise

import torch
from lab import images, lines, trained, turn

from nanosd3 import samplers
from nanosd3.exercises import check, guess, show

# %% [markdown]
# ## The model
#
# It comes trained (four minutes on two cores): an autoencoder learned to compress digits, two CLIPs
# and a T5 learned to read captions, and a transformer learned the flow from noise to digits. (A
# classifier was trained as well. It is not part of the model; it reads the samples so that we can
# count how many are correct.) To train it yourself: `lab.train(lab.begin_job("mine"))`.

# %%
lesson = trained()
torch.set_grad_enabled(False)  # from here on nothing is trained
pipeline = lesson.pipeline

# %% [markdown]
# **PREDICT.** We ask for "a bold 3" eight times. Will the eight pictures be the same? If not, what
# makes them differ?

# %%
guess("...")

# %%
prompts = ["a bold 3", "a thin 3", "a handwritten seven leaning right", "8"]
shown = {prompt: pipeline([prompt] * 8, seed=1) for prompt in prompts}
images(shown, "Eight samples for each of four prompts.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# They differ, because each sample starts from its own noise. The noise is all that differs within a
# row. Down a column it is the same, under four prompts: look for what it decides.
#
# </details>
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
# the whole prompt. We write both together as $c$, the condition.
#
# Both CLIPs read 9 tokens. One describes each token by 32 numbers, the other by 64, and these are
# put side by side. T5 reads 8 tokens and describes each by 128 numbers. The CLIPs' tokens are
# padded with zeros to that width, and the two sequences are joined end to end.
#
# **PREDICT.** What is the shape (B, M, Dc) of the context for two prompts: samples, tokens, numbers
# per token?

# %%
guess("...")

# %%
context, pooled = pipeline.encode_text([prompt, "a thin 3"])
print("context (B, M, Dc):", tuple(context.shape))
print("pooled  (B, Dp):   ", tuple(pooled.shape))

# %% [markdown]
# <details><summary>What happened</summary>
#
# Two samples, 9 + 8 = 17 tokens, 128 numbers each. The pooled vector has no tokens.
#
# </details>
#
# ## Step 2: noise
#
# The picture starts as noise; not in pixels, but in **latents**: 4 channels of 8 x 8 numbers, which
# the autoencoder's decoder turns into 32 x 32 pixels (of which a border of 2 is cropped).
#
# **PREDICT.** What does the decoder make of pure noise?

# %%
guess("...")

# %%
noise = pipeline.noise(6, seed=1, size=(8, 8))
print("noise (B, C, h, w):", tuple(noise.shape))
images({"decoded noise": pipeline.decode(noise)}, "Six samples of noise, decoded.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Bits of stroke, but no digit. The decoder knows what strokes look like, and the latents decide
# where they go. That is what the transformer has learned.
#
# </details>
#
# ## Step 3: from noise to data
#
# Data $x_0$ and noise $\epsilon$ are joined by a straight line. Time $t$ says where on it we are, 0
# at the data and 1 at the noise:
#
# $$z_t = (1 - t) x_0 + t \epsilon$$
#
# (paper, arXiv 2403.03206, equation 13). At every point $z$ the network $v_\theta$ answers one
# question: **in which direction, and how fast, do we move from here towards noise?** That is the
# *velocity* $v$. We follow it backwards, from $t = 1$ to $t = 0$, in small straight steps, each
# from a time $t$ to the next one, $t'$:
#
# $$z_{t'} = z_t + (t' - t) v_\theta(z_t, t, c)$$
#
# In plain Python:

# %%
steps = 20
prompt_text = pipeline.encode_text([prompt] * 6)

z = noise
for step in range(steps):
    t, t_next = 1 - step / steps, 1 - (step + 1) / steps
    velocity = pipeline.mmdit(z, torch.tensor(t), *prompt_text)
    z = z + (t_next - t) * velocity
images({"20 steps": pipeline.decode(z)}, "Six latents after twenty steps from noise, decoded.")

# %% [markdown]
# That is a complete sampler. Not everything it draws is a good three (the fourth looks like an 8);
# step 4 will help. The package's `samplers.euler` is the same loop over any list of times, with a
# callback at every step so that we can watch. The assertion below checks that the two agree; from
# here on we use the package's.

# %%
path = []


def record(step, t, z, x0):
    path.append((float(t), z[:1], x0[:1]))


times = torch.linspace(1, 0, steps + 1)
unguided = samplers.guided(pipeline.mmdit, prompt_text, prompt_text, scale=1.0)
z_package = samplers.euler(unguided, noise, times, record)
torch.testing.assert_close(z_package, z, atol=1e-4, rtol=1e-4)

# %% [markdown]
# At every step the velocity also tells us where the path would end if it were straight, at
# $x_0 = z_t - t v$: the network's current guess of the clean picture.
#
# **PREDICT.** At the very first step there is only noise to look at. What does the network guess
# then: one particular 3, an average of all bold threes, or noise?

# %%
guess("...")

# %%
every_third = path[::3]
rows = {
    "z": pipeline.decode(torch.cat([z for _, z, _ in every_third])),
    "x0, the guess": pipeline.decode(torch.cat([x0 for _, _, x0 in every_third])),
}
images(rows, "One sample on its way from t = 1 (left) to t = 0.1 (right).")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The first guess is the average of the latents of bold threes: the network cannot know yet which
# one it will be. (Decoded, an average of latents is a plain 3 and not a blur, as an average of
# pixels would be.) Then it settles on one of them. In the plane, where the data are two half
# circles:
#
# ![A point on its way from noise to data, with its velocity and the clean x0 that it points to,
# which starts at the mean of the data](../nanosd3/assets/pictures/following.svg)
#
# </details>
#
# A straight path has one velocity from end to end. Does this one?

# %%
speed = [float((a[1] - b[1]).norm()) / (a[0] - b[0]) for a, b in pairwise(path)]
lines(
    {"one path": ([t for t, _, _ in path[:-1]], speed)},
    "t (1 noise, 0 data)",
    "speed |v| (latent units per unit of time)",
    "Length of the velocity along the path of one sample.",
)

# %% [markdown]
# It does not: it slows down by a quarter, and it turns as well. That is why one step is not enough.
#
# ### Exercise: your own sampler
#
# `show` prints the task, with a specification in plain loops or in formulas; `check` grades your
# answer. An exercise you have not started is reported as such and does not stop the notebook.

# %%
show("euler")


# %%
def euler(velocity, z, ts):
    raise NotImplementedError("your code here")


solved = check("euler", euler)

# %%
if solved:
    images({"your euler": pipeline.decode(euler(unguided, noise, times))}, "Drawn by your sampler.")
else:
    print("Solve `euler`, and this cell draws six threes with it.")

# %% [markdown]
# ## Step 4: guidance
#
# During training the text was sometimes dropped, so the network can predict two velocities: $v_c$
# *with* the prompt, and $v_\varnothing$ *without*. **Guidance** starts at the second and goes
# through the first and beyond, to a multiple $w$ of the distance between them, the *scale*:
#
# $$v = v_\varnothing + w (v_c - v_\varnothing)$$
#
# (Ho and Salimans, arXiv 2207.12598, who count $w$ from the prompt: theirs is ours minus 1.)
#
# **PREDICT.** What will scale 6 do to the digits? And what do we get at scale 0, without any text?

# %%
guess("...")

# %%
rows = {}
digits = [f"the digit {i % 10}" for i in range(40)]
for scale in (1.0, 1.6, 3.0, 6.0):
    drawn = pipeline(digits, guidance=scale, seed=2)
    rows[f"scale {scale}"] = drawn[:10]
    correct = [digit == i % 10 for i, digit in enumerate(lesson.classify(drawn))]
    print(f"scale {scale}: {sum(correct) / len(correct):.0%} are read as the requested digit")
images(rows, "The digits 0 to 9 at four guidance scales.")

# %%
without = pipeline(["8"] * 8, "", drop=("clip_l", "clip_g", "t5"), seed=3)
images({"no text at all": without}, "Eight samples without text.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# A little guidance makes doubtful digits clear: compare the 3 at scales 1 and 1.6, and the printed
# shares. Too much of it exaggerates them: at scale 6 the strokes are fat, and some grow corners.
# Without text the model draws digits, or something between two of them.
#
# </details>
#
# ![Diagram of guidance: one call for both prompts, and the line through the two
# velocities](../nanosd3/assets/pictures/guidance.svg)
#
# ### Exercise: guidance

# %%
show("guide")


# %%
def guide(v_prompt, v_negative, scale):
    raise NotImplementedError("your code here")


solved = check("guide", guide)

# %%
text, nothing = pipeline.encode_text(digits[:10]), pipeline.encode_text([""] * 10)


def guided_by_you(scale):
    def velocity(z, t):
        return guide(pipeline.mmdit(z, t, *text), pipeline.mmdit(z, t, *nothing), scale)

    return pipeline.decode(samplers.euler(velocity, pipeline.noise(10, 2, (8, 8)), times))


if solved:
    scales = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    images({f"scale {s}": guided_by_you(s) for s in scales}, "Your guidance at seven scales.")
else:
    print("Solve `guide`, and this cell draws the ten digits with it at seven scales.")

# %% [markdown]
# ## Step 5: pixels
#
# The flow works on latents of mean 0 and deviation 1. So the encoder's latents $e$ are normalised,
# with a shift $m$ and a scale $s$ that are measured once, after the autoencoder has been trained:
#
# $$x_0 = (e - m) s$$
#
# The decoder expects $e$, and `pipeline.decode` undoes this first.
#
# **PREDICT.** Will you notice if that step is forgotten?

# %%
guess("...")

# %%
latents = pipeline("a bold 3", output="latent", seed=1)
vae = pipeline.vae
right, wrong = (vae.decode(x)[0, 0] for x in (vae.denormalise(latents), latents))
images(
    {"undone": right[None], "forgotten": wrong[None]},
    f"With and without undoing the scale {vae.config.scale:.3f} and shift {vae.config.shift:.3f}.",
    cell=1.5,
)

# %% [markdown]
# <details><summary>What happened</summary>
#
# Hardly: this autoencoder's latents happen to have a deviation of nearly 1. SD3's have 1 / 1.53, so
# there the mistake makes every picture slightly wrong; published training scripts contained it for
# months. Notebook 07 shows it at full strength. *If you cannot see a mistake, write a test for it;
# do not trust your eyes.*
#
# </details>
#
# ### Exercise: the way back

# %%
show("denormalise")


# %%
def denormalise(x0, shift, scale):
    raise NotImplementedError("your code here")


solved = check("denormalise", denormalise)

# %%
if solved:
    mine = vae.decode(denormalise(latents, vae.config.shift, vae.config.scale))
    torch.testing.assert_close(mine[0, 0], right)
    images({"by your function": mine[:, 0]}, "Latents that you handed to the decoder.", cell=1.5)
else:
    print("Solve `denormalise`, and this cell decodes a 3 through it.")

# %% [markdown]
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
# **PREDICT.** Below are ten samples of one prompt, with 1, 2, 4, 8 and 16 Euler steps. Within a
# column the noise is the same. What will be wrong with the row of a single step?

# %%
guess("...")

# %%
rows = {}
for count in (1, 2, 4, 8, 16):
    drawn = pipeline(["the digit 7"] * 10, sampler="euler", steps=count, seed=2)
    spread = torch.from_numpy(drawn).float().std(0).mean()
    rows[f"steps {count}, spread {spread:.0f}"] = drawn
images(rows, "Spread: deviation among the ten samples, averaged over the pixels (0 to 255).")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Nothing is wrong with any one of its pictures, but they are all the same. From pure noise the best
# guess is the average, whatever the noise, and a single step goes there. Variety appears with the
# steps, on the bent part of the path. *Look at many samples: a picture can be good, and the model
# that made it poor.*
#
# </details>
#
# ## Turn it yourself
#
# Here is the whole sampler once more, stopped at a time $t$. In a running notebook the cell has a
# box for the prompt, and sliders to move with the mouse or the arrow keys; on a web page it shows a
# few of their settings. Until what $t$ can you still change your mind about the prompt? With how
# few steps? What does a negative scale draw?


# %%
def stopped(prompt, t, guidance, steps, seed):
    texts = (pipeline.encode_text([text] * 6) for text in (prompt, ""))
    velocity = samplers.guided(pipeline.mmdit, *texts, guidance)
    z = pipeline.noise(6, seed, (8, 8))
    for now, after in pairwise(torch.linspace(1, t, steps + 1)):
        z = z + (after - now) * velocity(z, now)
    x0 = z - t * velocity(z, torch.tensor(t))
    return {"z": pipeline.decode(z), "x0, the guess": pipeline.decode(x0)}


turn(stopped, images, "Six samples on their way.", [{"t": t} for t in (1.0, 0.8, 0.6, 0.0)],
     prompt="a bold 3", t=(0.0, 1.0, 0.05, 0.8), guidance=(-2.0, 8.0, 0.1, 1.6),
     steps=(1, 40, 1, 20), seed=(0, 99, 1, 1))  # fmt: skip

# %% [markdown]
# **Open questions.** What do you get from a prompt with a word that the model has never seen? Which
# of the three encoders could you leave out (`drop=("t5",)`) without noticing?
#
# ## What was left out
#
# The inside of every box: the flow (notebooks 01, 02), the transformer (03, 04), its training (05),
# better samplers (06), the autoencoder (07), the text encoders (08). And size: the real model is
# the same code with depth 24 to 38 instead of 2 (09). The complete model is figure 2 of the paper,
# arXiv 2403.03206, explained in its section 4.
