"""What experiments that train start from: a finished main job, encoded once."""

from collections.abc import Callable
from typing import Any

import torch

from nanosd3.claims.experiment import Conditions
from nanosd3.machine.distributed import SINGLE_PROCESS
from nanosd3.related.finished_run import FinishedRun, open_finished_run
from nanosd3.storage.run import Run
from nanosd3.training.cached_features import Features, encoded


def open_encoded(conditions: Conditions, images: bool = True) -> tuple[FinishedRun, Features]:
    """The finished run, and its latents and text (or text alone), kept in the folder of the
    records. Raises InputError if it is none."""
    finished = open_finished_run(conditions.run, None, torch.device("cpu"))
    folder, encoders = conditions.out / "cache", finished.encoders(finished.config)
    return finished, encoded(folder, finished.source, encoders, [], SINGLE_PROCESS, images)


def measured_once(run: Run, what: str, measure: Callable[[], Any]) -> Any:
    """What has been measured of a run's network, now or before, as JSON keeps it."""
    if what not in run.stages:
        with run.alone():
            run.finish(what, {"found": measure()})
    return run.stages[what]["found"]
