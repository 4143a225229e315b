# %% [markdown]
# # 17 · Claims: what the paper says, and what two cores say
#
# **A paper says that its method is the best. How could you find out, with two cores and an
# afternoon?** Not whether it is the best for images of a million pixels: that takes a cluster. But
# whether the reason that is given holds where you can look at it, and how many runs it takes to say
# so.
#
# The folder nanosd3/claims holds such experiments on the papers of this book. This notebook reads
# their records, looks at how they decide, and ends with an experiment of your own. It trains a few
# small networks on points in the plane, nothing else.

# %%
import itertools
import textwrap
from collections import Counter

import torch
from evidence import bars_and_line, by_seed, pairs, two_scores, who_beats_whom
from lab import images, lines, pick
from torch import nn

from nanosd3 import flow, samplers
from nanosd3.claims import experiment, sd3_middle, sd3_ranks
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.page import committed
from nanosd3.data.mnist import load_images
from nanosd3.exercises import check, guess, show
from nanosd3.related import paths
from nanosd3.related.formulations import FORMULATIONS

# %%
records = committed(EXPERIMENTS)
about_sd3 = {name: record for name, record in records.items() if name.startswith("x-sd3")}
for name, record in about_sd3.items():
    print(textwrap.fill(f"{name}: {record['claim']}", 100, subsequent_indent="    "))

# %% [markdown]
# These are claims of the paper of Stable Diffusion 3 (arXiv 2403.03206) and of its announcement,
# each in a sentence that can turn out false. Many were tried on a transformer of one block, for 600
# steps on handwritten digits, with three seeds.
#
# **PREDICT.** How many of them are supported, how many refuted, how many remain undecided? Which
# one are you surest of?

# %%
guess("...")

# %%
counts = Counter(record["verdict"] for record in about_sd3.values())
print(", ".join(f"{count} {word}" for word, count in counts.items()))
for name, record in about_sd3.items():
    print(f"{record['verdict']:10} {name}")
best = records["x-sd3-formulations"]
for part in ("claim", "measured", "rule"):
    print(textwrap.fill(f"{part}: {best[part]}", 100))

# %% [markdown]
# <details><summary>What happened</summary>
#
# A refuted claim is not a wrong paper. It says that at this size, on this data, with this measure,
# the rule said no. That is worth knowing: a reason that is a matter of principle should hold for
# small networks, too, and one that does not must depend on something. nanosd3/claims/README.md says
# for each what that may be.
#
# </details>
#
# ## One seed
#
# The second claim compares eight formulations, that is, what the network is asked and at which
# times (section 3.1). A rank says how good each is over eight settings; 1 is best.
#
# **PREDICT.** With seed 0, EDM's formulation, edm(0, 0.6), comes second of eight. What rank will it
# have with seed 1? And how many of the others change places?

# %%
guess("...")

# %%
ranks = best["results"]["ranks"]["all"]
by_seed(ranks, "average rank", "Three seeds; edm(0, 0.6) in green.", "edm(0, 0.6)")

# %% [markdown]
# <details><summary>What happened</summary>
#
# It falls to the middle, behind five others. Only the first and the last two keep their places.
# With only one seed, the page would praise EDM, and nothing on it would look wrong.
#
# </details>
#
# ## A rule
#
# So the difference of two methods has to be compared with what another seed changes. Seed $i$ means
# the same data and noise for both, so take differences seed by seed. With losses $a_i$ of the
# method that is claimed to be better and $b_i$ of the other, for $n$ seeds, the mean $m$ and the
# spread $s$ are:
#
# $$d_i = b_i - a_i, \quad m = \frac{1}{n} \sum_i d_i$$
#
# $$s^2 = \frac{1}{n - 1} \sum_i (d_i - m)^2$$
#
# Most rules here ask for a mean $m$ above the spread $s$. In loops:


# %%
def lead_slowly(better, worse):
    differences = []
    for a, b in zip(better, worse, strict=True):
        differences.append(b - a)
    mean = 0.0
    for d in differences:
        mean += d / len(differences)
    square = 0.0
    for d in differences:
        square += (d - mean) ** 2 / (len(differences) - 1)
    return mean, square**0.5


others = dict(ranks)
choice = others.pop("rf/lognorm(0, 1)")
for name, theirs in others.items():
    m, s = lead_slowly(choice, theirs)
    torch.testing.assert_close((m, s), experiment.lead(choice, theirs))
    print(f"SD3's choice leads {name:17} by {m:5.2f}, spread {s:.2f}")

