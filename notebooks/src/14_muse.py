# %% [markdown]
# # 14 · Tokens instead of noise: Muse
#
# **Can a picture be written like a text, and many words of it at once?** Muse (Chang et al., arXiv
# 2301.00704) does without noise and without time. A picture becomes a small grid of *tokens* from
# an alphabet, and a transformer learns to guess those that are hidden from it. To draw, it begins
# with a grid in which everything is hidden. This notebook makes the alphabet, trains the guessing
# with the lesson model's text encoders, and draws.

# %%
import math
import time
from dataclasses import replace

import torch
from alphabet import Judge, codebook, covered, written
from lab import images, lines, maps, pick, trained

from nanosd3.config import Recipe
from nanosd3.exercises import check, guess, show
from nanosd3.few_steps import even_schedule
from nanosd3.random_streams import rng
from nanosd3.related import muse as package
from nanosd3.related.autoregressive import CausalMuse, write_tokens
from nanosd3.related.muse_editing import MusePipeline, VQPipeline, repaint
from nanosd3.related.train_muse import train_muse, train_tokens
from nanosd3.related.vq import Quantiser, VQConfig, perplexity, straight_through
from nanosd3.samplers import euler, guided

# %% [markdown]
# ## An alphabet for pictures
#
# The autoencoder of notebook 07 gives each position of its latents any numbers. Here an encoder $E$
# gives position $i$ a vector $z_i$ of 8 numbers, for which the nearest of an alphabet of $K$
# vectors $e_k$, the **codes**, is taken. The number of that code is the **token**, all that is kept
# of the position (van den Oord et al., arXiv 1711.00937; VQGAN, arXiv 2012.09841, eq. 2):
#
# $$s_i = \mathrm{argmin}_k |z_i - e_k|$$
#
# Both are brought to length 1 first, so that only the direction counts. The decoder gets $e_{s_i}$.
#
# A number has no gradient. So the gradient that the decoder sends back to $e_{s_i}$ is handed to
# $z_i$ as if nothing had been rounded: **straight through**. With $sg$ for "take it as a constant"
# (notebook 13), $z + sg[e - z]$ has the value of $e$ and the gradient of $z$.


# %%
def nearest_slowly(z, codes):
    B, _, h, w = z.shape
    tokens = torch.zeros(B, h, w, dtype=torch.long)
    for b in range(B):
        for i in range(h):
            for j in range(w):
                apart = [(z[b, :, i, j] - code / code.norm()).norm() for code in codes]
                tokens[b, i, j] = torch.stack(apart).argmin()
    return tokens


quantiser, g = Quantiser(codes=11, width=4), rng("alphabet")
z = torch.nn.functional.normalize(torch.randn(2, 4, 3, 5, generator=g), dim=1).requires_grad_()
tokens = nearest_slowly(z.detach(), quantiser.codes.detach())
torch.testing.assert_close(tokens, quantiser.nearest(z))
e, weight = quantiser.vectors(tokens), torch.randn(z.shape, generator=g)
through = straight_through(z, e)
(weight * through).sum().backward()
torch.testing.assert_close((through, z.grad), (e, weight))

# %% [markdown]
# Encoder, codes and decoder $D$ learn together (VQGAN's eq. 4, without what sharpens photographs):
#
# $$L = |x - D(z + sg[e - z])|^2 + |sg[z] - e|^2 + \frac{1}{4} |z - sg[e]|^2$$
#
# The second term brings codes to what is encoded, the third keeps the encoder near its codes. A
# code that is nearest to nothing gets no gradient, ever: now and then such codes are moved to where
# something is. Our alphabet has 64 codes, and a digit of 28 x 28 pixels becomes a grid of 7 x 7
# tokens.

# %%
lesson = trained()
source, features, pipeline = lesson.source, lesson.features, lesson.pipeline
config, K = pipeline.config, 64
tokens_recipe = Recipe(pick(200, 4), 64, lr=2e-3, warmup=pick(50, 1), weight_decay=0.0)
muse_recipe = Recipe(pick(700, 4), 32, 1e-2, pick(100, 1), weight_decay=0.0, optimizer="muon")
training = replace(config.training, autoencoder=tokens_recipe, flow=muse_recipe, ema_decay=0.99)
job, vae = lesson.new_job("muse", replace(config, training=training)), config.vae
vq = train_tokens(job, VQConfig(1, vae.channels, vae.channels, vae.norm_groups, K, width=8))

