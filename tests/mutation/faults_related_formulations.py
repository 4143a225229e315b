"""Mistakes in the file on formulations, as in faults_related_fm.py."""

FORMULATIONS_FILE = "related/formulations.py"

FAULTS_FORMULATIONS = [
    (
        FORMULATIONS_FILE,
        "torch.sqrt((1 - t) ** 2 + t**2)",
        "(1 - t) ** 2 + t**2",
        "the variance in place of the deviation",
    ),
    (
        FORMULATIONS_FILE,
        "-torch.ones_like(t), torch.ones_like(t)",
        "torch.ones_like(t), -torch.ones_like(t)",
        "the velocity towards the data",
    ),
    (
        FORMULATIONS_FILE,
        "return torch.zeros_like(t), torch.ones_like(t)",
        "return torch.ones_like(t), torch.zeros_like(t)",
        "the image predicted",
    ),
    (
        FORMULATIONS_FILE,
        "return -t / deviation(t), (1 - t) / deviation(t)",
        "return -(1 - t) / deviation(t), t / deviation(t)",
        "v with image and noise exchanged",
    ),
    (
        FORMULATIONS_FILE,
        "return -t / deviation(t), (1 - t) / deviation(t)",
        "return -t, 1 - t",
        "v without its deviation",
    ),
    (
        FORMULATIONS_FILE,
        "dtype=torch.float64) ** 2\n",
        "dtype=torch.float64)\n",
        "LDM's roots of beta for beta",
    ),
    (FORMULATIONS_FILE, "0.00085**0.5, 0.012**0.5", "0.0001**0.5, 0.02**0.5", "DDPM's betas"),
    (
        FORMULATIONS_FILE,
        "return times[(u * len(times)).long()]",
        "return times[((1 - u) * len(times)).long()]",
        "the steps from their end",
    ),
    (
        FORMULATIONS_FILE,
        "return torch.linspace(1, 0, steps + 1)\n",
        "return torch.linspace(1, 0, steps)\n",
        "a step too few",
    ),
    (
        FORMULATIONS_FILE,
        "[times.flip(0), torch.zeros(1)]",
        "[times, torch.zeros(1)]",
        "LDM's sampler starts at the data",
    ),
    (
        FORMULATIONS_FILE,
        "cosmap(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()",
        "torch.linspace(1, 0, steps + 1, dtype=torch.float64).float()",
        "even in t, not in the angle",
    ),
    (FORMULATIONS_FILE, "sigma = roots**rho\n", "sigma = roots**2\n", "Karras' roots"),
    (
        FORMULATIONS_FILE,
        "[sigma / (1 + sigma), torch.zeros(1)]",
        "[sigma, torch.zeros(1)]",
        "sigma for t",
    ),
    (FORMULATIONS_FILE, "smallest: float = 0.002", "smallest: float = 0.02", "Karras' last level"),
    (
        FORMULATIONS_FILE,
        "z / deviation(like(t, z)) if self.unit_variance else z",
        "z if self.unit_variance else z / deviation(like(t, z))",
        "scaled the other way about",
    ),
    (
        FORMULATIONS_FILE,
        "return a * x0 + b * noise\n",
        "return b * x0 + a * noise\n",
        "coefficients exchanged",
    ),
    (
        FORMULATIONS_FILE,
        "(output - (a + b) * z) /",
        "(output - (a - b) * z) /",
        "the part of z that is known already",
    ),
    (
        FORMULATIONS_FILE,
        "/ (b * (1 - t) - a * t)",
        "/ (b * t - a * (1 - t))",
        "x0 and noise in terms of v exchanged",
    ),
    (
        FORMULATIONS_FILE,
        "model(self.network_input(z, t), t, *others)",
        "model(z, t, *others)",
        "a sampler gives z as it is",
    ),
    (
        FORMULATIONS_FILE,
        "model(self.network_input(z, t), t, *others)",
        "model(self.network_input(z, t), t)",
        "without text",
    ),
    (
        FORMULATIONS_FILE,
        "t.view(-1, *[1] * (x.ndim - 1))",
        "t.view(*[1] * (x.ndim - 1), -1)",
        "times along the columns",
    ),
    (FORMULATIONS_FILE, "mean=mean, std=std)", "mean=-mean, std=std)", "EDM's mean, turned"),
    (
        FORMULATIONS_FILE,
        "velocity_coefficients, even_steps, unit_variance=False)",
        "velocity_coefficients, even_steps)",
        "rectified flow at unit variance",
    ),
    (
        FORMULATIONS_FILE,
        "Formulation(cosmap, v_coefficients, even_angles)",
        "Formulation(uniform, v_coefficients, even_angles)",
        "v with uniform times",
    ),
]
