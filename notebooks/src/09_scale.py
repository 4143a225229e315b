# %% [markdown]
# # 09 · Scaling, and the real weights
#
# **What changes from a million parameters to eight billion?** In this package: a row of numbers.
# The class that learned MNIST on your laptop, built with another configuration, *is* Stable
# Diffusion 3.5 large. This notebook counts what that costs, trains models of several depths to see
# what it buys, and then opens the official file formats.

# %%
import copy
import os
import shutil
from dataclasses import replace
from unittest.mock import patch

import torch
from lab import CACHE, images, lines, pick, trained
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from nanosd3 import components, layers, weights
from nanosd3.config import CONFIGS, Recipe
from nanosd3.exercises import check, guess, show
from nanosd3.measure import costs
from nanosd3.official import checkpoint, export, key_names
from nanosd3.random_streams import rng
from nanosd3.storage.files import read_tensors
from nanosd3.training.train_flow import train_flow

# %% [markdown]
# ## One dial
#
# A transformer has many sizes: width, heads, layers, the hidden layer of its MLPs. SD3 ties them
# all to one number. **Depth $d$** means $d$ blocks of width $h = 64 d$, with $d$ heads of 64
# features and MLPs four times as wide as the model.
#
# To count eight billion parameters you need not store them. On PyTorch's *meta* device a tensor has
# a shape but no memory: `on_meta` builds any model in a moment.
#
# **PREDICT.** If you double the depth, by what factor does the number of parameters grow?

# %%
guess("...")

# %%
models = {name: components.on_meta(config, "mmdit") for name, config in CONFIGS.items()}
count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
for name, config in CONFIGS.items():
    print(f"{name:18} depth {config.mmdit.depth:2} {count[name]:14,} parameters")
family = ["sd3-d15", "sd3-d18", "sd3-d21", "sd3-medium", "sd3-d30", "sd3-d38"]
d = torch.tensor([CONFIGS[name].mmdit.depth for name in family], dtype=torch.float64)
counted = torch.tensor([count[name] for name in family], dtype=torch.float64)
powers = {f"power {n} of d": (d, counted[0] * (d / 15) ** n) for n in (2, 3, 4)}
lines(powers | {"counted": (d, counted)}, "depth d", "parameters", "From depth 15.", log="xy")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The line is $d^3$. Every matrix grows with the width squared, and there are $d$ blocks of them.
# From 15 to 30 the count grows by 7.99, just below 8, since a few layers around the blocks grow
# more slowly.
#
# </details>
#
# ## Counting by hand
#
# A linear layer from $a$ features to $b$ has $a b$ weights and $b$ biases. Here is the whole
# transformer as a list of such layers, in a plain loop over the blocks, with the two exceptions
# that the code has too: the text stream of the last block has no output, and some models have a
# second attention in the image stream (`dual_attention`). The third entry says what passes through
# the layer; we need it below.


# %%
def linears(config):
    """Every linear layer of an MMDiT: (inputs, outputs, what passes through it)."""
    h, patch = config.width, config.patch_size**2 * config.latent_channels
    yield from [(patch, h, "image"), (config.context_dim, h, "text"), (256, h, "once")]
    yield from [(h, h, "once"), (config.pooled_dim, h, "once"), (h, h, "once")]
    for block in range(config.depth):
        last, dual = block == config.depth - 1, block in config.dual_attention
        yield from [(h, (9 if dual else 6) * h, "once"), (h, (2 if last else 6) * h, "once")]
        for stream in ("image",) if last else ("image", "text"):
            yield from [(h, 3 * h, stream), (h, h, stream)]  # attention: q, k, v, and out
            yield from [(h, 4 * h, stream), (4 * h, h, stream)]  # MLP
        yield from [(h, 3 * h, "image"), (h, h, "image")] * dual
        yield from [(h, 3 * h, "last text")] * last
    yield from [(h, 2 * h, "once"), (h, patch, "image")]


# %%
for name, config in CONFIGS.items():
    size = config.mmdit
    norms = (4 * size.depth + 2 * len(size.dual_attention)) * 64 * size.qk_norm
    by_hand = sum(a * b + b for a, b, _ in linears(size)) + norms
    assert by_hand == count[name] == costs.parameters(size), name

h = 64 * d  # and for the paper's models all at once
formula = (2 * d - 1) * (18 * h**2 + 15 * h) + 9 * h**2 + 6541 * h + 64
torch.testing.assert_close(formula, counted, atol=0, rtol=0)

