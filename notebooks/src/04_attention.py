# %% [markdown]
# # 04 · Joint attention and adaLN-Zero: how words steer pixels
#
# **Image tokens and text tokens are vectors of the same width. How does a word get from one to the
# other?** In this model there are two ways: *joint attention*, where every image token attends to
# every text token, and *modulation*, where one vector for the whole prompt adjusts every layer.
# This notebook opens a trained model, looks at both, and lets them contradict each other.

# %%
import copy
import math
from unittest.mock import patch

import torch
from films import attention_seen, film
from lab import images, lines, maps, pick, trained

from nanosd3 import layers
from nanosd3.embeddings import timestep_embedding
from nanosd3.exercises import check, guess, show
from nanosd3.flow import flow_loss, interpolate
from nanosd3.mmdit import Attention, MMDiT, join_streams
from nanosd3.samplers import euler, guided

lesson = trained()
pipeline, mmdit = lesson.pipeline, lesson.pipeline.mmdit
torch.set_grad_enabled(False)  # nothing is trained here
g = torch.Generator().manual_seed(0)

# %%
rows = {prompt: pipeline([prompt] * 8, seed=4) for prompt in ("a thin 3", "a bold 3", "a bold 8")}
images(rows, "Down a column the noise is the same. All differences come from the words.")


# %%
def reward(solved, name, replaced):  # the same, with an answer in place of a package's function
    if not solved:
        print(f"Solve `{name}`, and this cell draws with it in the trained model.")
        return
    with replaced:
        images({p: pipeline([p] * 8, seed=4) for p in rows}, f"Drawn with your `{name}`.")


# %% [markdown]
# ## Attention
#
# Each token asks all tokens a question (its **query**). Each of them offers a **key**, which says
# what it has, and a **value**, the content itself. The better the query $q$ and the key $k_i$
# match, the more of the value $v_i$ is taken. The matches $a_i$ are the **logits**; the softmax
# turns them into weights $w_i$ that sum to 1, and the output is $o$:
#
# $$a_i = \frac{q \cdot k_i}{\sqrt{64}}, \quad w_i = \frac{e^{a_i}}{\sum_j e^{a_j}}$$
#
# $$o = \sum_i w_i v_i$$
#
# One head in plain loops, for vectors of 64 numbers; the package's `layers.attention` takes all
# heads and samples at once:


# %%
def attention_slowly(queries, keys, values):
    out = []
    for query in queries:
        logits = [float(query @ key) / 8 for key in keys]  # 8: the square root of 64
        weights = [math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]
        out.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    return torch.stack(out)


q, k, v = torch.randn(3, 1, 2, 5, 64, generator=g)  # two heads, five tokens
second = attention_slowly(q[0, 1], k[0, 1], v[0, 1])
torch.testing.assert_close(layers.attention(q, k, v)[0, :, 64:], second, atol=1e-5, rtol=1e-4)
show("attention")


# %%
def attention(q, k, v):
    raise NotImplementedError("your code here")


solved = check("attention", attention)

# %%
reward(solved, "attention", patch("nanosd3.mmdit.attention", attention))

# %% [markdown]
# ## Two streams, one attention
#
# Image and text are different things, so each has its own weights for computing queries, keys and
# values. If each attended only to itself, no word would ever reach the image. SD3 concatenates the
# tokens of both, text $y$ first and then image $x$, and attends once:
#
# $$Q = [Q_y, Q_x], \quad K = [K_y, K_x], \quad V = [V_y, V_x]$$
#
# To reproduce that on real numbers we need the inputs of the blocks of the trained model. A forward
# hook records them and changes nothing.


# %%
def block_inputs(*arguments):
    """Each block and its inputs: image tokens, text tokens, conditioning."""
    recorded = []
    hooks = [block.register_forward_pre_hook(lambda *call: recorded.append(call))
             for block in mmdit.joint_blocks]  # fmt: skip
    mmdit(*arguments)
    for hook in hooks:
        hook.remove()
    return recorded


def joint(block, x, y, c):
    """Queries, keys and values of both streams, text first; and the output of block.attend."""
    x_on, y_on = block.x_block.modulation(c)[0], block.context_block.modulation(c)[0]
    image = block.x_block.attn.project(layers.modulate(x, x_on.shift, x_on.scale))
    text = block.context_block.attn.project(layers.modulate(y, y_on.shift, y_on.scale))
    for_image, for_text = block.attend(x, y, x_on, y_on)
    return join_streams(text, image), torch.cat([for_text, for_image], dim=1)


