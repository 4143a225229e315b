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
from IPython.display import display
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
# These three functions only draw; skip them. In all notebooks data is blue, noise grey, and what a
# network makes of it dark red.

# %%
COLOURS = {"data": "#0072B2", "noise": "#808080", "samples": "#A3004F"}


def finish(figure, caption):
    figure.supxlabel(caption, fontsize=9, style="italic")
    display(figure, metadata={"image/png": {"alt": caption}})  # for who cannot see it
    plt.close(figure)


def clouds(parts, caption):
    """Scatter plots side by side, given as title -> points (n, 2)."""
    figure, axes = plt.subplots(1, len(parts), figsize=(2.4 * len(parts), 2.9), squeeze=False)
    for axis, (title, points) in zip(axes[0], parts.items(), strict=True):
        colour = next((COLOURS[name] for name in COLOURS if name in title), "black")
        axis.scatter(*points.T, s=3, color=colour)
        axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xlabel="first coordinate", aspect="equal")
    axes[0][0].set_ylabel("second coordinate")
    finish(figure, caption)


# %%
def tracks(paths, caption, end):
    """Sixty paths (steps, n, 2) from noise at t = 1 to what is at t = 0."""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    axis.plot(paths[:, :60, 0], paths[:, :60, 1], color="0.6", linewidth=0.6)
    axis.scatter(*paths[-1, :60].T, s=12, color=COLOURS[end], label=f"{end}, t = 0")
    style = {"facecolors": "white", "edgecolors": COLOURS["noise"], "label": "noise, t = 1"}
    axis.scatter(*paths[0, :60].T, s=12, **style)
    axis.set(xlabel="first coordinate", ylabel="second coordinate")
    axis.legend(frameon=False)
    finish(figure, caption)


# %% [markdown]
# ## The question, as a picture
#
# Noise on the left, data on the right. We want a *motion* that carries the first cloud into the
# second. We may look at as many points of each as we like, but the points do not come in pairs.

# %%
g = torch.Generator().manual_seed(0)
x0, noise = data(800, g), torch.randn(800, 2, generator=g)
clouds({"noise, t = 1": noise, "data, t = 0": x0}, "Where we start and where we want to end.")

# %% [markdown]
# ## A line for every pair
#
# The trick of flow matching is to form the pairs **at random**. Join each data point $x_0$ to some
# noise $\epsilon$ by a straight line, and let the time $t$ say where on the line we are, 0 at the
# data and 1 at the noise:
#
# $$z_t = (1 - t) x_0 + t \epsilon$$
#
# (equation 13 of the paper, arXiv 2403.03206). In plain loops:


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
# Along its line each point moves at a constant **velocity**,
#
# $$v = \frac{dz_t}{dt} = \epsilon - x_0$$
#
# The network $v_\theta(z, t)$, with weights $\theta$, sees a position and a time and has to predict
# that velocity. Its loss is the mean square error over data, noise and times:
#
# $$L(\theta) = E | v_\theta(z_t, t) - (\epsilon - x_0) |^2$$
#
# But many lines pass through the same place, in different directions.

# %%
tracks(torch.stack([noise, x0]), "Sixty of the lines.", "data")

# %% [markdown]
# **PREDICT.** What does a network trained with the mean square error predict where lines cross?

# %%
guess_1 = "..."  # write your answer between the quotes, then go on

# %% [markdown]
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
# We draw many lines and keep those that pass close to one place at $t = 0.5$. Here are their
# velocities, and what the network says there.

# %%
place, half = torch.tensor([0.5, 0.5]), torch.full((400_000,), 0.5)
many, others = data(400_000, g), torch.randn(400_000, 2, generator=g)
near = (line(many, others, half) - place).norm(dim=1) < 0.05
velocities = (others - many)[near]


def pair(v):
    return f"({v[0]:.2f}, {v[1]:.2f})"


print(f"{len(velocities)} lines; the first three:", *map(pair, velocities[:3]))
print("their mean:", pair(velocities.mean(0)), "and deviation:", pair(velocities.std(0)))
print("the network:", pair(net(place[None], half[:1])[0]))

# %% [markdown]
# <details><summary>What happened</summary>
#
# The least-squares answer to contradictory targets is their **mean**. At $(z, t)$ the network
# learns the mean velocity $u$ of all lines that pass there:
#
# $$u(z, t) = E[\epsilon - x_0 | z_t = z]$$
#
# That is enough! A cloud that follows $u$ has the right density at every time, although no single
# point stays on its line. (This is the theorem behind the whole method: Lipman et al., arXiv
# 2210.02747, theorem 2.)
#
# </details>
#
# **PREDICT.** Will the loss go to zero?