# %% [markdown]
# Exact to the last parameter, for every configuration from `tiny` to 8B. For the paper's models of
# depth $d$ and width $h$ the sum over all layers is
#
# $$(2 d - 1) (18 h^2 + 15 h) + 9 h^2 + 6541 h + 64$$
#
# A block has two streams of $18 h^2 + 15 h$, each with a modulation, an attention and an MLP. The
# last block has one stream and part of the other; what remains is the layers before and after the
# blocks.
#
# ## What it costs: memory
#
# A parameter takes two bytes in bfloat16, four in float32. Training needs more: float32 weights,
# their gradients, two AdamW moments, and the moving average that we sample from, together
#
# $$4 (1 + 1 + 2 + 1) = 20$$
#
# bytes per parameter before the first activation. (`python train_mnist.py --config sd3-medium` adds
# the memory of the activations (`nanosd3/measure/training_memory.py`) and refuses to start.)
#
# **PREDICT.** You have 16 GB. Which of these could you train: depth 2 (`mnist`), 15, 24
# (`sd3-medium`) or 38 (`sd3.5-large`)? Which could you sample from?

# %%
guess("...")

# %%
print(f"{'GB':12}{'bfloat16':>10}{'float32':>10}{'training':>10}")
for name in ("mnist", "sd3-d15", "sd3-medium", "sd3.5-large"):
    print(f"{name:12}" + "".join(f"{count[name] * size / 1e9:10.3f}" for size in (2, 4, 20)))
