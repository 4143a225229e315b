# %% [markdown]
# # 03 · Patches and positions: how a set becomes an image
#
# **A transformer sees a set of tokens, in no order. How can it see an image?** In two steps: the
# latents are cut into patches, one token each, and every token is told its position. This notebook
# does both, then takes each away again and watches what happens to the digits.

# %%
import copy
import math

import torch
import torch.nn.functional as F
from lab import images, lines, maps, pick, trained, turn

from nanosd3 import layers
from nanosd3 import patchify as package
from nanosd3.config import CONFIGS
from nanosd3.data.mnist import to_model
from nanosd3.exercises import check, guess, show
from nanosd3.mmdit import PatchEmbed
from nanosd3.samplers import euler, guided

lesson = trained()
torch.set_grad_enabled(False)  # nothing is trained here
pipeline = lesson.pipeline
digits = to_model(lesson.images.test_images[:8], 28)  # (8, 1, 28, 28) in [-1, 1]
g = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The question, as a picture
#
# Each digit below was cut into 16 patches, which were put back together in a different order. As
# *sets of patches* the two rows are the same. Can you tell from the first which digits they are?

# %%
order = torch.randperm(16, generator=g)
jumbled = package.unpatchify(package.patchify(digits, 7)[:, order], 7, 28, 28)
rows = {"shuffled": jumbled[:, 0], "original": digits[:, 0]}
images(rows, "The same sixteen patches of 7 x 7 pixels in both rows.")

# %% [markdown]
# ## Cutting
#
# A patch of $p \times p$ numbers in $C$ channels becomes one token of $p^2 C$ numbers. Patches are
# numbered row by row, like words on a page. Within a token the order is row $i$, column $j$,
# channel $c$. So for an image $z$ of $H \times W$, the token of the patch in row $r$ and column $s$
# holds
#
# $$x_{r W/p + s, (i p + j) C + c} = z_{c, r p + i, s p + j}$$
#
# In plain loops, for one image of shape (C, H, W):


# %%
def patchify_slowly(x, patch):
    C, H, W = x.shape
    tokens = []
    for row in range(0, H, patch):
        for column in range(0, W, patch):
            token = []
            for i in range(patch):
                for j in range(patch):
                    token += [x[c, row + i, column + j].item() for c in range(C)]
            tokens.append(token)
    return torch.tensor(tokens)  # (N, p*p*C)


# %% [markdown]
# With tensors it is tempting to just reshape: the number of elements is right, and nothing
# complains.
#
# **PREDICT.** What do the tokens of a digit look like if it is cut by `reshape` alone?

# %%
guess("...")

# %%
ways = {"patchify": package.patchify(digits[:1], 7), "reshape alone": digits[:1].reshape(1, 16, 49)}
rows = {name: tokens[0].view(16, 7, 7)[4:12] for name, tokens in ways.items()}
images(rows, "Tokens 4 to 11 of a seven, each drawn as 7 x 7 pixels.", span=(-1, 1))

# %% [markdown]
# <details><summary>What happened</summary>
#
# A reshape never moves a number in memory, and there the rows of the *image* lie one after the
# other: 49 consecutive numbers are almost two rows of pixels. To cut patches, first split both axes
# in two, then bring the two halves that count patches to the front, and only then merge axes.
#
# </details>
#
# Here the package's function is compared with the loops, and then undone. The network ends with
# `unpatchify`, so its last layer must write the numbers of a token in the order that `unpatchify`
# expects.

# %%
x = torch.randn(2, 3, 4, 6, generator=g)  # all sizes different
torch.testing.assert_close(package.patchify(x, 2)[0], patchify_slowly(x[0], 2))
torch.testing.assert_close(package.unpatchify(package.patchify(x, 2), 2, 4, 6), x)
show("patchify")


# %%
def patchify(x, patch):
    raise NotImplementedError("your code here")


solved = check("patchify", patchify)

# %%
if solved:
    tokens = patchify(digits[:1], 7).view(4, 4, 7, 7)
    rows = {f"tokens {4 * r} to {4 * r + 3}": row for r, row in enumerate(tokens)}
    images(rows, "A seven, cut by you.", span=(-1, 1))