# %% [markdown]
# ### Exercise: the verdict

# %%
show("verdict")


# %%
def verdict(better, worse):
    raise NotImplementedError("your code here")


solved = check("verdict", verdict)

# %%
if solved:
    words = ["refuted", "undecided", "supported"]
    rows = [torch.tensor(each) for each in ranks.values()]
    signs = torch.tensor([[words.index(verdict(a, b)) - 1 for b in rows] for a in rows])
    caption = "By your rule. Black: the row beats the column; white: it loses; grey: undecided."
    who_beats_whom(signs, list(ranks), caption)
else:
    print("Solve `verdict`, and this cell draws who beats whom among the eight by your rule.")

# %% [markdown]
# ## How often is a rule wrong?
#
# Compare a method with *itself*, under two names, with different random numbers: whatever a rule
# then decides is wrong. We can do this ten thousand times without training anything, because all
# that enters are the differences $d_i$, which are then normal numbers around 0.
#
# **PREDICT.** With three seeds, how often does each of these rules find a difference where there is
# none? (1) the means differ; (2) all seeds agree; (3) $|m| > s$. How many seeds does (3) need to be
# wrong in only one study of twenty?

# %%
guess("...")

# %%
g, seeds = torch.Generator().manual_seed(0), (2, 3, 4, 5, 6, 8, 10)
wrong = {"the means differ": [], "all seeds agree": [], "mean above spread": []}
for n in seeds:
    d = torch.randn(10_000, n, generator=g)
    wrong["the means differ"].append((d.mean(1) != 0).double().mean())
    wrong["all seeds agree"].append(((d > 0).all(1) | (d < 0).all(1)).double().mean())
    wrong["mean above spread"].append((d.mean(1).abs() > d.std(1)).double().mean())
lines({rule: (seeds, shares) for rule, shares in wrong.items()}, "seeds",
      "share of studies that decide", "A method against itself.", ticks=seeds)  # fmt: skip
for rule, shares in wrong.items():
    print(f"with three seeds: {rule} in {shares[1]:.0%} of the studies")

# %% [markdown]
# <details><summary>What happened</summary>
#
# The first rule always decides. The other two are wrong in about a quarter of all studies with
# three seeds; the spread of three numbers is itself a poor estimate. It takes seven seeds for the
# third to be wrong in fewer than one of twenty.
#
# So a single verdict of this folder is weak evidence. Most rules there ask for more: the same sign
# against every competitor, at every number of steps, on both fields. A rule that is chosen after
# looking at the results is worth little, however many seeds there are: LOG.md says which rules were
# corrected after a first run, and why.
#
# </details>
#
# ## A claim with a mechanism
#
# SD3 draws $t$ from logit-normal(0, 1) because, it says, the velocity is more difficult to predict
# in the middle (section 3.1). That cannot be read from the loss, which also contains what nobody
# can predict. x-sd3-middle takes a network's loss after 150 training steps, minus its loss after
# 900 on the same images and noise: what is *left to learn*. Both were trained on times drawn
# evenly, so that neither has practised the middle more.
#
# **PREDICT.** Sketch three curves over $t$: the loss after 150 steps, the loss after 900, and their
# difference.

# %%
guess("...")

# %%
middle = records["x-sd3-middle"]["results"]
early, late, left = (torch.tensor(middle[k]).mean(0) for k in ("early", "late", "left_to_learn"))
curves = {"after 150 steps": early, "after 900 steps": late, "left to learn": left}
lines({name: (middle["times"], y) for name, y in curves.items()}, "t (0 data, 1 noise)",
      "loss (mean square of velocity)", "On held-out digits, mean of three seeds.")  # fmt: skip

# %% [markdown]
# <details><summary>What happened</summary>
#
# After 900 steps the loss is *lowest* just past the middle; near the data most of it is noise,
# hidden behind the image. What is left to learn is largest in the middle and small near the data.
# Both are true, and the claim is about the second.
#
# </details>
#
# ### Exercise: where the training time goes

# %%
show("share_of_draws")


# %%
def share_of_draws(edges):
    raise NotImplementedError("your code here")


solved = check("share_of_draws", share_of_draws)

# %%
drawn = flow.logit_normal(torch.rand(100_000, generator=g))
counted = torch.histc(drawn, 8, 0, 1) / len(drawn)
package = torch.tensor([sd3_middle.share_of_draws(i / 8, (i + 1) / 8) for i in range(8)])
torch.testing.assert_close(counted, package, atol=0.01, rtol=0)
if solved:
    shares = share_of_draws(torch.linspace(0, 1, 9))
    bars_and_line(middle["times"], shares, left, "Your shares, and what is left to learn.")
