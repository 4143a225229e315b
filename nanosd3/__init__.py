"""nanosd3: Stable Diffusion 3 from scratch, in modules small enough to read.

The same classes learn MNIST on a laptop CPU and, with another config, are the official 2B and
8B models: same parameters, same key names, same numbers.

Notation, used in code, tests and notebooks alike
    B batch   C channels   H W height and width (pixels or latents)   p patch size
    N image tokens   M text tokens   D width of the transformer   Dc, Dp context and pooled width
    shapes are given at line ends, where they change:  x = self.proj(x)  # (B, N, D)

Time, used everywhere
    t = 0 is data, t = 1 is noise           z_t = (1 - t) x0 + t noise
    velocity  v = dz/dt = noise - x0        so  x0 = z - t v,  noise = z + (1 - t) v
    Models take t in [0, 1]; the factor 1000 of the timestep embedding is applied inside, once.
    (Lipman's and Liu's papers run the other way: their t is our 1 - t, their v our -v.)

Layout: modules and folders import only from the rows above them. The order inside a folder is
that of its docstring.
    errors
    arguments
    random_streams   config_types   torch_settings
    recipes
    config   flow   samplers   patchify   embeddings   layers   unigram_training
    tokenizers   lazy_modules   few_steps
    mmdit   vae   clip   t5
    components   text
    machine/
    cli
    storage/
    data/
    official/
    request
    pipeline
    weights
    measure/
    training/
    measure/cuda/
    train   bench   minimal   pytest_plugin
    exercises/
    related/
    generate
    claims/

Reading order: minimal (all of it on one page); flow, samplers, patchify, embeddings, layers, mmdit
(the transformer, how it learns and how it is sampled); vae, clip, t5, tokenizers, text; pipeline;
training/train_flow. Nothing happens at import time, except for one OpenMP setting.
"""

import os
import sys

# Threads that wait for each other spin, by default for 10 ms or more. If other programs want the
# cores too, they displace the very thread they wait for: a step takes 2 to 10 times as long.
# With this setting they sleep after half a millisecond. OpenMP reads it when torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.2.0"
