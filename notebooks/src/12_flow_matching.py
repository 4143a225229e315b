# %% [markdown]
# # 12 · Flow matching: other paths, off-the-shelf solvers, likelihood
#
# **Rectified flow joins data and noise by straight lines. What changes if they are joined by other
# curves, and what does not?** Flow matching (Lipman et al., arXiv 2210.02747) learns along any path
# from data to noise. Diffusion is one of them, and Stable Diffusion 3 chose another.
#
# No network is trained here. For a finite data set the best possible one has a closed form, so what
# we see is due to the path and to nothing else.

# %%
import math
from functools import partial
from itertools import pairwise

import torch
from lab import images, lines, pick, ways
from trajectories import arrows, log_density_maps, stops

from nanosd3 import flow, samplers
from nanosd3.claims.fm_straightness import length_over_chord
from nanosd3.claims.records import RESULTS, read_record
from nanosd3.data.mnist import load_images
from nanosd3.exercises import check, guess, show
from nanosd3.related import likelihood, paths, solvers

# %% [markdown]
# ## A path is two functions of time
#
# A path carries data $x_0$ and noise $\epsilon$ to a mixture of both, from data at $t = 0$ to noise
# at $t = 1$:
#
# $$z_t = \alpha(t) x_0 + \sigma(t) \epsilon$$
#
# | path | $\alpha(t)$ | $\sigma(t)$ | |
# | --- | --- | --- | --- |
# | OT | $1 - t$ | $t$ | rectified flow; "optimal transport" in the paper |
# | cosine | $\cos(\pi t / 2)$ | $\sin(\pi t / 2)$ | a quarter of a circle |
# | VP | $e^{-T(t) / 2}$ | $\sqrt{1 - \alpha^2}$ | DDPM in continuous time, $T = 0.1 t + 9.95 t^2$ |
# | VE | $1$ | $0.002 \cdot 40000^t$ | score matching: the image stays, noise is added |
#
# (The paper's $t$ is our $1 - t$.) In loops:


# %%
def place_slowly(x0, noise, alpha, sigma):
    z = torch.empty_like(x0)
    for i in range(len(x0)):
        for k in range(x0.shape[1]):
            z[i, k] = alpha[i] * x0[i, k] + sigma[i] * noise[i, k]
    return z


g = torch.Generator().manual_seed(0)
chosen = torch.randperm(60000, generator=g)[: pick(1000, 50)]
digits = load_images().train_images[chosen].flatten(1) / 127.5 - 1  # (n, 784), in [-1, 1]
noise, t = torch.randn(64, 784, generator=g), torch.rand(3, generator=g)
angle = torch.pi / 2 * t
ours = place_slowly(digits[:3], noise[:3], angle.cos(), angle.sin())
torch.testing.assert_close(ours, paths.PATHS["cosine"].interpolate(digits[:3], noise[:3], t))

# %% [markdown]
# **PREDICT.** A digit at $t = 0.5$ on the four paths, each picture scaled to the same contrast. On
# which path is it easiest to read, on which hardest, and on which two is it equally hard?

# %%
guess("...")

# %%
ts, rows = torch.tensor([0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]), {}
for name, path in paths.PATHS.items():
    c = path.coefficients(ts)
    z = path.interpolate(digits[:1], noise[:1], ts) / (c.alpha**2 + c.sigma**2).sqrt()[:, None]
    rows[name] = z.view(-1, 28, 28)
    print(f"{name:6} noise over image at t = 0.5: {float(c.sigma[3] / c.alpha[3]):.2f}")
