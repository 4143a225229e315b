# %% [markdown]
# # 01 · Flow: from noise to data along straight lines
#
# **How can a network turn noise into data when nobody says which noise belongs to which data?**
# On points in the plane the whole idea fits on a page and can be watched. This notebook uses
# PyTorch and matplotlib and nothing of nanosd3 until its end, where what you have written is
# compared with the package's own functions.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

FAST = os.environ.get("NANOSD3_FAST", "") not in ("", "0")
plt.rcParams["figure.constrained_layout.use"] = True
torch.set_num_threads(1)


def data(n, generator):
    """Points (n, 2) on two interleaved half circles."""
    angle = torch.rand(n, generator=generator) * torch.pi
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    points = 1.4 * torch.stack([x, y], dim=1)
    return points + 0.08 * torch.randn(n, 2, generator=generator)


# %% [markdown]
# ## The question, as a picture
#
# On the left noise, on the right data. We want a *motion* that carries the first cloud into the
# second. We may look at as many points of each as we like, but no point comes with a partner.


# %%
def clouds(parts, caption):
    """Scatter plots side by side, each a title -> points (n, 2)."""
    figure, axes = plt.subplots(1, len(parts), figsize=(2.4 * len(parts), 2.9), squeeze=False)
    for axis, (title, points) in zip(axes[0], parts.items(), strict=True):
        axis.scatter(*points.T, s=3, color="0")
        axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xlabel="first coordinate", aspect="equal")
    axes[0][0].set_ylabel("second coordinate")
    figure.supxlabel(caption, fontsize=9, style="italic")
    plt.show()


g = torch.Generator().manual_seed(0)
x0, noise = data(800, g), torch.randn(800, 2, generator=g)
clouds({"noise, t = 1": noise, "data, t = 0": x0}, "Where we start and where we want to be.")

# %% [markdown]
# ## A line for every pair
#
# The trick of flow matching: draw partners **at random**. Join each data point `x0` to some noise
# by a straight line and let `t` say where on the line we are: 0 at the data, 1 at the noise.
# In plain loops:


# %%
def interpolate_slowly(x0, noise, t):
    z = torch.empty_like(x0)
    for i in range(len(x0)):
        for j in range(x0.shape[1]):
            z[i, j] = (1 - t[i]) * x0[i, j] + t[i] * noise[i, j]
    return z


# %% [markdown]
# and with tensors. `t` has one number for each point, so it must become a column.


# %%
def line(x0, noise, t):
    t = t[:, None]  # (n,) -> (n, 1)
    return (1 - t) * x0 + t * noise


t = torch.rand(800, generator=g)
torch.testing.assert_close(line(x0, noise, t), interpolate_slowly(x0, noise, t))

# %%
moments = {f"t = {s}": line(x0, noise, torch.full((800,), s)) for s in (1.0, 0.7, 0.4, 0.0)}
clouds(moments, "The cloud of z at four times. Every one is a mixture of noise and data.")

# %% [markdown]
# ## What the network learns
#
# Along its line each point moves at a constant velocity, `dz/dt = noise - x0`. The network sees
# where a point is and what time it is, and is asked for that velocity. But through one place many
# lines pass, in different directions.
#
# **PREDICT.** Trained by mean squares on lines that cross, what will the network answer at a
# crossing?

# %%
figure, axis = plt.subplots(figsize=(4.2, 3.6))
for a, b in zip(x0[:60], noise[:60], strict=True):
    axis.plot(*torch.stack([a, b]).T, color="0.6", linewidth=0.6)
axis.scatter(*x0[:60].T, s=12, color="0", label="data")
axis.scatter(*noise[:60].T, s=12, facecolors="white", edgecolors="0", label="noise")
axis.set(xlabel="first coordinate", ylabel="second coordinate")
axis.legend(frameon=False)
figure.supxlabel("Sixty of the lines: they cross everywhere.", fontsize=9, style="italic")
plt.show()

# %% [markdown]
# The least-squares answer to contradicting targets is their **mean**: at (z, t) the network learns
# `E[noise - x0 | z_t = z]`. That is enough! A cloud that follows the mean velocity has the right
# density at every time, although no point stays on its line. (This is the theorem behind it all;
# Lipman et al., arXiv 2210.02747, theorem 2.)
#
# A small network: the point, and a few sines and cosines of the time.


# %%
class Velocity(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, z, t):
        angle = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.net(torch.cat([z, angle.sin(), angle.cos()], dim=1))


# %% [markdown]
# The training loop is the whole of rectified flow: draw data, noise and time; go to the place on
# the line; compare velocities.


# %%
def train(target, steps=60 if FAST else 3000):
    torch.manual_seed(0)
    g, net = torch.Generator().manual_seed(1), Velocity()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        x0, noise = data(256, g), torch.randn(256, 2, generator=g)
        t = torch.rand(256, generator=g)
        loss = (net(line(x0, noise, t), t) - target(x0, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, losses


net, losses = train(lambda x0, noise: noise - x0)

# %% [markdown]
# **PREDICT.** Will the loss go to zero?

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.8))
window = 30
mean = torch.tensor(losses).unfold(0, window, 1).mean(1)
axis.plot(range(window, len(losses) + 1), mean, color="0")
axis.set(xlabel="step", ylabel="loss (mean square of velocity)", ylim=(0, None))
figure.supxlabel(f"Mean of {window} steps. It stops far above zero.", fontsize=9, style="italic")
plt.show()

