# %% [markdown]
# # 01 · Flow: from noise to data along straight lines
#
# **How can a network turn noise into data when nobody says which noise belongs to which data?**
# With points in the plane the whole idea fits on a page, and you can watch it work. This notebook
# uses only PyTorch and matplotlib until the end, where your code is compared with the functions of
# nanosd3.

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
# Noise on the left, data on the right. We want a *motion* that carries the first cloud into the
# second. We may look at as many points of each as we like, but the points do not come in pairs.


# %%
def clouds(parts, caption):
    """Scatter plots side by side, given as title -> points (n, 2)."""
    figure, axes = plt.subplots(1, len(parts), figsize=(2.4 * len(parts), 2.9), squeeze=False)
    for axis, (title, points) in zip(axes[0], parts.items(), strict=True):
        axis.scatter(*points.T, s=3, color="0")
        axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xlabel="first coordinate", aspect="equal")
    axes[0][0].set_ylabel("second coordinate")
    figure.supxlabel(caption, fontsize=9, style="italic")
    plt.show()


g = torch.Generator().manual_seed(0)
x0, noise = data(800, g), torch.randn(800, 2, generator=g)
clouds({"noise, t = 1": noise, "data, t = 0": x0}, "Where we start and where we want to end.")

# %% [markdown]
# ## A line for every pair
#
# The trick of flow matching is to form the pairs **at random**. Join each data point `x0` to some
# noise by a straight line and let `t` say where on the line we are: 0 at the data, 1 at the noise.
# In plain loops:


# %%
def interpolate_slowly(x0, noise, t):
    z = torch.empty_like(x0)
    for i in range(len(x0)):
        for j in range(x0.shape[1]):
            z[i, j] = (1 - t[i]) * x0[i, j] + t[i] * noise[i, j]
    return z


# %% [markdown]
# and with tensors. `t` has one number per point, so it has to become a column.


# %%
def line(x0, noise, t):
    t = t[:, None]  # (n,) -> (n, 1)
    return (1 - t) * x0 + t * noise


t = torch.rand(800, generator=g)
torch.testing.assert_close(line(x0, noise, t), interpolate_slowly(x0, noise, t))

# %%
snapshots = {f"t = {s}": line(x0, noise, torch.full((800,), s)) for s in (1.0, 0.7, 0.4, 0.0)}
clouds(snapshots, "The cloud of z at four times: mixtures of noise and data.")

# %% [markdown]
# ## What the network learns
#
# Along its line each point moves at a constant velocity, `dz/dt = noise - x0`. The network sees a
# position and a time and has to predict that velocity. But many lines pass through the same place,
# in different directions.
#
# **PREDICT.** A network is trained with the mean square error on lines that cross. What does it
# predict at a crossing?

# %%
figure, axis = plt.subplots(figsize=(4.2, 3.6))
for a, b in zip(x0[:60], noise[:60], strict=True):
    axis.plot(*torch.stack([a, b]).T, color="0.6", linewidth=0.6)
axis.scatter(*x0[:60].T, s=12, color="0", label="data")
axis.scatter(*noise[:60].T, s=12, facecolors="white", edgecolors="0", label="noise")
axis.set(xlabel="first coordinate", ylabel="second coordinate")
axis.legend(frameon=False)
figure.supxlabel("Sixty of the lines. They cross everywhere.", fontsize=9, style="italic")
plt.show()

# %% [markdown]
# The least-squares answer to contradictory targets is their **mean**: at (z, t) the network learns
# `E[noise - x0 | z_t = z]`. That is enough! A cloud that follows the mean velocity has the right
# density at every time, although no single point stays on its line. (This is the theorem behind the
# whole method: Lipman et al., arXiv 2210.02747, theorem 2.)
#
# A small network, whose inputs are the point and a few sines and cosines of the time:


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
# The training loop is all there is to rectified flow: draw data, noise and time; move to that point
# on the line; compare velocities.


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
figure.supxlabel(f"Mean of {window} steps. It stays far above zero.", fontsize=9, style="italic")
plt.show()

# %% [markdown]
# It cannot: the velocities of crossing lines differ, and their variance remains as loss. The loss
# of a flow says little about its samples; only *comparing* two losses at the same t means
# something.
#
# ## Follow the velocity
#
# To sample, start at noise, t = 1, and follow the velocity backwards until t = 0. The time step is
# negative.


# %%
@torch.no_grad()
def sample(net, z, steps):
    path = [z]
    for i in range(steps):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        z = z + (t_next - t) * net(z, torch.full((len(z),), t))
        path.append(z)
    return torch.stack(path)  # (steps + 1, n, 2)


start = torch.randn(800, 2, generator=g)
path = sample(net, start, 50)
clouds({"start": path[0], "halfway": path[25], "end": path[-1], "real data": x0},
       "Fifty Euler steps from noise to data.")  # fmt: skip

# %% [markdown]
# **PREDICT.** The lines we trained on are straight. Are the paths of the samples straight, too?

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
# Two paths cannot cross: at the crossing the velocity would have to have two values at once. Far
# from the data the mean velocity points to the centre of the data; only later does a point move
# towards one of the arcs. Because of that bend, one step is not enough.
#
# ## Against a known answer
#
# For Gaussian data the mean velocity has a closed form, so we can check that all this is right and
# does not just look good. Take data N(m, s^2): at time t the cloud has mean (1 - t) m and variance
# (1 - t)^2 s^2 + t^2, and the velocity that carries it is linear in z.


# %%
def exact_velocity(z, t, m=1.0, s=0.5):
    variance = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) / variance * (z - (1 - t) * m) - m


def error(steps):
    """Largest distance of Euler's end points from m + s noise, where the exact flow ends."""
    z = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    end = 1.0 + 0.5 * z
    for i in range(steps):
        z = z - exact_velocity(z, 1 - i / steps) / steps
    return float((z - end).abs().max())


# %% [markdown]
# **PREDICT.** Euler's method is of first order. If you double the number of steps, what fraction of
# the error remains?

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
# The most common mistake is the sign: in half of the papers t runs from noise to data. Train with
# `x0 - noise` and sample as before.
#
# **PREDICT.** Where will the points go?

# %%
wrong, _ = train(lambda x0, noise: x0 - noise)
strays = sample(wrong, start, 50)[-1]
clouds({"right sign": path[-1], "wrong sign": strays}, "The wrong sign drives the points away.")

# %% [markdown]
# And with too few steps the path cuts the corner.

# %%
few = {f"{n} steps": sample(net, start, n)[-1] for n in (1, 2, 4, 16)}
clouds(few, "One step lands on averages of the data, where there is no data.")

# %% [markdown]
# ## Exercises
#
# Now we import the package: these are three of the functions that you have just read, for data of
# any shape, tested on inputs whose sizes all differ. First a check that the notebook agrees with
# the package:

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
# **Open questions.** *Reflow*: pair each noise with the sample that the trained network makes of
# it, and train again on those pairs. Their lines cross less. Are fewer steps enough then? Or
# replace the straight line by a quarter circle, with `cos` and `sin`: how do the paths change?
#
# ## What was left out
#
# Which times to train at (notebook 02), images instead of points (03 to 05), better solvers (06).
# Rectified flow is sections 2 and 3.1 of the paper, arXiv 2403.03206; the other paths (EDM, cosine,
# LDM-linear) are also in section 2 of the paper, but not in this package.