# %% [markdown]
# **PREDICT.** A digit has 784 bytes, its 49 tokens of 6 bits have 37. Of 1000 test digits, written
# as tokens and read back, how many will the classifier still read correctly? And if a digit is
# moved by one pixel, how many of its 49 tokens change?

# %%
guess("...")

# %%
vq_pipeline, count = VQPipeline(vq, pipeline), pick(1000, 50)
test = lesson.images.test_images[:count].numpy()
labels, judge = lesson.images.test_labels[:count].tolist(), Judge(lesson, vq_pipeline)
x = torch.from_numpy(test)[:, None] / 127.5 - 1
tokens = vq_pipeline.tokens(x)
rebuilt = vq_pipeline.images(tokens)
print(f"read rightly: {judge.right(test, labels):.1%}, rebuilt {judge.right(rebuilt, labels):.1%}")
changed = (vq_pipeline.tokens(x.roll(1, dims=3)) != tokens).float().mean() * 49
print(f"as varied as {perplexity(tokens, K):.0f} codes used alike; one pixel changes {changed:.0f}")
images({"digits": test[:10], "rebuilt": rebuilt[:10]}, "From 49 tokens of 64 codes.")
written(rebuilt[:2], tokens[:2], "Two digits, and the tokens that they are made of.")
codebook(test, tokens, K, "What test digits have where a code stands, on average, commonest first.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Nearly all of them, one or two in a hundred fewer than before. What gets lost is what tells one
# handwriting from another: rough edges become smooth, and thin ends blur. But a shift by a single
# pixel changes more than half of the tokens. A token does not say "a vertical stroke" but "a
# vertical stroke at the left edge of my cell": there are codes for background of several kinds, for
# edges, for strokes in every direction and for where they end. (Below you will see how few of them
# a digit needs.)
#
# </details>
#
# ### Exercise: the nearest code

# %%
show("nearest_code")


# %%
def nearest_code(z, codes):
    raise NotImplementedError("your code here")


solved = check("nearest_code", nearest_code)

# %%
if solved:
    with torch.no_grad():
        z, codes = vq.encode(x[:10]), vq.quantiser.codes
        often = torch.bincount(tokens.flatten(), minlength=K).argsort(descending=True)
        rows = {}
        for n in (2, 4, 8, 16, 32, 64):
            own = often[nearest_code(z, codes[often[:n]])]
            rows[f"{n} codes"] = vq_pipeline.images(own)
    images(rows, "Through your nearest_code, with an alphabet of the commonest codes alone.")
else:
    print("Solve `nearest_code`, and this cell writes digits with smaller alphabets.")

# %% [markdown]
# ## Hide and guess
#
# Now a transformer learns the text. Some of the tokens are hidden (a 65th symbol stands for them),
# and from the others and the prompt $y$ it predicts, for each hidden one, a probability for every
# code. The loss is the cross-entropy over the hidden set $H$ (MaskGIT, arXiv 2202.04200, eq. 1):
#
# $$L = -\frac{1}{|H|} \sum_{i \in H} \ln p(s_i | s_{known}, y)$$
#
# How many are hidden? Drawing will begin with all and end with none, so every number has to be
# practised, and large ones most, since there is most to learn there. Muse (section 2.6) draws $u$
# between 0 and 1 and hides a share of
#
# $$r = \cos(\frac{\pi}{2} u)$$
#
# which is $2 / \pi$ on average: 31 of 49.


# %%
def loss_slowly(logits, tokens, seen):
    losses = []
    for b in range(len(tokens)):
        hidden = [(i, j) for i in range(7) for j in range(7) if seen[b, i, j] == -1]
        terms = [logits[b, i, j].softmax(0)[tokens[b, i, j]].log() for i, j in hidden]
        losses.append(-sum(terms) / len(hidden))
    return torch.stack(losses)


u, places = torch.rand(5, generator=(g := rng("hidden"))), torch.rand(5, 49, generator=g)
seen = package.hide(tokens[:5], package.cosine_share(u), places)
l = torch.randn(5, 7, 7, K, generator=g)  # noqa: E741
print("hidden, of 49:", (seen == -1).flatten(1).sum(1).tolist())
ours, theirs = loss_slowly(l, tokens[:5], seen), package.masked_loss(l, tokens[:5], seen)
torch.testing.assert_close(ours, theirs)

# %%
texts = features.text(torch.arange(len(source.texts)))
size = package.MuseConfig(3, 128, K, 7, config.mmdit.context_dim, config.mmdit.pooled_dim)
muse = train_muse(job, source, vq, texts, size, package.cosine_share, "muse")
model = MusePipeline(vq, muse, pipeline)

# %% [markdown]
# There is no time among the inputs: how much is hidden can be seen.
#
# **PREDICT.** Knowing nothing costs a loss of $\ln 64 = 4.16$. How large is the trained network's
# if 49, 40, 25, 10, or only one token of a test digit are hidden? Where does the prompt help most?

# %%
guess("...")

# %%
some, counts, curves = tokens[:200], (49, 45, 40, 30, 20, 10, 4, 1), {}
for name, prompt in {"with the prompt": "the digit {}", "without": ""}.items():
    logits, losses = model.logits([prompt.format(d) for d in labels[:200]]), []
    for hidden in counts:
        places = torch.rand(len(some), 49, generator=rng("places", hidden))
        seen = package.hide(some, torch.full((len(some),), hidden / 49 - 1e-4), places)
        with torch.no_grad():
            losses.append(float(package.masked_loss(logits(seen, 1.0), some, seen).mean()))
    curves[name] = (counts, losses)
share = torch.bincount(tokens.flatten(), minlength=K) / tokens.numel()
alone = float(torch.special.entr(share).sum())
curves["how often a code occurs"] = (counts, [alone] * len(counts))
lines(curves, "hidden tokens of 49", "loss of a hidden token (nats)", "200 test digits.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# It falls all the way: neighbours say much about a token, since strokes continue and background
# stays background. The prompt is worth half a nat when everything is hidden, and there is nothing
# else to go by; less than half of that when 48 tokens show which digit it is. How often a code
# occurs is the least that one can know. Even with an empty grid and no prompt the network does
# better, because codes have their places: background is in the corners.
#
# </details>
#
# ## All at once
#
# With everything hidden, the network gives each of the 49 positions a distribution over the codes.
# So why not draw all of them and be done in a single step?
#
# **PREDICT.** Prompts are "the digit 0" to "the digit 9". What do digits look like if each position
# gets its most probable token? And if each is drawn from its distribution?

# %%
guess("...")

# %%
asked = [d % 10 for d in range(pick(200, 10))]
prompts = [f"the digit {d}" for d in asked]
logits, nothing = model.logits(prompts), torch.full((len(asked), 7, 7), package.MASK)
with torch.no_grad():
    l = logits(nothing, 1.0)  # noqa: E741
drawn, _ = package.draw_tokens(l, rng("all at once"))
rows = {"most probable": model.images(l.argmax(-1)), "drawn": model.images(drawn)}
for name, pictures in rows.items():
    print(f"{name}: {judge.right(pictures, asked):.0%} read as asked")
images({name: pictures[:10] for name, pictures in rows.items()}, "In one step.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The most probable tokens make a clean digit, always the same one for a prompt. Drawn tokens make a
# ragged one, since no position knows what another has drawn: it is read as asked, but nobody wrote
# it. For two tokens $a$ and $b$ the product $p(a) p(b)$ was taken where $p(a, b)$ is needed. If
# half of all threes lean to the left and half to the right, half of these pairs do not fit.
#
# </details>
#
# ## A few at a time
#
# So keep only some of the guesses, hide the others again, and let the network see what has been
# decided before it guesses again (MaskGIT, section 3.2; Muse, section 2.8). Of $N$ tokens that are
# hidden at first, the number still hidden after step $k = 0, 1, \ldots, S - 1$ of $S$ is
#
# $$n_k = \lfloor N \cos(\frac{\pi}{2} \cdot \frac{k + 1}{S}) \rfloor$$
#
# For 49 and 8 steps: 48, 45, 40, 34, 27, 18, 9 and 0. At first, when a guess knows least about the
# others, one is kept; in the last step nine are.

# %%
show("left_hidden")


# %%
def left_hidden(hidden, at_first, step, steps):
    raise NotImplementedError("your code here")


solved = check("left_hidden", left_hidden)

# %%
if solved:
    curves, n = {}, torch.tensor([49])
    for steps in (4, 8, 16):
        left = [n]
        for step in range(steps):
            left.append(left_hidden(left[-1], n, step, steps))
        curves[f"{steps} steps"] = (range(steps + 1), torch.cat(left))
    lines(curves, "steps", "hidden tokens", "Counted by your left_hidden.")
else:
    print("Solve `left_hidden`, and this cell draws how the hidden tokens become fewer.")

# %% [markdown]
# Which are kept? Those the network is surest of: whose guess $s$ it gave the largest probability.
# But always keeping the surest gives much the same picture every time, so noise, which fades, is
# added to the confidence. With $G = -\ln(-\ln u)$ (Gumbel noise; $u$ is uniform) and a temperature
# $T$:
#
# $$c_i = \ln p(s_i) + T (1 - \frac{k + 1}{S}) G_i$$
#
# The whole drawing process, in loops for one image:


# %%
def draw_slowly(logits, tokens, steps, temperature, g):  # tokens (1, 7, 7)
    tokens, at_first = tokens.clone(), int((tokens == -1).sum())
    for k in range(steps):
        hidden = [(0, i, j) for i in range(7) for j in range(7) if tokens[0, i, j] == -1]
        s, log_p = package.draw_tokens(logits(tokens, 1.0), g)
        G = package.gumbel(log_p.shape, g)
        sure = log_p + temperature * (1 - (k + 1) / steps) * G
        n = math.floor(at_first * math.cos(math.pi / 2 * (k + 1) / steps))
        for place in sorted(hidden, key=lambda place: sure[place])[n:]:
            tokens[place] = s[place]
    return tokens


three = model.logits(["the digit 3"])
with torch.no_grad():
    ours = draw_slowly(three, nothing[:1], 8, 4.0, rng("three"))
theirs = package.fill_hidden(three, nothing[:1], 8, 1.0, 4.0, rng("three"))
torch.testing.assert_close(ours, theirs)
show("keep_surest")


# %%
def keep_surest(tokens, guess, confidence, left):
    raise NotImplementedError("your code here")


solved = check("keep_surest", keep_surest)

# %%
if solved:
    known, seen, best, g = nothing[:1], [], [], rng("yours")
    for k in range(8):
        with torch.no_grad():
            l = three(known, 1.0)  # noqa: E741
        s, log_p = package.draw_tokens(l, g)
        sure = log_p + 4 * (1 - (k + 1) / 8) * package.gumbel(log_p.shape, g)
        n = package.left_hidden((known == -1).sum()[None], torch.tensor([49]), k, 8)
        known = keep_surest(known, s, sure, n)
        seen.append(known)
        best.append(torch.where(known == -1, l.argmax(-1), known))
    seen, pictures = torch.cat(seen), model.images(torch.cat(best))
    images({"kept": covered(pictures, seen == -1), "and its best guesses": pictures},
           "A three in eight steps, by your keep_surest. Grey is hidden.", 0.8)  # fmt: skip
else:
    print("Solve `keep_surest`, and this cell draws a three with it, step by step.")

# %% [markdown]
# Tokens that are drawn in one step do not see each other, so they may not fit together. That can be
# counted. Call a pair of neighbouring tokens *rare* if fewer than one training digit in a thousand
# has it: how many pairs of the samples are rare?
#
# **PREDICT.** Draw in 1, 2, 4, 8, 16 and 49 steps. How does the share of rare pairs fall, and after
# how many steps is nothing more gained?

# %%
guess("...")


# %%
drawn, rows = {}, {}
for steps in pick((1, 2, 4, 8, 16, 49), (1, 3)):
    drawn[steps] = package.fill_hidden(logits, nothing, steps, 1.0, 4.0, rng("steps"))
    print(f"{steps:2} steps: {judge.scores(drawn[steps], asked)}")
    rows[f"steps: {steps}"] = model.images(drawn[steps][:10])
print(f"test digits: {judge.scores(tokens[: len(asked)], labels[: len(asked)])}")
images(rows, "The digits 0 to 9, without guidance.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# In one step one pair in eight is rare, in eight steps one in 23, and from 16 steps on nothing is
# gained: most pairs of tokens hardly depend on each other, and those that do are seldom drawn in
# the same step. So a third of the evaluations does what 49 do. Real digits have fewer rare pairs,
# one in 80; the rest is what the network has not learned in so short a time. The classifier reads
# all rows about equally well, and the distance, on 200 images, hardly tells them apart.
#
# </details>
#
# **PREDICT.** With temperature 0 the surest tokens are always kept first. Which places of a digit
# are those? And what do the digits look like, compared with those of temperature 4 and 32?

# %%
guess("...")

# %%
tables, rows = {}, {}
for temperature in (0.0, 4.0, 32.0):
    step_of = torch.zeros(49)

    def counting(t, scale, step_of=step_of):
        step_of += (t == -1).flatten(1).float().mean(0)
        return logits(t, scale)

    t = package.fill_hidden(counting, nothing, 8, 1.0, temperature, rng("temperature"))
    tables[f"temperature {temperature:g}"] = step_of.view(7, 7)
    rows[f"temperature {temperature:g}"] = model.images(t[3::10])[:10]
    print(f"temperature {temperature:2g}: {judge.scores(t, asked)}")
maps(tables, "column", "row", "When a token is kept, on average.", "step (of 8)")
images(rows, "Ten threes each, the same seed.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# First the corners, where background is all but certain, and last the middle, where the digit is.
# Then hardly anything is left to chance: pairs fit best, and all threes are the same three, which
# the distance punishes. At 32 the order is almost random: every handwriting is there, and more
# misfits. For this network 4 is a compromise. The one in
# [related](../nanosd3/related/README.md#muse), trained for twice as long, makes fewer mistakes of
# its own and is best at 32.
#
# </details>
#
# ## Guidance on logits
#
# The network was trained without the prompt a tenth of the time, so it has logits $l$ with it and
# without. Guidance is that of notebook 06, with logits in place of velocities, and a scale $w_k$
# that rises evenly over the steps (Muse, section 2.7): early tokens are drawn freely and make
# samples differ, late ones are made to fit.
#
# $$l_i = l_{none} + w_k (l_y - l_{none}), \qquad w_k = 1 + (w - 1) \frac{k}{S - 1}$$
#
# (Muse's paper writes $1 + t$ for the scale, and lets $t$ rise from 0.)

# %%
show("guide_logits")


# %%
def guide_logits(l_prompt, l_negative, guidance, step, steps):
    raise NotImplementedError("your code here")


solved = check("guide_logits", guide_logits)

# %%
without = model.logits([""] * len(asked))
if solved:
    rows = {}
    for w in (0.0, 1.0, 2.0, 8.0):

        def yours(t, _, w=w, step=iter(range(8))):  # noqa: B008
            return guide_logits(logits(t, 1.0), without(t, 1.0), w, next(step), 8)

        t = package.fill_hidden(yours, nothing, 8, 1.0, 4.0, rng("guide"))
        pictures = model.images(t)
        rows[f"w = {w:g}: {judge.right(pictures, asked):.0%} read as asked"] = pictures[:10]
    images(rows, "By your guide_logits. With w = 0 the last step does not know the prompt.")
else:
    print("Solve `guide_logits`, and this cell draws digits with it over scales.")

# %% [markdown]
# ## Editing for free
#
# Nothing says that everything must be hidden at first. Hide what should change, and draw: neither
# training nor inversion is needed, because filling holes is all that the network has learned (Muse,
# section 3.3).
#
# **PREDICT.** The lower four rows of tokens of test digits are hidden and drawn anew, once with
# their own label as prompt, once with the label plus one. How many are read as the prompt says?

# %%
guess("...")

# %%
lower = torch.zeros(7, 7, dtype=torch.bool)
lower[3:] = True
old, old_labels = tokens[: pick(200, 10)], labels[: pick(200, 10)]
rows = {"digits": test[:10], "hidden": covered(model.images(old[:10]), lower.expand(10, 7, 7))}
for name, extra in (("own label", 0), ("label plus one", 1)):
    wanted = [(d + extra) % 10 for d in old_labels]
    told = model.logits([f"the digit {d}" for d in wanted])
    new = repaint(told, old, lower, 8, 1.5, 4.0, rng("repaint"))
    assert new[:, :3].equal(old[:, :3])
    rows[name] = model.images(new)[:10]
    print(f"{name}: {judge.right(model.images(new), wanted):.0%} read as the prompt says")
images(rows, "The lower four rows of tokens, drawn anew.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# With their own label nearly all; the upper tokens are the same, bit by bit. With the next label
# less than half: the new part has to fit both the prompt and what was left, and the two disagree. A
# two can end as a three, and a nine as a zero; but there is no two below the stroke of a one.
#
# </details>
#
# ## What it costs
#
# Muse's paper says that it is faster than diffusion, which needs more steps, and than writing the
# tokens one after the other, as a language model does (DALL-E, Parti). `CausalMuse` is such a
# writer: the same network, but a token sees only those before it, and one step is one token. What
# earlier tokens computed is kept, so that each step runs a single token through the network. (Ours
# is untrained here; its time is the same.)
#
# **PREDICT.** Milliseconds for a digit: Muse in 8 steps, the writer in 49, the lesson model's flow
# in 8 Euler steps. In which order?

# %%
guess("...")

# %%
prompt, negative = model.texts(prompts, "")
writer, noise = CausalMuse(size).requires_grad_(False), pipeline.noise(len(asked), 0, (8, 8))
velocity = guided(pipeline.mmdit, prompt, negative, config.sampling.guidance)
told = package.guided_logits(muse, prompt, negative)
ways = {
    "Muse, 8 steps": lambda: package.fill_hidden(told, nothing, 8, 1.5, 4, rng("cost")),
    "one by one, 49 steps": lambda: write_tokens(writer, prompt, negative, 1.5, rng("cost")),
    "flow, 8 steps": lambda: euler(velocity, noise, even_schedule(8)),
}
for name, way in ways.items():
    begin = time.process_time()
    with torch.no_grad():
        way()
    print(f"{name:20} {1000 * (time.process_time() - begin) / len(noise):5.1f} ms a digit")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The flow, then the writer, then Muse: the paper's order reversed. A step of the flow has 16 tokens
# where Muse has 49, and in as many steps its digits are no worse
# ([measured](../nanosd3/related/README.md#muse)); the paper compares with other models in 50 steps.
# The writer runs each token once, Muse all of them in each of 8 steps: that is more work, not less.
# What Muse saves is steps that wait for each other. Here 200 digits are drawn at once and keep the
# processor busy anyway; a single image leaves an accelerator idle most of the time, and then 8
# steps take a sixth of the time of 49.
#
# </details>
#
# ## Which part is which
#
# | | Muse | Stable Diffusion 3 |
# | --- | --- | --- |
# | an image is | a grid of numbers of codes | a grid of vectors, 16 numbers each |
# | what destroys it | hiding | noise |
# | how much, in training | a share $\cos(\pi u / 2)$ | a time $t$, logit-normal (section 3.1) |
# | what is learned | probabilities of the codes | a velocity |
# | a step of drawing | keeps the surest guesses | follows the velocity |
# | what cannot be undone | a token that was kept | nothing, up to the last step |
# | guidance acts on | logits | velocities |
# | the prompt enters through | cross-attention | joint attention |
#
# (Sections of the SD3 paper, arXiv 2403.03206, which does not compare itself with Muse.)
#
# **Open questions.** Train with a fixed share of 15% hidden, as BERT does: what can such a network
# still draw? Let `fill_hidden` hide kept tokens again, if their probability has fallen: does that
# repair digits? Which temperature is best if the network has learned for longer?
#
# ## What was left out
#
# What makes VQGAN's photographs sharp (a perceptual loss and an adversary). The cascade that draws
# fine tokens from these coarse ones, and a larger decoder for the same tokens (Muse, sections 2.4
# and 2.5; `super_resolution.py`). Editing without a mask: hide a few tokens anywhere and draw them
# anew, again and again (`edit_freely`). T5-XXL, which reads Muse's prompts. A longer training of
# the same network is in [related](../nanosd3/related/README.md#muse), and what the paper claims is
# put to the test by `python -m nanosd3.claims x-muse-2` and its neighbours.