images(rows, "One digit and one noise at t = 0.1, 0.3, 0.4, 0.5, 0.6, 0.7 and 0.9.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Easiest on VE, hardest on VP, and equally hard on OT and cosine, where $\alpha = \sigma$. What can
# be read depends on the ratio $\sigma / \alpha$ alone. Every path runs through all ratios, from
# about 0 to about infinity; they differ in *when* they pass each, and in the scale of $z$.
#
# </details>
#
# ## What the network learns
#
# The velocity of one pair is the derivative of the path, and the loss of flow matching is its mean
# square error, as in notebook 01 (equation 9 of the paper; $v_\theta$ is the network, $E$ the mean
# over data, noise and time):
#
# $$u_t = \alpha'(t) x_0 + \sigma'(t) \epsilon, \quad L = E |v_\theta(z_t, t) - u_t|^2$$
#
# ### Exercise: the velocity of a pair

# %%
show("conditional_velocity")


# %%
def conditional_velocity(x0, noise, t):
    raise NotImplementedError("your code here")


solved = check("conditional_velocity", conditional_velocity)

# %%
if solved:
    a, b, steps = torch.randn(8, 2), 2 * torch.randn(8, 2), torch.linspace(0, 1, 25)
    way = torch.stack([paths.PATHS["cosine"].interpolate(a, b, t) for t in steps])
    yours = torch.stack([conditional_velocity(a, b, t) for t in steps])
    arrows(way, yours, "Eight pairs on the cosine path, with your velocities.")
else:
    print("Solve `conditional_velocity`, and this cell draws it along the paths of eight pairs.")

# %% [markdown]
# ## What a perfect network knows
#
# Many pairs pass through the same $z$, and the best answer is the mean of their velocities (theorem
# 2). For a data set of $n$ points $x_i$ that mean can be computed. The noise that leads from $x_i$
# to $z$ is $(z - \alpha x_i) / \sigma$, so $z$ comes from $x_i$ with a probability of
#
# $$w_i \propto \exp(-\frac{|z - \alpha x_i|^2}{2 \sigma^2})$$
#
# With these weights, scaled to sum to 1, the mean of the data is $m$ and that of the velocities is
# $v$:
#
# $$m = \sum_i w_i x_i, \quad v = \alpha' m + \sigma' \frac{z - \alpha m}{\sigma}$$


# %%
def field_slowly(path, points, z, t):
    c, rows = path.coefficients(t), []
    for place in z:
        weights = torch.zeros(len(points))
        for i, x in enumerate(points):
            weights[i] = torch.exp(-(place - c.alpha * x).square().sum() / (2 * c.sigma**2))
        mean = torch.zeros_like(place)
        for weight, x in zip(weights / weights.sum(), points, strict=True):
            mean += weight * x
        rows.append(c.alpha_slope * mean + c.sigma_slope * (place - c.alpha * mean) / c.sigma)
    return torch.stack(rows)


points, z, t = torch.randn(9, 2, generator=g), torch.randn(5, 2, generator=g), torch.tensor(0.6)
for path in paths.PATHS.values():
    package = paths.exact_velocity(path, points)(z, t)
    torch.testing.assert_close(field_slowly(path, points, z, t), package)

# %% [markdown]
# Now take the field of a thousand handwritten digits, which a network trained on these and nothing
# else would learn in the end. We follow it from the same ten noises along three paths.
#
# **PREDICT.** Will the same noise become the same digit on all three? And will these digits be new,
# or are they among the thousand?

# %%
guess("...")

# %%
fields, ends = {}, {}
for name in ("ot", "cosine", "vp"):
    path = paths.PATHS[name]
    fields[name] = paths.exact_velocity(path, digits)
    ts = torch.linspace(1, path.first, pick(100, 10) + 1)
    ends[name] = solvers.midpoint(fields[name], path.prior_std * noise, ts)
nearest = digits[torch.cdist(ends["ot"], digits).argmin(1)]
rows = {f"along {name}": end[:10].view(-1, 28, 28) for name, end in ends.items()}
rows["nearest of the data"] = nearest[:10].view(-1, 28, 28)
images(rows, "Where ten noises lead on three paths.", span=(-1, 1))

# %% [markdown]
# <details><summary>What happened</summary>
#
# The same on all three. Divide $z$ by $\alpha + \sigma$, take $\sigma / (\alpha + \sigma)$ as the
# time, and each of these paths becomes rectified flow's line (nanosd3/related/formulations.py).
# They have the same trajectories, drawn at another scale and followed at another pace.
#
# And none is new: a perfect network returns its data, pixel by pixel. Whatever a trained network
# draws anew, it owes to not being perfect.
#
# </details>
#
# ### Exercise: the field of a data set

# %%
show("marginal_velocity")


# %%
def marginal_velocity(z, t, points):
    raise NotImplementedError("your code here")


solved = check("marginal_velocity", marginal_velocity)

# %%
if solved:
    z, seen = noise[:1], []
    for t, t_next in pairwise(torch.linspace(1, 0.05, 39)):
        v = marginal_velocity(z, t, digits)
        seen.append(torch.cat([z, z - t * v]).view(2, 28, 28))
        z = z + (t_next - t) * v
    rows = dict(zip(("z", "mean of the data"), torch.stack(seen[::5], dim=1), strict=True))
    images(rows, "From t = 1 (left) to t = 0.1, along your field.", span=(-1.5, 1.5))
else:
    print("Solve `marginal_velocity`, and this cell draws a digit with it, step by step.")

# %% [markdown]
# ## How straight is straight?
#
# Divide the length of each trajectory by the distance between its ends: the ratio is 1 for a
# straight line. In loops, for a `way` of shape (steps + 1, n, D):


# %%
def straightness_slowly(way):
    ratios = []
    for i in range(way.shape[1]):
        length = 0.0
        for k in range(len(way) - 1):
            length += float((way[k + 1, i] - way[k, i]).norm())
        ratios.append(length / float((way[-1, i] - way[0, i]).norm()))
    return sum(ratios) / len(ratios)


ts, seen = torch.linspace(1, 0, 9), []
end, package = length_over_chord(fields["ot"], noise[:5], ts)
solvers.midpoint(fields["ot"], noise[:5], ts, lambda i, t, z, x0: seen.append(z))
torch.testing.assert_close(straightness_slowly(torch.stack([*seen, end])), package)

# %% [markdown]
# **PREDICT.** On which of the three paths are the trajectories straightest? Euler's method goes
# straight ahead at each step. On which path will it be nearest to where the field leads, with two
# even steps, with eight, with 64?

# %%
guess("...")


# %%
def rms(x):
    return float(x.square().mean().sqrt())


counts, curves = (2, 4, 8, 16, 32, 64), {}
for name, alpha in (("ot", 1.0), ("cosine", 1.0), ("vp", 1.0), ("ot", 3.0)):
    velocity, first = fields[name], paths.PATHS[name].first
    grids = [flow.shift(torch.linspace(1, first, n + 1), alpha) for n in counts]
    errors = [rms(samplers.euler(velocity, noise, ts) - ends[name]) for ts in grids]
    curves[name if alpha == 1 else f"{name}, shifted by {alpha:g}"] = counts, errors
    _, ratio = length_over_chord(velocity, noise, torch.linspace(1, first, pick(51, 6)))
    print(f"{name:7} length over chord: {ratio:.3f}")
lines(curves, "Euler steps", "error at the end (r.m.s.)", "Against the exact ends.", "x", counts)

# %% [markdown]
# <details><summary>What happened</summary>
#
# OT's trajectories are nearly straight, and with two or four steps it is ahead. From eight steps on
# the three can hardly be told apart, and with 64 VP is best. In a space of 784 dimensions a
# trajectory decides on its digit within a short stretch of $\sigma / \alpha$. A step that is too
# long there leads to another digit, however straight the rest is: with eight steps this happens to
# 12 to 14 of the 64, on each path. What counts is how many steps fall into that stretch. With its
# times shifted towards noise, as SD3 does for large images, OT loses only 5 of 64 in eight steps:
# the same field, no training, other stops. (With three seeds: x-fm-3-steps in nanosd3/claims, where
# the claim that straighter paths need fewer steps is refuted.)
#
# </details>
#
# ## Solvers off the shelf
#
# A velocity field is an ordinary differential equation, for which better methods than Euler's have
# been known for a century. The *midpoint* method tries half a step, asks for the velocity there,
# and takes the whole step along that: with $h = t' - t$,
#
# $$z_{t'} = z_t + h v(z_t + \frac{h}{2} v(z_t, t), t + \frac{h}{2})$$
#
# That takes two evaluations per step and has an error of order $h^2$ instead of $h$. RK4 takes four
# and has $h^4$.


# %%
def half_circles(n):
    angle = torch.rand(n, generator=g, dtype=torch.float64) * torch.pi
    side = torch.rand(n, generator=g) < 0.5
    x, y = torch.where(side, angle.cos(), 1 - angle.cos()), angle.sin()
    return 1.4 * torch.stack([x - 0.5, torch.where(side, y, 0.5 - y) - 0.25], dim=1)


blurred = paths.ProbabilityPath(partial(paths.optimal_transport, sigma_min=0.1))
arcs, start = half_circles(100), torch.randn(200, 2, generator=g, dtype=torch.float64)
velocity, ts = paths.exact_velocity(blurred, arcs), torch.linspace(1, 0, 9, dtype=torch.float64)
z = start
for t, t_next in pairwise(ts):
    half = z + (t_next - t) / 2 * velocity(z, t)
    z = z + (t_next - t) * velocity(half, (t + t_next) / 2)
torch.testing.assert_close(z, solvers.midpoint(velocity, start, ts))

# %% [markdown]
# This field is that of a hundred points on two half circles, each blurred by noise of deviation
# $\sigma_{min} = 0.1$. (The paper's OT path stops there, at $\sigma(0) = \sigma_{min}$. The blur
# makes the density finite, which we shall need.)
#
# **PREDICT.** With 64 evaluations Euler takes 64 steps, midpoint 32, RK4 16. By what factors do
# their errors differ? And who is best with only four evaluations?

# %%
guess("...")

# %%
exact = solvers.rk4(velocity, start, torch.linspace(1, 0, pick(501, 101), dtype=torch.float64))
methods = {"Euler": (samplers.euler, 1), "midpoint": (solvers.midpoint, 2), "RK4": (solvers.rk4, 4)}
budgets, curves = (4, 8, 16, 32, 64, 128, 256), {}
for name, (solver, calls) in methods.items():
    grids = [torch.linspace(1, 0, n // calls + 1, dtype=torch.float64) for n in budgets]
    curves[name] = budgets, [rms(solver(velocity, start, ts) - exact) for ts in grids]
lines(curves, "evaluations", "error at the end (r.m.s.)", "Three solvers.", "xy", budgets)
for name, (_, errors) in curves.items():
    print(f"error with 64 evaluations: {errors[4]:.5f} ({name})")

# %% [markdown]
# <details><summary>What happened</summary>
#
# At 64 evaluations midpoint's error is a fiftieth of Euler's, and RK4's less than a third of that.
# At four evaluations RK4 is the worst: it takes a single step across all of time, and its four
# slopes there have little to do with each other. High order pays once steps are short compared with
# the distances over which the field changes.
#
# </details>
#
# ### Exercise: RK4

# %%
show("rk4")


# %%
def rk4(velocity, z, ts):
    raise NotImplementedError("your code here")


solved = check("rk4", rk4)

# %%
if solved:
    way = [start[:60]]
    for pair in torch.linspace(1, 0, 17, dtype=torch.float64).unfold(0, 2, 1):
        way.append(rk4(velocity, way[-1], pair))
    ways(torch.stack(way), "Sixteen steps of your RK4.")
else:
    print("Solve `rk4`, and this cell follows sixty points with it.")

# %% [markdown]
# Why choose the steps ourselves? Dormand and Prince's method computes each step to two orders at
# once; their difference estimates the error, and the step is made as long as a tolerance allows.
#
# **PREDICT.** Back to the thousand digits. Where between noise and data will the steps be short on
# the OT path, and where on the cosine path?

# %%
guess("...")

# %%
begun, ts = {"OT": [], "cosine": []}, torch.tensor([1.0, 1e-3])
for name, times in begun.items():

    def note(i, t, z, x0, times=times):
        times.append(float(t))

    solvers.dopri5(fields[name.lower()], noise[:16], ts, note, rtol=1e-3, atol=1e-3)
stops(begun, "Where each step of the adaptive solver begins, and how many there are.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# On OT a handful of steps is enough, and the last ones are long: once the digit is decided, the way
# to it is a straight line at constant speed. On the cosine path the same way is an arc, and near
# the data, where the arc has to be followed exactly, the steps get short.
#
# </details>
#
# ## How probable is a point?
#
# The ODE also runs backwards, from a data point to the one noise it comes from. On the way the
# volume around the point grows at the rate of the divergence
#
# $$\nabla \cdot v = \sum_i \frac{\partial v_i}{\partial z_i}$$
#
# and therefore (Chen et al., arXiv 1806.07366; $N$ is the density of the noise)
#
# $$\log p(x_0) = \log N(z_1) + \int_0^1 \nabla \cdot v(z_t, t) dt$$


# %%
def log_density_slowly(velocity, x0, ts, nudge=1e-6):
    found = []
    for z in x0:
        spread = 0.0
        for t, t_next in pairwise(ts):
            v = velocity(z[None], t)[0]
            for i in range(len(z)):
                nudged = z.clone()
                nudged[i] += nudge
                spread += (t_next - t) * (velocity(nudged[None], t)[0, i] - v[i]) / nudge
            z = z + (t_next - t) * v
        found.append(-(z**2).sum() / 2 - len(z) * math.log(2 * math.pi) / 2 + spread)
    return torch.stack(found)


ts = torch.linspace(0, 1, 11, dtype=torch.float64)
ours = log_density_slowly(velocity, arcs[:4], ts)
package = likelihood.log_likelihood(velocity, arcs[:4], ts, solver=samplers.euler)
torch.testing.assert_close(ours, package, rtol=1e-4, atol=1e-4)

# %% [markdown]
# Here the density is known: a Gaussian of deviation 0.1 around each of the hundred points. That is
# a test of flow and likelihood together.
#
# **PREDICT.** For a point on the half circles, which of the two terms is the larger one in absolute
# value, and what is the sign of each?

# %%
guess("...")

# %%
side = torch.linspace(-2.5, 2.5, pick(81, 11), dtype=torch.float64)
grid = torch.cartesian_prod(side, side).flip(1)  # row by row, from the bottom
found = likelihood.log_likelihood(velocity, grid, ts[[0, -1]])
squares = torch.cdist(grid, arcs).square() / (2 * 0.1**2)
known = torch.logsumexp(-squares, 1) - math.log(len(arcs) * 2 * math.pi * 0.1**2)
square = (len(side), len(side))
tables = {"by the flow": found.view(square), "known": known.view(square)}
log_density_maps(tables, 2.5, "Two half circles.")
z = solvers.rk4(velocity, arcs, torch.linspace(0, 1, pick(101, 21), dtype=torch.float64))
prior = likelihood.prior_log_density(z, 1.0).mean()
total = likelihood.log_likelihood(velocity, arcs, ts[[0, -1]]).mean()
print(f"on the half circles: noise {prior:.2f}, divergence {total - prior:.2f}, sum {total:.2f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The two maps agree: a flow knows its density, up to the solver's error. The noise that a point
# comes from has a log density of about -2.5, as noise in the plane has. The divergence adds 2: on
# the way from a blur of 0.1 to noise of 1 the volume grows, so the data were denser by that much.
# For images, with thousands of dimensions, the sum is given in bits per pixel and the divergence
# estimated by random probes: nanosd3/related/likelihood.py.
#
# </details>
#
# ### Exercise: a likelihood

# %%
show("log_likelihood")


# %%
def log_likelihood(A, x0, ts):
    raise NotImplementedError("your code here")


solved = check("log_likelihood", log_likelihood)

# %%
if solved:
    flows = {"turned": [[1.0, -2.0], [2.0, 1.0]], "stretched": [[1.5, 2.0], [0.0, -1.5]]}
    tables = {name: log_likelihood(torch.tensor(A).double(), grid, ts) for name, A in flows.items()}
    tables = {name: table.view(square) for name, table in tables.items()}
    log_density_maps(tables, 2.5, "Your log densities of two linear flows.")
else:
    print("Solve `log_likelihood`, and this cell draws the densities of two linear flows with it.")

# %% [markdown]
# ## And trained networks?
#
# A perfect network has the same trajectories on every path. Real ones do not: what is asked of
# them, and at which noise levels most of the loss lies, changes what they learn. For nanosd3/claims
# small transformers were trained along these paths with three seeds each. The rules that decide
# were written beforehand (notebook 17); these are the verdicts:

# %%
for name in ("x-fm-1", "x-fm-2", "x-fm-4", "x-fm-5", "x-fm-5-order"):
    record = read_record(RESULTS / f"{name}.json")
    print(f"{record['verdict']:10} {record['claim']}")

# %% [markdown]
# **Open questions.** Which path would Euler follow best in four steps on the thousand digits? You
# may choose any $\alpha$ and $\sigma$, which means: any stops in $\sigma / \alpha$. How many digits
# does a *trained* network need until its samples are no longer copies?
#
# ## What was left out
#
# Pairing data and noise so that lines cross less (minibatch optimal transport, arXiv 2302.00482);
# paths with noise on the way; bits per pixel of real images (`python -m nanosd3.claims x-fm-4`).
# Stable Diffusion 3 compares paths and what is asked of the network in sections 2, 3 and 5.1 of its
# paper, arXiv 2403.03206. In code: paths.py, solvers.py and likelihood.py in nanosd3/related.