else:
    print("Solve `share_of_draws`, and this cell draws its bars beside what is left to learn.")

# %% [markdown]
# ## Two scores at once
#
# Are samples that the classifier reads as asked better than samples whose features are nearer to
# those of real digits? The paper does not weigh one against the other: it sorts methods into fronts
# (section 5.1). No other method beats those of the first front in both scores. In loops:


# %%
def first_front_slowly(scores):
    unbeaten = []
    for i, (accuracy, distance) in enumerate(scores):
        beaten = False
        for a, d in scores:
            beaten |= a >= accuracy and d <= distance and (a, d) != (accuracy, distance)
        if not beaten:
            unbeaten.append(i)
    return unbeaten


pixels = records["x-sd3-pixels"]["results"]
names, many = list(pixels["scores"]), pixels["settings"].index(["many", 1.0, "average"])
scores = torch.tensor([pixels["scores"][name][many] for name in names]).mean(1)  # over seeds
rows = [tuple(row) for row in scores.tolist()]
package = [i for i, front in enumerate(sd3_ranks.fronts(rows)) if front == 1]
assert first_front_slowly(rows) == package
for name, (accuracy, distance) in zip(names, rows, strict=True):
    print(f"{name:17} {accuracy:6.1%} read as asked, Frechet ratio {distance:.1f}")

# %% [markdown]
# **PREDICT.** Those were networks that draw pixels, in 50 steps. From the numbers: which ones make
# up the first front, and how many fronts are there?

# %%
guess("...")

