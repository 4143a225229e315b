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

import torch
from lab import finish, images, lines, maps, panels, pick, trained

from nanosd3 import layers
from nanosd3.exercises import check, show
from nanosd3.flow import flow_loss, interpolate
from nanosd3.layers import attention, timestep_embedding
from nanosd3.mmdit import Attention, MMDiT, join_streams
from nanosd3.samplers import euler, guided

lesson = trained()
pipeline, mmdit = lesson.pipeline, lesson.pipeline.mmdit
torch.set_grad_enabled(False)  # nothing is trained here
g = torch.Generator().manual_seed(0)

# %%
rows = {prompt: pipeline([prompt] * 8, seed=4) for prompt in ("a thin 3", "a bold 3", "a bold 8")}
images(rows, "Down a column the noise is the same. All differences come from the words.")

# %% [markdown]
# ## Attention
#
# Each token asks all tokens a question (its **query**). Each of them offers a **key**, which says
# what it has, and a **value**, the content itself. The better query and key match, the more of the
# value is taken. One head in plain loops, for vectors of 64 numbers; the package's `attention`
# takes all heads and samples at once:


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
torch.testing.assert_close(attention(q, k, v)[0, :, 64:], second, atol=1e-5, rtol=1e-4)

# %% [markdown]
# ## Two streams, one attention
#
# Image and text are different things, so each has its own weights for computing queries, keys and
# values. If each attended only to itself, no word would ever reach the image. SD3 concatenates the
# tokens of both, text first, and attends once. To reproduce that on real numbers we need the inputs
# of the blocks of the trained model. A forward hook records them and changes nothing.


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
# last, where nobody would read the text output?

# %%
prompt, B = "a bold 3", pick(8, 2)
text, nothing = (pipeline.encode_text([p] * B) for p in (prompt, ""))
clean, noise = pipeline([prompt] * B, seed=1, output="latent"), pipeline.noise(B, 2, (8, 8))


def at(t):
    return interpolate(clean, noise, torch.tensor(t)), torch.tensor(t)


for block, inputs in block_inputs(*at(0.9), *text):
    (q, k, v), attended = joint(block, *inputs)
    torch.testing.assert_close(attention(q, k, v), attended, atol=1e-4, rtol=1e-4)
    image_only = attention(q[:, :, -16:], k[:, :, 17:], v[:, :, 17:])  # image attends to image
    change = (image_only - attended[:, -16:]).norm() / attended[:, -16:].norm()
    print(f"{q.shape[2]} queries, {k.shape[2]} keys; image without text: off by {change:.0%}")

# %% [markdown]
# Without the text, the attention output of the image tokens would be off by about a half.
#
# In the last block the text has only keys and values. Its output would never be read, so it has no
# queries. (Official files contain weights for them all the same; no gradient ever reached those.)
# The attention matrix of the first block has four **quadrants**: queries run down, keys run across.
# Look for the image tokens that attend to themselves and to their neighbours, and for the dark
# columns: a few text tokens that everybody attends to.


# %%
def attention_weights(t, text):
    """Attention weights (heads, queries, keys) of the two blocks, mean over the samples."""
    projections = [joint(block, *inputs)[0] for block, inputs in block_inputs(*at(t), *text)]
    return [(q @ k.mT / 8).softmax(dim=-1).mean(0) for q, k, _ in projections]


weights = attention_weights(0.9, text)[0]
torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
figure, axes = panels(2, 3.6, 3.6)
for head, axis in enumerate(axes):
    heatmap = axis.imshow(weights[head].sqrt(), cmap="gray_r", vmin=0)
    axis.plot([-0.5, 32.5, None, 16.5, 16.5], [16.5, 16.5, None, -0.5, 32.5], "k-", linewidth=0.8)
    axis.set(title=f"head {head}", xlabel="key: 17 of text, 16 of image", ylabel="query")
figure.colorbar(heatmap, ax=axes, label="square root of the weight", shrink=0.8)
finish(figure, "Block 0 at t = 0.9. Queries of text in the upper rows, of image in the lower.")

# %% [markdown]
# **PREDICT.** The attention weights of an image token sum to 100%. What share goes to the text, and
# is it larger when the picture is noise (t = 0.9) or when it is nearly done (t = 0.1)?

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
# The first block, above all its head 0, attends to the words while there is nothing to see and
# turns to the picture as it takes shape. The second block gives the words a sixth to a quarter at
# all times. And which words?

# %%
t5_only = pipeline.encode_text([prompt] * B, drop=("clip_l", "clip_g"))
pieces = [("CLIP", pipeline.text.tokenizers.bpe, 9), ("T5", pipeline.text.tokenizers.unigram, 8)]
labels = []
for name, tokenizer, length in pieces:
    words = [tokenizer.decode([i]) or "(special)" for i in tokenizer.encode(prompt)]
    labels += [f"{name} {word}" for word in words + ["(pad)"] * (length - len(words))]
figure, axes = panels(2, 4.4, 3.4)
for axis, name, part in zip(axes, ("all encoders", "T5 alone"), (text, t5_only), strict=True):
    table = torch.stack([attention_weights(t, part)[0][:, -16:, :17].mean((0, 1)) for t in ts])
    heatmap = axis.imshow(100 * table, cmap="gray_r", aspect="auto", vmin=0, vmax=12)
    axis.set(title=name, xlabel="text token", ylabel="t", yticks=range(len(ts)), yticklabels=ts)
    axis.set_xticks(range(17), labels, rotation=90, fontsize=7)
