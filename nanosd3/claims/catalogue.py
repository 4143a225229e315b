"""All experiments by name. A new one is a file beside this one, and a line here."""

from nanosd3.claims.experiment import Experiment
from nanosd3.claims.fm_identity import IDENTITY
from nanosd3.claims.fm_straightness import STEPS, STRAIGHTNESS

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *(IDENTITY, STRAIGHTNESS, STEPS),  # Flow Matching
    )
}