else:
    print("Solve `patchify`, and this cell draws the sixteen tokens of a seven.")

# %% [markdown]
# ## Failure one: channels first
#
# The official files store the patch embedding as a convolution, whose weight is ordered (channel,
# row, column), while the output is ordered (row, column, channel). Confuse the two and you get the
# picture below, which shows three digits in three channels. A fine checkerboard pattern in
# generated images is the sign of this mistake.
#
# nanosd3 keeps one order for both directions and permutes the *weight* of the convolution. The last
# assertion shows that its patch embedding is that convolution.

# %%
three = digits[1:4, 0][None]  # (1, 3, 28, 28)
tokens = package.patchify(three, 2)  # (1, 196, 12)
channels_first = tokens.unflatten(2, (3, 4)).mT.flatten(2)  # read as (channel, row and column)
wrong = package.unpatchify(channels_first, 2, 28, 28)
images({"right": three[0], "channels first": wrong[0]}, "Three channels of one image.", cell=1.1)

embed, z = PatchEmbed(channels=4, patch=2, dim=64), torch.randn(2, 4, 8, 6, generator=g)
convolved = F.conv2d(z, embed.proj.weight, embed.proj.bias, stride=2)  # (2, 64, 4, 3)
torch.testing.assert_close(embed(z), convolved.flatten(2).mT, atol=1e-5, rtol=1e-4)

# %% [markdown]
# ## Failure two: rows and columns swapped
#
# Another mistake is to lay out the tokens with the numbers of rows and columns swapped.
#
# **PREDICT.** What does this do to a square image? And to one that is wider than it is high?

# %%
guess("...")


# %%
def misplaced(x):
    height, width = x.shape[2:]
    return package.unpatchify(package.patchify(x, 2), 2, width, height)[0]


wide = torch.cat([*digits[:2]], dim=2)[None]  # (1, 1, 28, 56)
rows = {"from 28 x 28": misplaced(digits[:1]), "from 28 x 56": misplaced(wide)}
images(rows, "One digit, and two side by side, laid out with the numbers exchanged.", cell=1.4)

# %% [markdown]
# <details><summary>What happened</summary>
#
# The square is unharmed. The wide picture becomes a tall one, in which every row of patches is
# split in two. Square images hide swapped axes. That is why the checks here use 4 x 6, and why you
# should test your own code on sizes that all differ.
#
# </details>
#
# ### Exercise: the way back

# %%
show("unpatchify")


# %%
def unpatchify(tokens, patch, height, width):
    raise NotImplementedError("your code here")


solved = check("unpatchify", unpatchify)

# %%
if solved:
    tokens = package.patchify(jumbled, 7)[:, order.argsort()]
    images({"by you": unpatchify(tokens, 7, 28, 28)[:, 0]}, "The puzzle of the first picture.")
else:
    print("Solve `unpatchify`, and this cell puts the shuffled digits together again.")

# %% [markdown]
# ## How large should a patch be?
#
# Smaller patches show more detail and cost more: halving the patch size quadruples the number of
# tokens, and in attention every token looks at every other. With $n$ tokens of image and text, $d$
# blocks of width $D$, and two operations for each multiply-add, a forward pass takes about
#
# $$d (24 n D^2 + 4 n^2 D)$$
#
# operations: linear layers, then attention. For the 2B model at 1024 x 1024 pixels (latents of 128
# x 128):