# %% [markdown]
# It cannot: the velocities of crossing lines differ, and their spread remains as loss. A flow's
# loss says little about its samples; only *comparing* two losses at the same t means something.
#
# ## Follow the velocity
#
# To sample, start at noise, t = 1, and walk against the velocity until t = 0. The time step is
# negative.


# %%
@torch.no_grad()
def walk(net, z, steps):
    path = [z]
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        z = z + (t_next - t) * net(z, torch.full((len(z),), t))
        path.append(z)
    return torch.stack(path)  # (steps + 1, n, 2)


start = torch.randn(800, 2, generator=g)
path = walk(net, start, 50)
clouds({"start": path[0], "half way": path[25], "end": path[-1], "real data": x0},
       "Fifty Euler steps from noise to data.")  # fmt: skip

# %% [markdown]
# **PREDICT.** The lines we trained on are straight. Are the paths of samples straight, too?

# %%
figure, axis = plt.subplots(figsize=(4.2, 3.6))
for i in range(60):
    axis.plot(*path[:, i].T, color="0.5", linewidth=0.7)
axis.scatter(*path[-1, :60].T, s=12, color="0", label="end (t = 0)")
axis.scatter(*path[0, :60].T, s=12, facecolors="white", edgecolors="0", label="start (t = 1)")
axis.set(xlabel="first coordinate", ylabel="second coordinate")
axis.legend(frameon=False)
figure.supxlabel("Paths bend, and they never cross.", fontsize=9, style="italic")
plt.show()

# %% [markdown]
# Two paths cannot cross: at a crossing the velocity would have to be two things at once. Far from
# the data the mean points to its centre; only later does a point decide for one of the arcs.
# That bend is why one step is not enough.
#
# ## Against a known answer
#
# For Gaussian data the mean velocity has a closed form, so we can see whether all this is right
# and not only pretty. Data N(m, s^2): at time t the cloud has mean (1 - t) m and variance
# (1 - t)^2 s^2 + t^2, and the velocity that carries it is linear in z.


# %%
def exact_velocity(z, t, m=1.0, s=0.5):
    variance = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) / variance * (z - (1 - t) * m) - m


def error(steps):
    """How far Euler ends from m + s noise, which is where the exact flow ends."""
    z = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    end = 1.0 + 0.5 * z
    for i in range(steps):
        z = z - exact_velocity(z, 1 - i / steps) / steps
    return float((z - end).abs().max())


# %% [markdown]
# **PREDICT.** Euler's method is of first order. Twice the steps leave how much of the error?

# %%
counts = [10, 20, 40, 80, 160]
errors = [error(n) for n in counts]
figure, axis = plt.subplots(figsize=(5.5, 2.8))
axis.loglog(counts, errors, "k-o", label="measured")
axis.loglog(counts, [errors[0] * counts[0] / n for n in counts], "k:", label="halved each time")
axis.set(xlabel="steps", ylabel="error at t = 0", xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend(frameon=False)
figure.supxlabel("Twice the steps, half the error.", fontsize=9, style="italic")
plt.show()
assert 1.8 < errors[-2] / errors[-1] < 2.2

# %% [markdown]
# ## Break it
#
# The commonest mistake is the sign: half of the papers let t run from noise to data. Train with
# `x0 - noise` and walk as before.
#
# **PREDICT.** Where will the points go?

# %%
wrong, _ = train(lambda x0, noise: x0 - noise)
lost = walk(wrong, start, 50)[-1]
clouds({"right sign": path[-1], "wrong sign": lost}, "The wrong sign drives points away.")

# %% [markdown]
# And too few steps: the bend is cut off.

# %%
few = {f"{n} steps": walk(net, start, n)[-1] for n in (1, 2, 4, 16)}
clouds(few, "One step lands on averages of the data, where no data is.")

# %% [markdown]
# ## Exercises
#
# Only now the package: these are the four functions that you have just read, for data of any
# shape, checked on cases with all sizes different. First, that the notebook told the truth:

# %%
import sys

sys.path.insert(0, os.path.abspath(".."))

from nanosd3 import flow
from nanosd3.exercises import check, show

torch.testing.assert_close(line(x0, noise, t), flow.interpolate(x0, noise, t))
show("interpolate")


# %%
def interpolate(x0, noise, t):
    raise NotImplementedError("your code here")


check("interpolate", interpolate)

# %%
show("flow_loss")


# %%
def flow_loss(velocity, x0, noise):
    raise NotImplementedError("your code here")


check("flow_loss", flow_loss)

# %%
show("euler")


# %%
def euler(velocity, z, ts):
    raise NotImplementedError("your code here")


check("euler", euler)

# %% [markdown]
# **Open ends.** *Reflow*: pair each noise with the sample that the trained network makes of it,
# and train again on those pairs. Their lines cross less. Are fewer steps enough then? Or replace
# the straight line by a quarter circle, `cos` and `sin`: what changes in the paths?
#
# ## What was left out
#
# Which times to train at (notebook 02), images instead of points (03 to 05), better ways to walk
# (06). Rectified flow is section 2 and 3.1 of the paper, arXiv 2403.03206; its other paths (EDM,
# cosine, LDM-linear) are in the paper's section 2 as well and not in this package.