# %%
guess_2 = "..."

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.8))
window = 30
mean = torch.tensor(losses).unfold(0, window, 1).mean(1)
axis.plot(range(window, len(losses) + 1), mean, color="0")
axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
finish(figure, f"Loss while training (mean square of velocity), mean of {window} steps.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# It cannot: the velocities of crossing lines differ, and their variance remains as loss. The loss
# of a flow says little about its samples; only *comparing* two losses at the same $t$ means
# something.
#
# </details>
#
# ## Follow the velocity
#
# To sample, start at noise, $t = 1$, and follow the velocity backwards until $t = 0$, in steps from
# a time $t$ to the next one $t'$:
#
# $$z_{t'} = z_t + (t' - t) v_\theta(z_t, t)$$
#
# The time step $t' - t$ is negative. This is Euler's method.


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
clouds({"noise": path[0], "halfway": path[25], "samples": path[-1], "real data": x0},
       "Fifty Euler steps from noise to data.")  # fmt: skip

# %% [markdown]
# **PREDICT.** The lines we trained on are straight, and they cross. Are the paths of the samples
# straight? Do they cross?

# %%
guess_3 = "..."

# %%
tracks(path, "Paths of sixty samples.", "samples")

# %% [markdown]
# <details><summary>What happened</summary>
#
# ![A cloud of noise follows the velocity from t = 1 to t = 0 and becomes two interleaved half
# circles](../nanosd3/assets/pictures/moons.svg)
#
# They bend. Two of them cannot be in one place at one time and then part: there the velocity would
# need two values. Far from the data the mean velocity points to the centre of the data; only later
# does a point move towards one of the arcs. Because of that bend, one step is not enough.
#
# </details>
#
# All of it in one drawing, made with the package's functions:
#
# ![A straight line from data to noise and its velocity; lines of random pairs, which cross; paths
# of their mean velocity](../nanosd3/assets/pictures/rectified_flow.svg)
#
# ## Against a known answer
#
# For Gaussian data the mean velocity has a closed form, so we can check that all this is right and
# does not just look good. Take data $N(m, s^2)$, of mean $m$ and deviation $s$. At time $t$ the
# cloud has mean $(1 - t) m$ and variance $\sigma_t^2 = (1 - t)^2 s^2 + t^2$, and the velocity that
# carries it is linear in $z$:
#
# $$u(z, t) = \frac{t - (1 - t) s^2}{\sigma_t^2} (z - (1 - t) m) - m$$


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
# **PREDICT.** If you double the number of Euler steps, what fraction of the error remains?

# %%
guess_4 = "..."

# %%
counts = [10, 20, 40, 80, 160]
errors = [error(n) for n in counts]
figure, axis = plt.subplots(figsize=(5.5, 2.8))
axis.loglog(counts, errors, "k-o", label="measured")
for order, style in ((1, "k:"), (2, "k--")):
    slope = [errors[0] / 2 * (counts[0] / n) ** order for n in counts]
    axis.loglog(counts, slope, style, linewidth=0.8, label=f"order {order}")
axis.set(xlabel="steps", ylabel="error at t = 0", xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend(frameon=False)
finish(figure, "Error of Euler's method, and lines to compare the slope with.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Half of it: Euler's method is of first order. The line of order 2 falls to a quarter each time;
# notebook 06 has methods that follow it. The next cell asserts the factor.
#
# </details>
#
# ## Break it
#
# The most common mistake is the sign: in half of the papers $t$ runs from noise to data. Train with
# $x_0 - \epsilon$ and sample as before.
#
# **PREDICT.** Where will the points go? And where do they end if the sign is right, but you take
# only one step?

# %%
guess_5 = "..."

# %%
assert 1.8 < errors[-2] / errors[-1] < 2.2
wrong, _ = train(lambda x0, noise: x0 - noise)
strays = sample(wrong, start, 50)[-1]
clouds({"right sign": path[-1], "wrong sign": strays}, "Samples after fifty steps.")

# %%
few = {f"steps: {n}": sample(net, start, n)[-1] for n in (1, 2, 4, 16)}
clouds(few, "Right sign, the same start, and fewer steps.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# With the wrong sign the points are driven away from the data; many leave the picture. With one
# step they land on averages of the data, between the arcs, where there is no data: the first
# velocity points there, and nobody looks again.
#
# </details>
#
# ## Exercises
#
# Now we import the package: these are functions that you have just read, for data of any shape,
# tested on inputs whose sizes all differ. First a check that the notebook agrees with the package:

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


solved = check("interpolate", interpolate)

# %%
if solved:
    moments = torch.linspace(1, 0, 6)
    clouds(
        {f"t = {s:.1f}": interpolate(x0, noise, s) for s in moments}, "Your lines, at six times."
    )
else:
    print("Solve `interpolate`, and this cell draws the cloud at six times with it.")

# %%
show("velocity_target")


# %%
def velocity_target(x0, noise):
    raise NotImplementedError("your code here")


solved = check("velocity_target", velocity_target)

# %%
if solved:
    mine, _ = train(velocity_target)
    tracks(sample(mine, start, 50), "From a network trained on your target.", "samples")
else:
    print("Solve `velocity_target`, and this cell trains a network on it and draws its paths.")

# %%
show("flow_loss")


# %%
def flow_loss(velocity, x0, noise):
    raise NotImplementedError("your code here")


solved = check("flow_loss", flow_loss)

# %%
if solved:
    t = torch.arange(800) / 800
    with torch.no_grad():
        per_sample = flow_loss(net(line(x0, noise, t), t), x0, noise)
    figure, axis = plt.subplots(figsize=(5.5, 2.8))
    axis.plot(t, per_sample, ".", color="0.7", markersize=2)
    axis.plot(t.view(20, 40).mean(1), per_sample.view(20, 40).mean(1), "k-o", markersize=4)
    axis.set(xlabel="t (0 data, 1 noise)", ylabel="loss of a sample", ylim=(0, 8))
    finish(figure, "Your loss, sample by sample, and its mean in twenty intervals of t.")
else:
    print("Solve `flow_loss`, and this cell draws at which times the network is good.")

# %% [markdown]
# **Open questions.** *Reflow*: pair each noise with the sample that the trained network makes of
# it, and train again on those pairs. Their lines cross less. Are fewer steps enough then? Or
# replace the straight line by a quarter circle, with `cos` and `sin`: how do the paths change?
#
# ## What was left out
#
# Which times to train at (notebook 02), images instead of points (03 to 05), better solvers (06).
# Rectified flow is in sections 2 and 3 of the paper, arXiv 2403.03206, beside the other paths (EDM,
# cosine, LDM-linear); the package has those in `nanosd3/related/formulations.py`.
