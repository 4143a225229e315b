"""nanosd3: Stable Diffusion 3 from scratch, in modules small enough to read.

The same classes learn MNIST on a laptop CPU and are, at another config, the official 2B and
8B models: same parameters, same key names, same numbers.

Notation, used in code, tests and notebooks alike
    B batch   C channels   H W height and width (pixels or latents)   p patch size
    N image tokens   M text tokens   D width of the transformer   Dc, Dp context and pooled width
    shapes stand at line ends, where they change:  x = self.proj(x)  # (B, N, D)

Time, used everywhere
    t = 0 is data, t = 1 is noise           z_t = (1 - t) x0 + t noise
    velocity  v = dz/dt = noise - x0        so  x0 = z - t v,  noise = z + (1 - t) v
    Models take t in [0, 1]; the factor 1000 of the timestep embedding is applied inside, once.
    (Lipman's and Liu's papers run the other way: their t is our 1 - t, their v our -v.)

Layers: a module imports only from rows above its own
    runtime   products
    config   patchify   layers   flow   samplers   tokenizers   parts   images   parallel   buckets
    mmdit   vae   clip   t5   data   metrics   options   layouts   weightfiles   costs   folders
    text   accelerate   checkpoint   sizes   sources   footprint
    pipeline   states   shards   speed   figures
    loop   features   found
    stages   audit
    train_text   report   export
    weights   pairs
    jobs   generate   growth   student
    measure
    train   bench

The exercises (nanosd3/exercises) import all of it and are imported by nothing.

Reading order: flow, samplers, patchify, layers, mmdit (the spine); then vae, clip, t5,
tokenizers, text; then pipeline; then sources, features, loop, stages, jobs. Nothing happens at
import time.
"""

__version__ = "0.1.0"