# %%
print("first front:", ", ".join(names[i] for i in first_front_slowly(rows)))
two_scores(scores, names, "Formulations of pixels, 50 steps.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# Two are in the first front: v/cos, which is read best, and rf/mode(1.29), whose features are
# nearest to those of real digits. There are six fronts; two share the third, and each of the others
# has one member. On the digits' latents v/cos is alone in front everywhere.
#
# </details>
#
# ### Exercise: all fronts

# %%
show("fronts")


# %%
def fronts(scores):
    raise NotImplementedError("your code here")


solved = check("fronts", fronts)

# %%
if solved:
    two_scores(scores, names, "Lines join the members of a front.", fronts(scores).tolist())
else:
    print("Solve `fronts`, and this cell joins the members of each front in the picture above.")

# %% [markdown]
# ## What differs in the winner
#
# On these digits v-prediction with the cosine schedule (v/cos) is ahead of rectified flow. Yet
# the two are close relatives. Seen on rectified flow's line $z = (1 - t) x_0 + t \epsilon$, v/cos
# asks its network for
#
# $$v = \frac{(1 - t) \epsilon - t x_0}{n}, \quad n = \sqrt{(1 - t)^2 + t^2}$$
#
# where rectified flow asks for $\epsilon - x_0$. Together with $z$ each determines the other.
#
# **PREDICT.** Near $t = 0$ the image is visible, near $t = 1$ the noise. What is $v$ at these ends,
# and what of it is new to the network? What is rectified flow's target there?

# %%
guess("...")

# %%
ts, curves = torch.linspace(0, 1, 41), {}
for name in ("v/cos", "rf"):
    image_share, noise_share = FORMULATIONS[name].coefficients(ts)
    curves |= {f"{name}: data": (ts, image_share), f"{name}: noise": (ts, noise_share)}
lines(curves, "t (0 data, 1 noise)", "share in what is asked", "What two formulations ask for.")

# %% [markdown]
# <details><summary>What happened</summary>
#
# $v$ is the noise at $t = 0$ and minus the image at $t = 1$: always what cannot be seen. Rectified
# flow asks for both everywhere, so its network must also pass on what it sees. A deep network does
# that easily; one of a single block may have to spend part of its capacity on it. That is a guess,
# and it would take an experiment with more blocks to tell.
#
# </details>
#
# ### Exercise: from v to the velocity

# %%
show("v_to_velocity")


# %%
def v_to_velocity(v, z, t):
    raise NotImplementedError("your code here")


solved = check("v_to_velocity", v_to_velocity)

# %%
if solved:
    digits = load_images().train_images[: pick(300, 30)].flatten(1) / 127.5 - 1
    exact, form = paths.exact_velocity(paths.PATHS["ot"], digits), FORMULATIONS["v/cos"]

    def by_you(z, t):  # a perfect network that is asked for v, and your function
        velocity = exact(z, t)
        return v_to_velocity(form.target(z - t * velocity, z + (1 - t) * velocity, t), z, t)

    z = samplers.euler(by_you, torch.randn(10, 784, generator=g), form.steps(50))
    images({"asked for v": z.view(-1, 28, 28)}, "Drawn with your function.", span=(-1, 1))
else:
    print("Solve `v_to_velocity`, and this cell draws ten digits with it.")

# %% [markdown]
# ## Your own experiment
#
# **Claim.** Drawing $t$ from logit-normal(0, 1) trains a better flow than drawing it uniformly.
# **Measured.** A small network, 800 training steps on points of two half circles. The energy
# distance between 1000 of its samples $x$ and 1000 points $y$ of the data ($E$ is the mean over all
# pairs) is 0 for equal distributions:
#
# $$2 E|x - y| - E|x - x'| - E|y - y'|$$
#
# Samples are drawn in 5 and in 20 Euler steps, with five seeds.
#
# **Rule.** That is up to you. Write it now, before anything has run: a function of two lists of
# distances, one number per seed, which is then applied at both numbers of steps.


# %%
def my_rule(weighted, uniform):
    return "no rule yet"  # "supported", "refuted" or "undecided"


# %%
def half_circles(n, g):
    angle, upper = torch.rand(n, generator=g) * torch.pi, torch.rand(n, generator=g) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 1.4 * torch.stack([x, y], dim=1) + 0.08 * torch.randn(n, 2, generator=g)


def trained(density, seed):
    torch.manual_seed(seed)
    layers = nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
    g, net = torch.Generator().manual_seed(seed), nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(pick(800, 10)):
        x0, noise = half_circles(128, g), torch.randn(128, 2, generator=g)
        t = density(torch.rand(128, generator=g).clamp(1e-6, 1 - 1e-6))
        v = net(torch.cat([flow.interpolate(x0, noise, t), t[:, None]], dim=1))
        optimizer.zero_grad()
        flow.flow_loss(v, x0, noise).mean().backward()
        optimizer.step()
    return lambda z, t: net(torch.cat([z, t.expand(len(z), 1)], dim=1))


# %% [markdown]
# **PREDICT.** What will your rule say, at 5 steps and at 20? How large will the difference be
# compared with what another seed changes?

# %%
guess("...")

# %%
densities = {"logit-normal": flow.logit_normal, "uniform": flow.uniform}
results = {n: {name: [] for name in densities} for n in (5, 20)}
for seed in range(pick(5, 2)):
    g = torch.Generator().manual_seed(100 + seed)
    noise, real = torch.randn(1000, 2, generator=g), half_circles(1000, g)
    nets = {name: trained(density, seed) for name, density in densities.items()}
    for n, (name, net) in itertools.product(results, nets.items()):
        with torch.no_grad():
            made = samplers.euler(net, noise, torch.linspace(1, 0, n + 1))
        within = torch.cdist(made, made).mean() + torch.cdist(real, real).mean()
        results[n][name].append(float(2 * torch.cdist(made, real).mean() - within))
pairs({f"{n} steps": found for n, found in results.items()}, "energy distance to the data",
      "Lines join what one seed gave.")  # fmt: skip
for n, found in results.items():
    m, s = experiment.lead(*found.values())
    print(f"{n} steps: your rule says {my_rule(*found.values())!r}; m is {m:.4f}, s {s:.4f}")

# %% [markdown]
# <details><summary>What happened</summary>
#
# At 5 steps the networks with logit-normal times are better with every seed, and by more than the
# spread: $m$ is twice $s$. At 20 steps the means hardly differ, and three seeds of five say the
# opposite. Whoever looks at both first can report the one that suits them. That is why a rule names
# its conditions, too, before anything has run.
#
# </details>
#
# **Open questions.** What does your rule say after ten times as many training steps? With which
# density do *few* Euler steps give the best samples, and why? Write the rule first. An experiment
# that is worth keeping becomes a file in nanosd3/claims: a claim, what is measured, a rule in words
# and as a function.
#
# ## What was left out
#
# Tests of significance, and corrections for asking many questions: with thirty experiments a few
# are decided by chance. The paper's own evidence, 61 formulations and human preferences (arXiv
# 2403.03206, sections 5.1 and 5.3), is beyond two cores; so is anything that only large networks
# show.