# %%
config, patches = CONFIGS["sd3-medium"].mmdit, [1, 2, 4, 8, 16]
D, text = config.width, 154
count = torch.tensor([(128 // p) ** 2 + text for p in patches], dtype=torch.float64)
linear = config.depth * count * 24 * D**2 / 1e12
quadratic = config.depth * count**2 * 4 * D / 1e12
curves = {"linear layers": (patches, linear), "attention": (patches, quadratic)}
lines(curves, "patch size p (latents)", "10^12 operations",
      "SD3 uses p = 2: 4,096 image tokens and 154 text tokens.", log="y")  # fmt: skip
for p, total in zip(patches, linear + quadratic, strict=True):
    print(f"p = {p:2}: {total:4.1f} times 10^12 operations")

# %% [markdown]
# ## A set has no order
#
# Attention gives each token a weighted mean of all tokens, and a sum does not depend on the order
# of its terms. So if a permutation $P$ reorders the tokens $x$, the outputs are reordered in the
# same way. Everything else in the transformer treats each token separately, so without positions
# this holds for the whole network $f$, which cannot tell the shuffled digits from the originals:
#
# $$f(P x) = P f(x)$$
#
# To see this, we take a copy of the trained model and set its position buffer to zero.


# %%
q, k, v = torch.randn(3, 1, 2, 16, 64, generator=g)  # two heads, 16 tokens
permuted = layers.attention(q[:, :, order], k[:, :, order], v[:, :, order])
torch.testing.assert_close(permuted, layers.attention(q, k, v)[:, order], atol=1e-5, rtol=1e-4)


def shuffled(z):
    return package.unpatchify(package.patchify(z, 2)[:, order], 2, *z.shape[2:])


def velocity(model, z):
    return model(z, torch.tensor(0.7), *pipeline.encode_text(["8"] * len(z)))


no_positions, z = copy.deepcopy(pipeline.mmdit), pipeline.noise(4, 1, (8, 8))
no_positions.pos_embed.zero_()
for name, model in {"with positions": pipeline.mmdit, "without": no_positions}.items():
    before, after = velocity(model, shuffled(z)), shuffled(velocity(model, z))
    print(f"{name}: largest difference {(before - after).abs().max():.4f}")
torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-3)

# %% [markdown]
# One assertion holds on random numbers, the other on the trained model: this is a property of the
# architecture, not of training. (Text tokens get no positions at all here: their encoders have
# already encoded the order.)
#
# **PREDICT.** What does the model draw when its positions are zero: digits in the wrong places,
# strokes without a digit, or noise?

# %%
guess("...")


# %%
def draw(model, prompts, size=(8, 8), seed=1):
    """Latents for the prompts, sampled in 20 steps with guidance."""
    text, nothing = (pipeline.encode_text(p) for p in (prompts, [""] * len(prompts)))
    start = pipeline.noise(len(prompts), seed, size)
    return euler(guided(model, text, nothing, 1.6), start, torch.linspace(1, 0, pick(21, 4)))


prompts = [f"the digit {i}" for i in range(10)]
rows = {"trained": draw(pipeline.mmdit, prompts), "no positions": draw(no_positions, prompts)}
images({name: pipeline.decode(z) for name, z in rows.items()}, "Same noise and prompts.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Dashes and specks, much the same in all patches, and no digit. Every patch still knows from the
# words what is drawn, and from its own noise a little, but not which part of the digit it is.
#
# </details>
#
# ## Encoding a position as a vector
#
# The two coordinates of a patch become a vector as wide as the tokens, $D$ numbers, which is added
# to them. The plain number would be a poor code: one feature, growing with distance. Instead each
# coordinate $a$ sets the angle of $D/4$ clock hands, from fast to slow, and their sines and cosines
# are the code:
#
# $$e(a) = (\sin \omega_0 a, \ldots, \cos \omega_0 a, \ldots), \quad \omega_k = 10000^{-4 k / D}$$
#
# The column fills the first half of the vector, the row the second. The buffer has $G \times G$
# patches; the middle $S \times S$, the training size, have coordinates from 0 up to $R$. Index $i$
# stands at $a = (i - (G - S) / 2) R / S$ (paper, section 5.3.2). In plain loops:


# %%
def positions_slowly(width, grid, sample, span):
    table, quarter = [], width // 4
    for row in range(grid):
        for column in range(grid):
            code = []
            for index in (column, row):
                coordinate = (index - (grid - sample) / 2) * span / sample
                angles = [coordinate * 10000 ** (-k / quarter) for k in range(quarter)]
                code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(code)
    return torch.tensor([table])  # (1, grid*grid, width)


# %%
for sizes in ((24, 6, 4, 4), (16, 5, 5, 10)):
    torch.testing.assert_close(package.sincos_positions(*sizes), positions_slowly(*sizes))
torch.testing.assert_close(pipeline.mmdit.pos_embed, package.sincos_positions(128, 8, 4, 4))

grid = package.sincos_positions(128, 16, 16, 16).view(16, 16, 128)
features = {f"feature {i}": grid[..., i] for i in (0, 6, 32, 64, 70)}
maps(features, "column", "row", "Five of 128 numbers on a 16 x 16 grid. 0 and 6 are sines of the "
     "column, 32 is a cosine of it, 64 and 70 are sines of the row.", "value")  # fmt: skip

# %% [markdown]
# **PREDICT.** Attention compares tokens by inner products. Take the inner product of the code of
# one position with the codes of all others. What picture do you expect?

# %%
guess("...")

# %%
similarity = {f"row {r}, column {c}": grid @ grid[r, c] / 64 for r, c in ((3, 3), (8, 12))}
maps(similarity, "column", "row", "Inner products with the codes of two positions.", "product / 64")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Near positions have similar codes. The picture is a cross, because the inner product is the sum of
# a column part and a row part. It is darkest, that is, largest, at the position itself. For
# coordinates $a$ and $b$ each part is
#
# $$e(a) \cdot e(b) = \sum_k \cos(\omega_k (a - b))$$
#
# It depends only on the offset, so the same comparison works everywhere in the picture.
#
# </details>
#
# Turn the position, and the span $R$ that the coordinates of the grid run over. How far does a
# position see its neighbours as similar? When do far ones look as similar as near ones?


# %%
def similar(row, column, span):
    codes = package.sincos_positions(128, 16, 16, span).view(16, 16, 128)
    return {"": codes @ codes[row, column] / 64}


turn(similar, lambda x, caption: maps(x, "column", "row", caption, "product / 64", span=(0.4, 1)),
     "Inner products with the code of one position.", [{"span": s} for s in (4, 16, 64)],
     row=(0, 15, 1, 8), column=(0, 15, 1, 5), span=(1, 128, 1, 16))  # fmt: skip

# %% [markdown]
# And if the halves are swapped? Again, nothing fails for a square image. But the model takes rows
# for columns: it lays out the patches mirrored about the diagonal.

# %%
mirrored = copy.deepcopy(pipeline.mmdit)
columns, rows = mirrored.pos_embed.chunk(2, dim=2)
mirrored.pos_embed.copy_(torch.cat([rows, columns], dim=2))
order = torch.arange(16).view(4, 4).mT.flatten()  # `shuffled` is now the mirror
torch.testing.assert_close(
    velocity(mirrored, shuffled(z)), shuffled(velocity(pipeline.mmdit, z)),
    atol=1e-4, rtol=1e-3,
)  # fmt: skip
drawn = draw(mirrored, prompts)
pictures = {"halves exchanged": drawn, "patches mirrored back": shuffled(drawn)}
images({name: pipeline.decode(z) for name, z in pictures.items()}, "Each patch is drawn correctly "
       "but put in the wrong place.")  # fmt: skip

# %%
show("sincos_positions")


# %%
def sincos_positions(width, grid, sample, span):
    raise NotImplementedError("your code here")


solved = check("sincos_positions", sincos_positions)

# %%
if solved:
    located = copy.deepcopy(no_positions)
    located.pos_embed.copy_(sincos_positions(128, 8, 4, 4))
    images({"your positions": pipeline.decode(draw(located, prompts))}, "Order restored.")
else:
    print("Solve `sincos_positions`, and this cell puts them into the model that had none.")

# %% [markdown]
# The network is told the time by the same code. Times run from 0 to 1, too little to turn a clock
# hand, so they are multiplied by 1000 first. The frequencies go down to 1/10000 as above, now in
# 128 steps, and the cosines come first.

# %%
show("timestep_embedding")


# %%
def timestep_embedding(t):
    raise NotImplementedError("your code here")


solved = check("timestep_embedding", timestep_embedding)

# %%
if solved:
    tables = {"cosines": (0, 128), "sines": (128, 256)}
    table = timestep_embedding(torch.arange(101) / 100)
    maps({name: table[:, a:b] for name, (a, b) in tables.items()}, "feature", "100 t",
         "What the network sees of the time, from t = 0 to t = 1.", "value")  # fmt: skip
else:
    print("Solve `timestep_embedding`, and this cell draws the code of all times.")

# %% [markdown]
# ## Other sizes: crop, do not stretch
#
# The buffer is larger than the training pictures: ours has 8 x 8 positions for digits of 4 x 4
# patches. The coordinates of its *central* 4 x 4 run from 0 to 3. A picture of another shape takes
# the central rows and columns of its own size, and the positions outside get coordinates below 0
# and above 3. The alternative is to stretch: spread the coordinates 0 to 3 over more positions.
#
# **PREDICT.** Our model has only ever seen 28 x 28 pixels. We ask it for 28 x 60 and for 60 x 60,
# first with cropped and then with stretched coordinates. What will it draw?

# %%
guess("...")

# %%
numbers = torch.arange(64.0).view(1, 64, 1)
print("positions used by 3 x 6:")
for row in package.centre_crop(numbers, 3, 6).view(3, 6).int():
    print(*row.tolist())
for_square = package.centre_crop(pipeline.mmdit.pos_embed, 4, 4).view(4, 4, 128)
for_wide = package.centre_crop(pipeline.mmdit.pos_embed, 4, 8).view(4, 8, 128)
torch.testing.assert_close(for_wide[:, 2:6], for_square)

stretched, rows = copy.deepcopy(pipeline.mmdit), {}
stretched.pos_embed.copy_(package.sincos_positions(128, 8, 8, 4))  # 0, 0.5, 1, ... 3.5
for name, model in {"cropped": pipeline.mmdit, "stretched": stretched}.items():
    for h, w in ((8, 16), (16, 16)):
        drawn = draw(model, prompts[1:9], (h, w))
        rows[f"{name}, {4 * h - 4} x {4 * w - 4}"] = pipeline.decode(drawn)
images(rows, "The digits 1 to 8 on larger canvases.", cell=0.9)

# %% [markdown]
# <details><summary>What happened</summary>
#
# Cropped: the digit is in the middle, at its usual size. The model has not learned "a digit fills
# the picture" but "this stroke belongs at these coordinates"; beyond them it has seen nothing, and
# draws nothing or a few specks. Stretched: between two known positions there is now a third, and
# strokes are repeated. Neither makes a *larger* digit. That takes training: SD3 is trained at 256
# pixels and then at 1024, with coordinates that are stretched once (64 patches from 0 to 16, a
# quarter of a step each), and it crops for all shapes.
#
# </details>
#
# Patches, tokens and positions in one drawing, with the sizes of our model and of the official one:
#
# ![Diagram of latents cut into patches, tokens and back, and of the position grid with the middle
# that an image takes](../nanosd3/assets/pictures/patches.svg)
#
# ### Exercise: cropping

# %%
show("centre_crop")


# %%
def centre_crop(positions, rows, columns):
    raise NotImplementedError("your code here")


solved = check("centre_crop", centre_crop)


# %%
def on_your_crop(z, t, context, pooled):
    x = pipeline.mmdit.x_embedder(z) + centre_crop(pipeline.mmdit.pos_embed, 4, 8)
    return package.unpatchify(pipeline.mmdit.transform(x, t, context, pooled), 2, 8, 16)


if solved:
    images({"your crop": pipeline.decode(draw(on_your_crop, prompts, (8, 16)))}, "Wide.", cell=0.9)
else:
    print("Solve `centre_crop`, and this cell draws wide pictures with your positions.")

# %% [markdown]
# **Open questions.** Move a digit out of the middle: add a constant to the coordinates of the
# buffer and sample. Does the digit move, by whole patches or by fractions? Zero the position of a
# single token: what is drawn there? Train with the halves swapped (notebook 05): does it matter if
# they are swapped from the start?
#
# ## What was left out
#
# Positions that are learned, or that rotate the queries and keys themselves (RoPE), as in many
# later models; SD3's are fixed. Batching pictures of many shapes (notebook 05). Patches and the 2 x
# 2 embedding are in section 4 of the paper, arXiv 2403.03206; the grid of positions for other sizes
# and shapes is in section 5.3.2.
