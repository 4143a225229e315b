# %% [markdown]
# # 04 · Joint attention and adaLN-Zero: how words steer pixels
#
# **Image tokens and text tokens are vectors of the same width. How does a word get from one to the
# other?** In this model in two ways: through *joint attention*, where every image token looks at
# every text token, and through *modulation*, where one vector for the whole prompt turns the knobs
# of every layer. This notebook opens a trained model, looks at both, and lets them contradict each
# other.

# %%
import copy
import math

import torch
from lab import finish, images, lines, maps, panels, pick, trained

from nanosd3.exercises import check, show
from nanosd3.flow import flow_loss, interpolate
from nanosd3.layers import attention, modulate, timestep_embedding
from nanosd3.mmdit import Attention, MMDiT, join_streams
from nanosd3.samplers import euler, guided

lesson = trained()
pipeline, mmdit = lesson.pipeline, lesson.pipeline.mmdit
torch.set_grad_enabled(False)  # nothing is trained here
g = torch.Generator().manual_seed(0)

# %%
rows = {prompt: pipeline([prompt] * 8, seed=4) for prompt in ("a thin 3", "a bold 3", "a bold 8")}
images(rows, "Down a column the noise is the same. Everything else is the words' doing.")

# %% [markdown]
# ## Attention
#
# Each token asks a question (its **query**) of all tokens. Each of those holds out a **key**,
# which says what it has to offer, and a **value**, the offer itself. The better query and key
# agree, the more of the value is taken. One head in plain loops, for vectors of 64 numbers, and
# then all heads and samples at once:


# %%
def attention_slowly(queries, keys, values):
    out = []
    for query in queries:
        logits = [float(query @ key) / 8 for key in keys]  # 8: the square root of 64
        shares = [math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]
        out.append(sum(share * value for share, value in zip(shares, values, strict=True)))
    return torch.stack(out)


def attention_here(q, k, v):
    shares = (q @ k.mT / 8).softmax(dim=-1)  # (B, heads, L, S)
    return (shares @ v).transpose(1, 2).flatten(2)  # heads side by side: (B, L, heads * 64)


q, k, v = torch.randn(3, 1, 2, 5, 64, generator=g)  # two heads, five tokens
second = attention_slowly(q[0, 1], k[0, 1], v[0, 1])
torch.testing.assert_close(attention_here(q, k, v)[0, :, 64:], second, atol=1e-5, rtol=1e-4)
torch.testing.assert_close(attention_here(q, k, v), attention(q, k, v), atol=1e-5, rtol=1e-4)

# %% [markdown]
# ## Two streams, one attention
#
# Image and text are different things, so each has weights of its own for making queries, keys and
# values. If each then attended to itself alone, no word would ever reach the image. SD3 lays the
# tokens of both **side by side**, text first, and attends once. To do that on real numbers we need
# what goes into the blocks of the trained model. A forward hook records it and changes nothing.