figure.colorbar(heatmap, ax=axes, label="attention (%)")
finish(figure, "What the image tokens of block 0 attend to, mean of both heads. On the right the "
       "CLIPs are dropped: their tokens are zeros.")  # fmt: skip

threes = {"CLIP's 3": 3, "T5's 3": 11}
tables = {f"{name}, head {h}": 100 * weights[0.5][0][h, token, 17:].view(4, 4)
          for name, token in threes.items() for h in range(2)}  # fmt: skip
maps(tables, "column", "row", "Which of the 4 x 4 patches the token 3 attends to.", "attention (%)")

# %% [markdown]
# With T5 alone the two words that matter, "bold" and "3", get nearly all the attention that goes to
# the text. With all encoders the attention is spread over the CLIP tokens too, including the
# padding: CLIP reads from left to right, so its later tokens know everything that came before, and
# nobody masks padding.
#
# The lower row shows the other direction, text attending to the image (at t = 0.5): the words are
# updated as the picture takes shape. T5's 3 attends to a corner with one head and to the right
# border with the other.
#
# ## The other way: modulation
#
# The *pooled* text, one vector for the whole prompt, is added to the embedding of the time. From
# the sum each block computes a **shift**, a **scale** and a **gate** for each of its two branches.
# A LayerNorm without weights comes first, then scale and shift. In plain loops, for one sample:


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
# The pooled vector wins in 97 of 100 cases, and alone it does as well as together with the context.
# That is no law of attention but a result of these captions and this short training: which of ten
# digits, thin or bold, leaning or not, fits into one vector of 96 numbers, and a vector that
# modulates every layer is hard to ignore. A sentence about three cats and a red chair does not fit;
# that is what the context is for. In training T5 was sometimes the only encoder left, with a pooled
# vector of zeros. So the model has learned to use the context alone, though not nearly as well
# (longer training gets further, see the README).
#
# ## Gates, and why a fresh model predicts zero
#
# **PREDICT.** All modulations of a fresh model are zero: zero shift, zero scale, zero gate. What
# does it predict for any input, and what is its first loss, for data of variance 1?

# %%
torch.manual_seed(0)
fresh = MMDiT(mmdit.config)
x0 = torch.randn(clean.shape, generator=g)
z, t = interpolate(x0, noise, torch.tensor(0.5)), torch.tensor(0.5)
random_end = copy.deepcopy(fresh)
torch.nn.init.xavier_uniform_(random_end.final_layer.linear.weight)
outputs = {"fresh": fresh(z, t, *text), "last layer not zero": random_end(z, t, *text)}
assert outputs["fresh"].abs().max() == 0
print({name: round(flow_loss(v, x0, noise).mean().item(), 2) for name, v in outputs.items()})

tokens, words, c = (torch.randn(*size, 128, generator=g) for size in ((2, 16), (2, 17), (2,)))
torch.testing.assert_close(fresh.joint_blocks[0](tokens, words, c), (tokens, words))

# %% [markdown]
# Zero, and 1 + 1 = 2. A last layer that is not zero starts with noise of its own on top. A block
# adds `gate * branch` to its input; with gate 0 it is the identity, and the signal passes unchanged
# through a network of any depth. That is *adaLN-Zero*. Training opens the gates:

# %%
times = torch.linspace(0, 1, 21)
c = mmdit.t_embedder(timestep_embedding(times)) + mmdit.y_embedder(text[1][:1])
curves = {
    f"block {b}, {branch}": (times, on.gate.abs().mean(1))
    for b, block in enumerate(mmdit.joint_blocks)
    for branch, on in zip(("attention", "MLP"), block.x_block.modulation(c), strict=True)
}
lines(curves, "t (0 data, 1 noise)", "mean |gate|", f"Gates of the image stream for {prompt!r}.")

# %% [markdown]
# ## When logits grow
#
# In long training the weights of queries and keys grow, and the logits grow with the product of
# both. At some point the softmax puts all its weight on one token, and learning stops. The 3.5
# models (and ours) first divide each query and key by its root mean square, `RMSNorm`. A normalised
# vector of 64 numbers has length 8, so no logit can exceed 8 times the largest product of the two
# norms' weights.
#
# **PREDICT.** We multiply the weights by 2, 4, 8 and 16. By what factor do the logits grow, with
# and without the norm?

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
lines(curves, "factor on weights", "largest logit", "Random tokens. Without the norm, doubling the "
      "weights quadruples the logits; with it nothing changes.", "xy")  # fmt: skip

# %% [markdown]
# ## Exercises

# %%
show("rms_norm")


# %%
def rms_norm(x, weight):
    raise NotImplementedError("your code here")


check("rms_norm", rms_norm)

# %%
show("joint_attention")


# %%
def joint_attention(q_text, k_text, v_text, q_image, k_image, v_image):
    raise NotImplementedError("your code here")


check("joint_attention", joint_attention)

# %%
show("modulate")


# %%
def modulate(x, shift, scale):
    raise NotImplementedError("your code here")


check("modulate", modulate)

# %%
show("gated_mlp")


# %%
def gated_mlp(x, shift, scale, gate, w1, b1, w2, b2):
    raise NotImplementedError("your code here")


check("gated_mlp", gated_mlp)

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