for part in ("clip_l", "clip_g", "t5", "vae"):
    n = sum(p.numel() for p in components.on_meta(CONFIGS["sd3.5-large"], part).parameters())
    print(f"{part:12}{2 * n / 1e9:10.3f}{4 * n / 1e9:10.3f}{'frozen':>10}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The 0.5B model trains in 10 GB; the 2B model needs 41 GB, the 8B model 161 GB. Sampling needs
# memory for the largest *part*, not for the sum, because the parts run one after the other; and in
# SD3 medium that is not the transformer but T5, a text encoder more than twice its size.
#
# </details>
#
# ## What it costs: arithmetic
#
# A multiplication and an addition for every weight and every token that passes through it: for $n$
# tokens through a layer from $a$ to $b$, $2 n a b$ operations. Attention has two products for every
# pair of tokens, queries with keys and weights with values: for $n$ queries and $m$ keys of width
# $h$, $4 n m h$. The conditioning is computed once per image.


# %%
def operations(config, patches, words):
    """The number of operations in one forward pass of one image."""
    passes = {"once": 1, "image": patches, "text": words, "last text": words * 2 / 3}  # no queries
    total = sum(2 * passes[stream] * a * b for a, b, stream in linears(config))
    for block in range(config.depth):
        queries = patches if block == config.depth - 1 else patches + words
        total += 2 * 2 * queries * (patches + words) * config.width  # q k^T, weights times v
        total += 2 * 2 * patches**2 * config.width * (block in config.dual_attention)
    return round(total)


for name, config in list(CONFIGS.items())[: pick(None, 2)]:
    size, side = config.mmdit, config.image_size // config.vae.factor
    rows, words = side // size.patch_size, config.text.clip_l.length + config.text.t5.length
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        text = torch.empty(1, words, size.context_dim), torch.empty(1, size.pooled_dim)
        models[name](torch.empty(1, size.latent_channels, side, side), torch.ones(1), *text)
    total = operations(size, rows**2, words)
    assert total == counter.get_total_flops() == costs.forward_flops(size, 1, rows, rows, words)
    print(f"{name:18} {config.image_size:4} pixels: {total:.1e} operations")

# %% [markdown]
# The formula agrees with PyTorch's counter, and with the package's own
# (`nanosd3/measure/costs.py`), to the last operation. A picture of SD3 medium at 1024 pixels takes
# 28 steps with guidance, so 56 forward passes: 5e14 operations. A laptop does about 1e11 per
# second: an hour and a half. The paper's largest training took 5e22: sixteen thousand years.
#
# ## What it buys: one model per depth
#
# The paper trains depths 15 to 38 on the same data for the same 500,000 steps. On a laptop we can
# do the same with depths 1 to 3 and 300 steps, with the same latents, text and batches for all.
# Only the learning rate is $0.02 / d$, because wider layers need smaller steps.
#
# **PREDICT.** Depth 3 has 26 times the parameters of depth 1. After the same 300 steps of 64
# images, is it ahead, or has the small one learned faster?

# %%
guess("...")

# %%
lesson = trained()
pipeline, steps, prompts = lesson.pipeline, pick(300, 4), [f"the digit {i}" for i in range(10)]


def train_depth(depth):
    """Train the flow at another depth, with fewer steps, by the package's own function."""
    config = lesson.job.config
    recipe = Recipe(steps, batch=64, lr=0.02 / depth, warmup=steps // 6, weight_decay=0.0)
    short = replace(config.training, flow=recipe)
    sized = replace(config, mmdit=replace(config.mmdit, depth=depth), training=short)
    job = lesson.new_job(f"depth{depth}", sized)
    return job, train_flow(job, lesson.features)


trainings = {str(depth): train_depth(depth) for depth in pick((1, 2, 3), (1, 2))}
trainings["2, longer"] = lesson.job, pipeline.mmdit  # the model of all notebooks

# %% [markdown]
# We use the paper's measure: the loss on held-out images $x_0$ with noise $\epsilon$ at equally
# spaced times $t_i$, with the same noise for every model. The mean $E$ is over the images:
#
# $$L_i = E | v(z_{t_i}, t_i) - (\epsilon - x_0) |^2, \quad t_i = \frac{2 i + 1}{16}$$
#
# Each run's log ends with it (notebook 05 computes it by hand).

# %%
ts = (torch.arange(8) + 0.5) / 8
loss = torch.tensor([job.run.read_log()[-1]["validation_ema"] for job, _ in trainings.values()])
sizes = [sum(p.numel() for p in model.parameters()) for _, model in trainings.values()]
for depth, n, row in zip(trainings, sizes, loss, strict=True):
    print(f"depth {depth}: {n:9,} parameters, loss {row.mean():.3f}")
millions = [n / 1e6 for n in sizes[:-1]]
lines({"": (millions, loss[:-1].mean(1))}, "million parameters", "held-out loss, mean of 8 times",
      f"Depths 1, 2 and 3 after {steps} steps each.", "x", [0.2, 0.5, 1, 2, 4])  # fmt: skip
lines({f"depth {depth}": (ts, row) for depth, row in zip(trainings, loss, strict=True)},
      "t (0 data, 1 noise)", "held-out loss", "The same, time by time.")  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# At an equal number of *steps* every larger model has a lower loss. Depth helps most in the middle
# of the path, where the content of the image is decided; near t = 0 the noise cannot be predicted,
# by anyone. So far this is the paper's result. But a step at depth 3 costs as much as thirty at
# depth 1.
#
# </details>
#
# A training step counts as three forward passes: the backward pass costs two.
#
# **PREDICT.** Now the same runs plotted against the number of *operations*, together with the model
# of all notebooks: depth 2, 900 steps of 128. Which has the lowest loss in the end?

# %%
guess("...")

# %%
width, curves = pick(30, 2), {}
for depth, (job, model) in trainings.items():
    logged = torch.tensor([entry["loss"] for entry in job.run.read_log("flow")])
    step = 3 * job.config.training.flow.batch * operations(model.config, 16, 17)
    spent = step * torch.arange(width, len(logged) + 1)
    print(f"depth {depth}: {step:.1e} operations per step, {float(spent[-1]):.1e} in total")
    curves[f"d = {depth}"] = (spent, logged.unfold(0, width, 1).mean(1))
lines(curves, "operations", "training loss", f"Means of {width} steps.", log="x")

# %% [markdown]
# <details><summary>What happened</summary>
#
# At an equal number of operations the smaller model leads everywhere: a shallow network that has
# seen more beats a deep one that has only just started. Depth 3 stays behind the long run of depth
# 2 to its end, although by then its own learning rate has decayed and the other's has not. Size
# pays off if there are enough steps to use it, and half a million is a different budget from
# 300. (One seed, and a rule for the learning rate that was not tuned: do not trust the third
# digit.)
#
# </details>
#
# ## The official layout
#
# A checkpoint is a dictionary of names and tensors. The modules of this package use the names of
# the official single files, so that export only has to add a prefix for each part.

# %%
folder = CACHE / "exported"
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir()
model = checkpoint.open_checkpoint(CACHE / "model")
export.export(model, "single", folder / "mnist.safetensors")
single = read_tensors(folder / "mnist.safetensors")
for part, prefix in key_names.PREFIXES.items():
    print(f"{part:7}{sum(name.startswith(prefix) for name in single):4} tensors under {prefix}")
for name, tensor in single.items():
    if "joint_blocks.0.x_block" in name:
        print("   ", name.removeprefix(key_names.PREFIXES["mmdit"]), tuple(tensor.shape))

# %% [markdown]
# Names are the easy half. What neither name nor shape can tell is order. Queries, keys and values
# are one matrix of $3 h$ rows: all of q, then all of k, then all of v, and within each, one head
# after the other. Feature $i$ (0 to 63) of head $k$ of part $p$ (0 for q, 1 for k, 2 for v) is in
# row
#
# $$h p + 64 k + i$$
#
# In plain loops:


# %%
def split_slowly(x, parts):
    B, L, features = x.shape
    out = torch.empty(parts, B, features // parts // 64, L, 64)
    for part in range(parts):
        for head in range(out.shape[2]):
            begin = (part * out.shape[2] + head) * 64
            out[part, :, head] = x[:, :, begin : begin + 64]
    return out


x = torch.randn(2, 5, 3 * 4 * 64, generator=rng("heads"))
torch.testing.assert_close(torch.stack(layers.split_heads(x, 3)), split_slowly(x, 3))


def reward(solved, name, replaced):
    """Draw ten digits while the package uses an answer, or say what the cell would draw."""
    if not solved:
        return print(f"Solve `{name}`, and this cell draws ten digits with it.")
    with replaced:
        images({"digits 0 to 9": pipeline(prompts, seed=1)}, f"Drawn with your `{name}`.")


# %%
show("split_heads")


# %%
def split_heads(x, parts):
    raise NotImplementedError("your code here")


solved = check("split_heads", split_heads)

# %%
reward(solved, "split_heads", patch("nanosd3.mmdit.split_heads", split_heads))

# %% [markdown]
# Another implementation might read the rows as (heads, 3, 64). And diffusers' modules expect
# (scale, shift) from the modulation of the final layer, where the official file has (shift, scale).
# Both mistakes load without a warning.
#
# **PREDICT.** Which of the two is worse?

# %%
guess("...")

# %%
rows = {}
mistakes = {
    "right": ("nothing", None),
    "qkv read by heads": (".qkv.", lambda p: p.unflatten(0, (-1, 3, 64)).transpose(0, 1)),
    "final layer swapped": ("final_layer.adaLN", lambda p: p.unflatten(0, (2, -1)).flip(0)),
}
for name, (part, change) in mistakes.items():
    mmdit = copy.deepcopy(pipeline.mmdit)
    for key, p in mmdit.named_parameters():
        if part in key:
            p.copy_(change(p).reshape(p.shape))
    rows[name] = lesson.pipeline_with(mmdit)(prompts, seed=1)
images(rows, "Two wrong readings of the same file, neither with an error message.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Reading by heads mixes queries with keys and values, and little is left. The swapped halves only
# smudge some digits; you might take the result for a weak model.
#
# </details>

# %%
show("final_layer")


# %%
def final_layer(x, c, w_on, b_on, w, b):
    raise NotImplementedError("your code here")


solved = check("final_layer", final_layer)

# %%
last = pipeline.mmdit.final_layer
learned = [p for part in (last.adaLN_modulation[1], last.linear) for p in (part.weight, part.bias)]
yours = patch.object(last, "forward", lambda x, c: final_layer(x, c, *learned))
reward(solved, "final_layer", yours)

# %% [markdown]
# Another such place is the last block, whose text output nobody uses: it has no text queries. In
# the official file the rows are there all the same, and are never used.

# %%
show("last_joint_attention")


# %%
def last_joint_attention(k_text, v_text, q_image, k_image, v_image):
    raise NotImplementedError("your code here")


solved = check("last_joint_attention", last_joint_attention)


# %%
def attend(q, k, v):
    M = k.shape[2] - q.shape[2]  # words, in the last block; 0 in the others
    parts = k[:, :, :M], v[:, :, :M], q, k[:, :, M:], v[:, :, M:]
    return last_joint_attention(*parts) if M else layers.attention(q, k, v)


reward(solved, "last_joint_attention", patch("nanosd3.mmdit.attention", attend))

# %% [markdown]
# So a table of key names must also record how each tensor itself changes. The package has one such
# table and uses it in both directions: the official names on the left, those of diffusers on the
# right.

# %%
print(key_names.BLOCK, key_names.STEM)
export.export(model, "diffusers", folder / "diffusers")
theirs = read_tensors(folder / "diffusers/transformer/diffusion_pytorch_model.safetensors")
ours = {name.removeprefix(key_names.PREFIXES["mmdit"]): x for name, x in single.items()}
qkv = [theirs[f"transformer_blocks.0.attn.to_{which}.weight"] for which in "qkv"]
assert torch.equal(torch.cat(qkv), ours["joint_blocks.0.x_block.attn.qkv.weight"])
shift, scale = ours["final_layer.adaLN_modulation.1.weight"].chunk(2)
assert torch.equal(theirs["norm_out.linear.weight"], torch.cat([scale, shift]))
for path in (folder / "mnist.safetensors", folder / "diffusers"):
    assert (weights.load(path)(prompts, seed=1) == pipeline(prompts, seed=1)).all()
    print(path.name, "gives the same digits, pixel for pixel")

# %% [markdown]
# ## What SD3.5 medium adds
#
# SD3 medium and SD3.5 medium have the same depth. Comparing their tensors shows every difference.

# %%
pair = ("sd3-medium", "sd3.5-medium")
before, after = (components.shapes(CONFIGS[name], "mmdit") for name in pair)
added = {}
for key, shape in after.items():
    if before.get(key) != shape and not key.endswith(".bias"):
        kind = ".".join(part for part in key.split(".") if not part.isdigit())
        added.setdefault((kind, before.get(key, "none"), shape), []).append(key)
for (kind, old, new), keys in added.items():
    print(f"{len(keys):2} x {kind}: {old} -> {new}")
print(f"{count['sd3.5-medium'] - count['sd3-medium']:,} more parameters")

# %% [markdown]
# So: norms on queries and keys everywhere; in the first 13 blocks a second attention of the image
# tokens to themselves, with a modulation of nine parts instead of six; and a buffer of positions
# for 384 x 384 patches instead of 192 x 192. (Its centre is the same; only its margin grew.) In the
# configuration these are three fields: `qk_norm`, `dual_attention`, `grid`.
#
# ## The real weights
#
# They are not part of this package; their owner asks you to accept a licence first. Once you have a
# file or folder, it takes one command (README.md has more):
#
#     python -m nanosd3.generate "a photo of a cat" --weights PATH --out cat.png
#
# Which model it is, and every size, is read from the shapes. The cell below does the same if the
# environment variable `NANOSD3_WEIGHTS` names a file or folder, with a small image and without T5,
# so that 16 GB are enough for SD3 medium.

# %%
path = os.environ.get("NANOSD3_WEIGHTS")
if path:
    weights.main(["report", path])
    real = weights.load(path)
    size = min(256, real.config.image_size - 2 * real.config.padding)
    cat = real("a photo of a cat", height=size, width=size, steps=12, drop=["t5"], progress=True)
    Image.fromarray(cat[0]).save(folder / "cat.png")
    print("saved", folder / "cat.png")
else:
    print("NANOSD3_WEIGHTS is not set: nothing to load.")

# %% [markdown]
# ## How it is sampled
#
# Sampling visits $N$ times $t_i$, shifted towards noise by $\alpha$ (3 for the official models).
# With the shift $s(u)$ (paper, eq. 23),
#
# $$s(u) = \frac{\alpha u}{1 + (\alpha - 1) u}$$
#
# $$t_i = s\left(1 - \frac{i}{N - 1} (1 - s(0.001))\right)$$
#
# for $i$ from 0 to $N - 1$, and then $t_N = 0$. So the low end is shifted twice.

# %%
show("schedule")


# %%
def schedule(steps, alpha):
    raise NotImplementedError("your code here")


solved = check("schedule", schedule)

# %%
reward(solved, "schedule", patch("nanosd3.request.schedule", schedule))

# %% [markdown]
# **Open questions.** Train depth 1 and depth 2 until their curves are flat: where do they cross? Is
# 0.02 / d a good rule? How many steps of `sd3-d15` could your machine do overnight?
#
# ## What was left out
#
# What makes large training hard beyond counting: many machines, mixed precision, data. The scaling
# study is section 5.3 of the paper, arXiv 2403.03206; it also shows that its validation loss
# correlates with human preference, which no loss here can show. No official weights were available
# when this was written: agreement with diffusers is tested on random weights of the same shapes
# (`tests/official/test_against_diffusers.py`).