# %%
def inputs_of(*arguments):
    """Each block, and what goes into it: image tokens, text tokens, conditioning."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda *given: seen.append(given))
             for block in mmdit.joint_blocks]  # fmt: skip
    mmdit(*arguments)
    for hook in hooks:
        hook.remove()
    return seen


def joint(block, x, y, c):
    """Queries, keys and values of both streams, text first; and what block.attend makes."""
    x_on, y_on = block.x_block.modulation(c)[0], block.context_block.modulation(c)[0]
    image = block.x_block.attn.project(modulate(x, x_on.shift, x_on.scale))
    text = block.context_block.attn.project(modulate(y, y_on.shift, y_on.scale))
    for_image, for_text = block.attend(x, y, x_on, y_on)
    return join_streams(text, image), torch.cat([for_text, for_image], dim=1)


# %% [markdown]
# **PREDICT.** Our prompt has 17 text tokens, 9 of the CLIPs and 8 of T5, and the picture has 16.
# How many queries and how many keys meet in the first of the two blocks? And in the last, where
# nobody would read what the text learns?

# %%
prompt, B = "a bold 3", pick(8, 2)
text, nothing = (pipeline.encode_text([p] * B) for p in (prompt, ""))
clean, noise = pipeline([prompt] * B, seed=1, output="latent"), pipeline.noise(B, 2, (8, 8))


def at(t):
    return interpolate(clean, noise, torch.tensor(t)), torch.tensor(t)


for block, given in inputs_of(*at(0.9), *text):
    (q, k, v), taken = joint(block, *given)
    torch.testing.assert_close(attention_here(q, k, v), taken, atol=1e-4, rtol=1e-4)
    alone = attention(q[:, :, -16:], k[:, :, 17:], v[:, :, 17:])  # image tokens see the image
    changed = (alone - taken[:, -16:]).norm() / taken[:, -16:].norm()
    print(f"{q.shape[2]} queries, {k.shape[2]} keys; image without text: off by {changed:.0%}")

# %% [markdown]
# What the image tokens take would be off by about a half, had they not looked at the text.
#
# The last block's text has keys and values only. Its output would never be read, so it has no
# queries. (Official files hold weights for them all the same; no gradient ever reached those.) In
# the first block there are four **quadrants**: who looks (down) at whom (across). Look for the
# image tokens that look at themselves and at their neighbours, and for the columns: a few text
# tokens that everybody looks at.


# %%
def looks(t, text):
    """Attention weights (heads, queries, keys) of the two blocks, mean over the samples."""
    pairs = [joint(block, *given)[0] for block, given in inputs_of(*at(t), *text)]
    return [(q @ k.mT / 8).softmax(dim=-1).mean(0) for q, k, _ in pairs]


weights = looks(0.9, text)[0]
torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
figure, axes = panels(2, 3.6, 3.6)
for head, axis in enumerate(axes):
    drawn = axis.imshow(weights[head].sqrt(), cmap="gray_r", vmin=0)
    axis.plot([-0.5, 32.5, None, 16.5, 16.5], [16.5, 16.5, None, -0.5, 32.5], "k-", linewidth=0.8)
    axis.set(title=f"head {head}", xlabel="key: 17 of text, 16 of image", ylabel="query")
figure.colorbar(drawn, ax=axes, label="square root of the weight", shrink=0.8)
finish(figure, "Block 0 at t = 0.9: text to text, text to image; image to text, image to image.")

# %% [markdown]
# **PREDICT.** Each image token spends 100% of attention. Which part of it goes to the text, and is
# it more when the picture is noise (t = 0.9) or when it is nearly done (t = 0.1)?

# %%
ts = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
seen = {t: looks(t, text) for t in ts}
curves = {
    f"block {b}, head {h}": (ts, [100 * seen[t][b][h, -16:, :17].sum(-1).mean() for t in ts])
    for b in range(2) for h in range(2)
}  # fmt: skip
lines(curves, "t (0 data, 1 noise)", "attention that image gives to text (%)", "An even spread "
      "over all 33 tokens would give 52%.")  # fmt: skip

# %% [markdown]
# The first block, its head 0 above all, listens to the words while there is nothing to see and
# turns to the picture as that takes shape. The second block gives the words a sixth to a quarter
# all the time. And which words?

# %%
alone = pipeline.encode_text([prompt] * B, drop=("clip_l", "clip_g"))
pieces = [("CLIP", pipeline.text.tokenizers.bpe, 9), ("T5", pipeline.text.tokenizers.unigram, 8)]
labels = []
for name, tokenizer, length in pieces:
    words = [tokenizer.decode([i]) or "(mark)" for i in tokenizer.encode(prompt)]
    labels += [f"{name} {word}" for word in words + ["(pad)"] * (length - len(words))]
figure, axes = panels(2, 4.4, 3.4)
for axis, name, given in zip(axes, ("all encoders", "T5 alone"), (text, alone), strict=True):
    table = torch.stack([looks(t, given)[0][:, -16:, :17].mean((0, 1)) for t in ts])
    drawn = axis.imshow(100 * table, cmap="gray_r", aspect="auto", vmin=0, vmax=12)
    axis.set(title=name, xlabel="text token", ylabel="t", yticks=range(len(ts)), yticklabels=ts)
    axis.set_xticks(range(17), labels, rotation=90, fontsize=7)
figure.colorbar(drawn, ax=axes, label="attention (%)")
finish(figure, "What the image tokens of block 0 look at, mean of both heads. On the right the "
       "CLIPs are left out: zeros stand for their tokens.")  # fmt: skip

watched = {"CLIP's 3": 3, "T5's 3": 11}
tables = {f"{name}, head {h}": 100 * seen[0.5][0][h, token, 17:].view(4, 4)
          for name, token in watched.items() for h in range(2)}  # fmt: skip
maps(tables, "column", "row", "Where the token 3 looks among the 4 x 4 patches.", "attention (%)")

# %% [markdown]
# With T5 alone the two words that matter, "bold" and "3", get nearly all that goes to the text.
# With all encoders the attention is spread over the CLIPs' tokens too, the padding included: CLIP
# reads from left to right, so its later tokens know everything said before, and nobody masks
# padding.
#
# The lower row is the other way round, text looking at the image (at t = 0.5): the words are
# rewritten as the picture takes shape. T5's 3 looks with one head at a corner, with the other at
# the right border.
#
# ## The other way: modulation
#
# The *pooled* text, one vector for the whole prompt, is added to the embedding of the time. From
# the sum each block computes, for each of its two branches, a **shift**, a **scale** and a
# **gate**. A LayerNorm without weights comes first, then scale and shift. In plain loops, for one
# sample:


# %%
def modulate_slowly(x, shift, scale):
    rows = []
    for token in x:
        mean = sum(token) / len(token)
        variance = sum((value - mean) ** 2 for value in token) / len(token)
        normed = [(value - mean) / math.sqrt(variance + 1e-6) for value in token]
        rows.append([n * (1 + s) + b for n, s, b in zip(normed, scale, shift, strict=True)])
    return torch.tensor(rows)


def modulate_here(x, shift, scale):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * (1 + scale[:, None]) + shift[:, None]  # (B, D) -> (B, 1, D)


x, shift, scale = (torch.randn(size, generator=g) for size in ((2, 3, 8), (2, 8), (2, 8)))
mine = modulate_here(x, shift, scale)
torch.testing.assert_close(mine[0], modulate_slowly(x[0], shift[0], scale[0]), atol=1e-5, rtol=1e-4)
torch.testing.assert_close(mine, modulate(x, shift, scale), atol=1e-5, rtol=1e-4)

# %% [markdown]
# ## Words against words
#
# Now two ways lead from the prompt to the picture: the tokens of the context, and the pooled
# vector. In a drawing of the block the first comes from the left, the second down the middle:
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
asked = [f"the digit {d}" for d in digits]
said, other = pipeline.encode_text(asked), pipeline.encode_text(asked[5:] + asked[:5])
none, start = pipeline.encode_text([""] * len(digits)), pipeline.noise(len(digits), 5, (8, 8))
cases = {
    "both say d": said,
    "context d, pooled d+5": (said[0], other[1]),
    "pooled d alone": (none[0], said[1]),
    "context d of T5 alone": pipeline.encode_text(asked, drop=("clip_l", "clip_g")),
}
drawn = {}
for name, case in cases.items():
    z = euler(guided(mmdit, case, none, 1.6), start, torch.linspace(1, 0, 16))
    drawn[name] = pipeline.decode(z)[:10]
    read = torch.tensor(lesson.reads(pipeline.decode(z)))
    print(f"{name:24} read as d: {(read == digits).float().mean():.0%}, "
          f"as d + 5: {(read == (digits + 5) % 10).float().mean():.0%}")  # fmt: skip
images(drawn, "d = 0 to 9, from the same noise.")

# %% [markdown]
# The pooled vector wins, in 97 of 100 cases, and alone it does as well as with the context. That
# is no law of attention but a fact about these captions and this short training: which of ten
# digits, thin or bold, leaning or not, fits into one vector of 96 numbers, and a vector that turns
# all knobs is easily heard. A sentence about three cats and a red chair does not fit; that is what
# the context is for. In training T5 was sometimes the only encoder left, with a pooled vector of
# zeros. So the context has learned to do without, though not nearly as well (a longer training
# gets further, see the README).
#
# ## Gates, and why a fresh model says nothing
#
# **PREDICT.** All modulations of a fresh model are zero: zero shift, zero scale, zero gate. What
# is its answer to any input, and what is its first loss, for data of variance 1?

# %%
torch.manual_seed(0)
fresh = MMDiT(mmdit.config)
x0 = torch.randn(clean.shape, generator=g)
z, t = interpolate(x0, noise, torch.tensor(0.5)), torch.tensor(0.5)
open_end = copy.deepcopy(fresh)
torch.nn.init.xavier_uniform_(open_end.final_layer.linear.weight)
answers = {"fresh": fresh(z, t, *text), "last layer not zero": open_end(z, t, *text)}
assert answers["fresh"].abs().max() == 0
print({name: round(flow_loss(v, x0, noise).mean().item(), 2) for name, v in answers.items()})

tokens, words, c = (torch.randn(*size, 128, generator=g) for size in ((2, 16), (2, 17), (2,)))
torch.testing.assert_close(fresh.joint_blocks[0](tokens, words, c), (tokens, words))

# %% [markdown]
# Zero, and 1 + 1 = 2. A last layer that is not zero begins with noise of its own on top. A block
# adds `gate * branch` to its input; with gate 0 it is the identity, and the signal passes a
# network of any depth unharmed. That is *adaLN-Zero*. Training opens the gates:

# %%
times = torch.linspace(0, 1, 21)
c = mmdit.t_embedder(timestep_embedding(times)) + mmdit.y_embedder(text[1][:1])
curves = {
    f"block {b}, {branch}": (times, on.gate.abs().mean(1))
    for b, block in enumerate(mmdit.joint_blocks)
    for branch, on in zip(("attention", "MLP"), block.x_block.modulation(c), strict=True)
}
lines(curves, "t (0 data, 1 noise)", "mean size of the gate", f"Image gates for {prompt!r}.")

# %% [markdown]
# ## When logits grow
#
# In long training the weights of queries and keys grow, and logits grow with the product of both.
# At some point the softmax gives everything to one token, and learning ends. The 3.5 models (and
# ours) divide each query and key by its root mean square first, `RMSNorm`. A normed vector of 64
# has length 8, so no logit can exceed 8 times the largest product of the norms' weights.
#
# **PREDICT.** We multiply the weights by 2, 4, 8 and 16. By what do the logits grow, with and
# without the norm?

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
lines(curves, "factor on weights", "largest logit", "Random tokens. Without the norm twice the "
      "weights give four times the logits; with it nothing changes.", "xy")  # fmt: skip

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
# **Open ends.** Leave out the padding (cut the context to its first tokens): what changes?
# Exchange the context half way only, at t = 0.7. Does the attention to "bold" differ between the
# patches of a stroke and those of the background?
#
# ## What was left out
#
# The paper's comparison of this block with others (DiT, cross-attention, UViT, three sets of
# weights): section 5.2.3 and figure 4 of arXiv 2403.03206. The block itself is its section 4 and
# figure 2, QK-norm its section 5.3.2. The image stream's second attention in SD3.5-medium
# (`dual_attention`) came after the paper.