# %% [markdown]
# **PREDICT.** Our prompt has 17 text tokens, 9 from the CLIPs and 8 from T5, and the picture has 16
# patches. How many queries and how many keys are there in the first of the two blocks? And in the
# last, where nobody would read the text output? How far off would the output be without the text?

# %%
guess("...")

# %%
prompt, B = "a bold 3", pick(8, 2)
text, nothing = (pipeline.encode_text([p] * B) for p in (prompt, ""))
clean, noise = pipeline([prompt] * B, seed=1, output="latent"), pipeline.noise(B, 2, (8, 8))


def at(t):
    return interpolate(clean, noise, torch.tensor(t)), torch.tensor(t)


for block, inputs in block_inputs(*at(0.9), *text):
    (q, k, v), attended = joint(block, *inputs)
    torch.testing.assert_close(layers.attention(q, k, v), attended, atol=1e-4, rtol=1e-4)
    image_only = layers.attention(q[:, :, -16:], k[:, :, 17:], v[:, :, 17:])  # image to image
    change = (image_only - attended[:, -16:]).norm() / attended[:, -16:].norm()
    print(f"{q.shape[2]} queries, {k.shape[2]} keys; image without text: off by {change:.0%}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Every token of both streams asks every other: 33 queries and 33 keys. In the last block the text
# has only keys and values. Its output would never be read, so it has no queries. (Official files
# contain weights for them all the same, which no gradient ever reached.) Without the text, the
# attention output of the image tokens would be off by a half or more.
#
# ![Diagram of the last block: text gives keys and values
# only](../nanosd3/assets/pictures/last_block.svg)
#
# </details>
#
# The attention matrix of the first block has four **quadrants**: queries run down, keys run across.
# Look for the image tokens that attend to themselves and to their neighbours, and for dark columns:
# tokens that everybody attends to.


# %%
def attention_weights(t, text):
    """Attention weights (heads, queries, keys) of the two blocks, mean over the samples."""
    projections = [joint(block, *inputs)[0] for block, inputs in block_inputs(*at(t), *text)]
    return [(q @ k.mT / 8).softmax(dim=-1).mean(0) for q, k, _ in projections]


weights = attention_weights(0.9, text)[0]
torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
maps({f"head {h}": weights[h].sqrt() for h in range(2)}, "key: 17 of text, 16 of image", "query",
     "Block 0 at t = 0.9. Queries of text in the upper rows, of image in the lower.",
     "square root of the weight", border=17)  # fmt: skip

# %%
show("joint_attention")


# %%
def joint_attention(q_text, k_text, v_text, q_image, k_image, v_image):
    raise NotImplementedError("your code here")


solved = check("joint_attention", joint_attention)

# %% [markdown]
# If the value of token $i$ is 1 in place $i$ and 0 elsewhere, the output is the weights: your
# function then draws the picture above.

# %%
if solved:
    block, inputs = block_inputs(*at(0.9), *text)[0]
    (q, k, _), _ = joint(block, *inputs)
    ones = torch.eye(64)[:33].expand_as(q)
    parts = [x[:, :, part] for part in (slice(17), slice(17, 33)) for x in (q, k, ones)]
    for_image, for_text = joint_attention(*parts)
    table = torch.cat([for_text, for_image], dim=1).mean(0).view(33, 2, 64)[..., :33].sqrt()
    maps({f"head {h}": table[:, h] for h in range(2)}, "key", "query", "Weights, drawn by you.",
         "square root of the weight", border=17)  # fmt: skip
else:
    print("Solve `joint_attention`, and this cell draws its weights.")

# %% [markdown]
# **PREDICT.** The attention weights of an image token sum to 100%. What share goes to the text, and
# is it larger when the picture is noise (t = 0.9) or when it is nearly done (t = 0.1)?

# %%
guess("...")

# %%
ts = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
weights = {t: attention_weights(t, text) for t in ts}
curves = {
    f"block {b}, head {h}": (ts, [100 * weights[t][b][h, -16:, :17].sum(-1).mean() for t in ts])
    for b in range(2) for h in range(2)
}  # fmt: skip
lines(curves, "t (0 data, 1 noise)", "attention from image to text (%)", "Equal attention "
      "to all 33 tokens would give 52%.")  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# Less than an equal share, and most of it while there is nothing to see. The first block then turns
# to the picture as it takes shape, and hardly hears the words below t = 0.4. The second block gives
# them a tenth to a fifth at all times.
#
# </details>
#
# And which words?

# %%
t5_only = pipeline.encode_text([prompt] * B, drop=("clip_l", "clip_g"))
pieces = [("CLIP", pipeline.text.tokenizers.bpe, 9), ("T5", pipeline.text.tokenizers.unigram, 8)]
labels = []
for name, tokenizer, length in pieces:
    words = [tokenizer.decode([i]) or "(special)" for i in tokenizer.encode(prompt)]
    labels += [f"{name} {word}" for word in words + ["(pad)"] * (length - len(words))]
tables = {}
for name, part in {"all encoders": text, "T5 alone": t5_only}.items():
    shares = [attention_weights(t, part)[0][:, -16:, :17].mean((0, 1)) for t in ts]
    tables[name] = 100 * torch.stack(shares)
maps(tables, "text token", "t", "What the image tokens of block 0 attend to, mean of both heads. "
     "On the right the CLIPs are dropped: their tokens are zeros.", "attention (%)",
     xticks=labels, yticks=ts)  # fmt: skip

# %% [markdown]
# With T5 alone the two words that matter, "bold" and "3", get nearly all the attention that goes to
# the text. With all encoders the attention is spread over the CLIP tokens too, including the
# padding: CLIP reads from left to right, so its later tokens know everything that came before, and
# nobody masks padding.
#
# Attention goes the other way too: the words ask the picture, and are updated as it takes shape.
#
# **PREDICT.** Let us follow one word, T5's token for 3, while a picture forms from noise in 24
# steps. Which of the 16 patches attend to it, and when? And to which patches does it attend?

# %%
guess("...")

# %%
states, keep = [], lambda step, t, z, x0: states.append((t, z[0]))
with attention_seen() as seen:  # all weights that the package computes, block after block
    pipeline([prompt], seed=1, steps=24, sampler="euler", callback=keep)
times, zs = (torch.stack(part) for part in zip(*states, strict=True))
first = torch.stack(seen[::2])[:, 0].mean(1)  # block 0, with the prompt, mean of both heads
looks = {"patches ask 3": first[:, 17:, 11], "3 asks patches": first[:, 11, 17:]}
film(dict.fromkeys(looks, pipeline.decode(zs)), [f"t = {t:.2f}" for t in times],
     "Orange: the weight of the attention. Each side has its own scale.", looks)  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# The patches in the middle, where the strokes will be, ask the word. They do so while there is
# noise; below t = 0.5 hardly any of them does. The word asks the picture all the time, and more and
# more one place in it: the upper left, where a 3 is open and an 8 is closed. (That this is the
# reason is a guess. How would you test it?)
#
# </details>
#
# ## The other way: modulation
#
# The *pooled* text, one vector for the whole prompt, is added to the embedding of the time. From
# the sum $c$ each block computes, with a linear layer, a **shift** $\beta$, a **scale** $\gamma$
# and a **gate** $\alpha$ for each of its two branches. First comes a LayerNorm without weights,
# which subtracts the mean $\mu$ of a token $x$ and divides by its deviation $\sigma$; then come
# scale and shift (DiT, arXiv 2212.09748, section 3.2):
#
# $$m(x) = (1 + \gamma) \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-6}}} + \beta$$
#
# In plain loops, for one sample:


# %%
def modulate_slowly(x, shift, scale):
    rows = []
    for token in x:
        mean = sum(token) / len(token)
        variance = sum((value - mean) ** 2 for value in token) / len(token)
        normed = [(value - mean) / math.sqrt(variance + 1e-6) for value in token]
        rows.append([n * (1 + s) + b for n, s, b in zip(normed, scale, shift, strict=True)])
    return torch.tensor(rows)


x, shift, scale = (torch.randn(size, generator=g) for size in ((2, 3, 8), (2, 8), (2, 8)))
ours = modulate_slowly(x[0], shift[0], scale[0])
torch.testing.assert_close(ours, layers.modulate(x, shift, scale)[0], atol=1e-5, rtol=1e-4)
show("modulate")


# %%
def modulate(x, shift, scale):
    raise NotImplementedError("your code here")


solved = check("modulate", modulate)

# %%
reward(solved, "modulate", patch("nanosd3.mmdit.modulate", modulate))

# %% [markdown]
# ## Words against words
#
# So there are two paths from the prompt to the picture: the tokens of the context, and the pooled
# vector. In this diagram of the block the first comes from the left, the second down the middle:
#
# ![Diagram of a joint block: two streams, one attention, modulation from the
# middle](../nanosd3/assets/pictures/joint_block.svg)
#
# What if they say different things?
#
# **PREDICT.** The context says d, the pooled vector says d + 5. Which digit is drawn? And how well
# does each do without the other?

# %%
guess("...")

# %%
digits = torch.arange(pick(100, 10)) % 10
prompts = [f"the digit {d}" for d in digits]
same, other = pipeline.encode_text(prompts), pipeline.encode_text(prompts[5:] + prompts[:5])
none, start = pipeline.encode_text([""] * len(digits)), pipeline.noise(len(digits), 5, (8, 8))
cases = {
    "both say d": same,
    "context d, pooled d+5": (same[0], other[1]),
    "pooled d alone": (none[0], same[1]),
    "context d of T5 alone": pipeline.encode_text(prompts, drop=("clip_l", "clip_g")),
}
drawn = {}
for name, case in cases.items():
    z = euler(guided(mmdit, case, none, 1.6), start, torch.linspace(1, 0, 16))
    drawn[name] = pipeline.decode(z)[:10]
    seen = torch.tensor(lesson.classify(pipeline.decode(z)))
    print(f"{name:24} classified as d: {(seen == digits).float().mean():.0%}, "
          f"as d + 5: {(seen == (digits + 5) % 10).float().mean():.0%}")  # fmt: skip
images(drawn, "d = 0 to 9, from the same noise.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The pooled vector wins in more than 90 of 100 cases, and alone it does nearly as well as together
# with the context. This is not a law of attention but a result of these captions and this short
# training: which of ten digits, thin or bold, leaning or not, fits into one vector of 96 numbers,
# and a vector that modulates every layer is hard to ignore. A sentence about three cats and a red
# chair does not fit; that is what the context is for. In training T5 was sometimes the only encoder
# left, with a pooled vector of zeros. So the model has learned to use the context alone, though not
# nearly as well (longer training gets further, see the README).
#
# </details>
#
# ## Gates, and a fresh model
#
# A branch $f$, attention or MLP, reads the modulated tokens, and its result goes through the gate
# before it is added:
#
# $$x \leftarrow x + \alpha f(m(x))$$
#
# **PREDICT.** All modulations of a fresh model are zero: zero shift, zero scale, zero gate; and so
# is its last layer. What does it predict for any input, and what is its first loss, for data of
# variance 1? What will training do to the gates?

# %%
guess("...")

# %%
torch.manual_seed(0)
fresh = MMDiT(mmdit.config)
x0 = torch.randn(clean.shape, generator=g)
z, t = interpolate(x0, noise, torch.tensor(0.5)), torch.tensor(0.5)
v = fresh(z, t, *text)
print(f"largest |v|: {v.abs().max():.3f}, loss: {flow_loss(v, x0, noise).mean():.3f}")

times = torch.linspace(0, 1, 21)
c = mmdit.t_embedder(timestep_embedding(times)) + mmdit.y_embedder(text[1][:1])
curves = {
    f"block {b}, {branch}": (times, on.gate.abs().mean(1))
    for b, block in enumerate(mmdit.joint_blocks)
    for branch, on in zip(("attention", "MLP"), block.x_block.modulation(c), strict=True)
}
lines(curves, "t (0 data, 1 noise)", "mean |gate|", f"Gates of the trained model's image stream, "
      f"for {prompt!r}.")  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# It predicts zero, and the loss is 1 + 1 = 2: the variance of the noise and that of the data. With
# gate 0 a block is the identity, and the signal passes unchanged through a network of any depth.
# That is *adaLN-Zero*. Training opens the gates.
#
# ![Diagram of adaLN-Zero: shift, scale and gate of a branch, and the layers that start at
# zero](../nanosd3/assets/pictures/adaln_zero.svg)
#
# </details>

# %%
tokens, words, c = (torch.randn(*size, 128, generator=g) for size in ((2, 16), (2, 17), (2,)))
torch.testing.assert_close(fresh.joint_blocks[0](tokens, words, c), (tokens, words))
show("gated_mlp")


# %%
def gated_mlp(x, shift, scale, gate, w1, b1, w2, b2):
    raise NotImplementedError("your code here")


solved = check("gated_mlp", gated_mlp)

# %%
if solved:
    mlp, curves = fresh.joint_blocks[0].x_block.mlp, {}
    for gate in (0.0, 0.2, 1.0):
        x = [tokens]
        for _ in range(30):
            x.append(gated_mlp(x[-1], 0 * c, 0 * c, 0 * c + gate, *mlp.parameters()))
        curves[f"gate {gate}"] = (range(31), [y.std() for y in x])
    lines(curves, "depth", "deviation of the tokens", "Thirty of your MLPs, one after the other.")
else:
    print("Solve `gated_mlp`, and this cell stacks thirty of them.")

# %% [markdown]
# ## When logits grow
#
# In long training the weights of queries and keys grow, and the logits grow with the product of
# both. At some point the softmax puts all its weight on one token, and learning stops (paper, arXiv
# 2403.03206, section 5.3.2). The 3.5 models (and ours) first divide each query and key by its root
# mean square and multiply it by a learned weight $g$, `RMSNorm`:
#
# $$r(q) = \frac{q}{\sqrt{(q_1^2 + \ldots + q_{64}^2) / 64 + 10^{-6}}} g$$
#
# **PREDICT.** We multiply the weights by 2, 4, 8 and 16. By what factor do the logits grow, with
# and without the norm?

# %%
guess("...")

# %%
normed, plain = mmdit.joint_blocks[0].x_block.attn, Attention(128, qk_norm=False)
plain.qkv.load_state_dict(normed.qkv.state_dict())
bound = 8 * (normed.ln_q.weight * normed.ln_k.weight).abs().max().item()
factors, curves = (1, 2, 4, 8, 16), {}
for name, attn in {"without norm": plain, "with RMSNorm": normed}.items():
    largest = []
    for factor in factors:
        scaled = copy.deepcopy(attn)
        for parameter in scaled.qkv.parameters():
            parameter.mul_(factor)
        q, k, _ = scaled.project(tokens)
        largest.append((q @ k.mT / 8).abs().max().item())
    curves[name] = (factors, largest)
assert max(curves["with RMSNorm"][1]) <= bound
curves["bound"] = (factors, [bound] * 5)
lines(curves, "factor on weights", "largest logit", "Random tokens.", "xy", ticks=factors)

# %% [markdown]
# <details><summary>What happened</summary>
#
# Without the norm, doubling the weights quadruples the logits, since queries and keys both double.
# With the norm nothing changes: before $g$ each query and key has length 8, so no logit can exceed
# the dotted line, 8 times the largest product of the weights $g$ of the two norms.
#
# </details>
#
# ### Exercise: the norm

# %%
show("rms_norm")


# %%
def rms_norm(x, weight):
    raise NotImplementedError("your code here")


solved = check("rms_norm", rms_norm)

# %%
if solved:
    unit = torch.ones(64)
    q, k, _ = plain.project(tokens)
    products = [rms_norm(f * q, unit) @ rms_norm(f * k, unit).mT / 8 for f in factors]
    curves = {"without": (factors, [f * f * (q @ k.mT / 8).abs().max() for f in factors])}
    curves["with your norm"] = (factors, [product.abs().max() for product in products])
    lines(curves, "factor on queries and keys", "largest logit", "Once more, with your norm.", "xy",
          ticks=factors)  # fmt: skip
else:
    print("Solve `rms_norm`, and this cell draws the last figure with it.")

# %% [markdown]
# **Open questions.** Leave out the padding (cut the context to its first tokens): what changes?
# Switch only the context partway, at t = 0.7. Does the attention to "bold" differ between the
# patches of a stroke and those of the background?
#
# ## What was left out
#
# The paper's comparison of this block with others (DiT, cross-attention, UViT, three sets of
# weights): section 5.2.3 and figure 4 of arXiv 2403.03206. The block itself is in section 4 and
# figure 2, QK-norm in section 5.3.2. The second attention of the image stream in SD3.5 medium
# (`dual_attention`) came after the paper.
