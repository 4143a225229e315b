"""Small DiTs for experiments, trained in the latents of a finished main job."""

from dataclasses import asdict, dataclass, replace

from torch import Tensor

from nanosd3.claims.experiment import Conditions
from nanosd3.claims.runs import network_job, open_encoded
from nanosd3.config_types import Recipe
from nanosd3.related.dit import DIT_CONFIGS, DiT, DiTConfig
from nanosd3.related.train_dit import DiTLoss, train_dit
from nanosd3.training.stages import training_of

DIT_BATCH = 64


@dataclass(frozen=True)
class TrainedDiT:
    """A network, and what training it gave."""

    network: DiT
    error: float  # on held-out images
    seconds: float  # of a core


class DiTTrainer:
    """Trains DiTs on the latents and labels of a finished main job."""

    def __init__(self, conditions: Conditions):
        self.conditions = conditions
        self.finished, self.features = open_encoded(conditions)

    @property
    def labels(self) -> Tensor:
        return self.finished.source.labels

    @property
    def latent_size(self) -> int:
        config = self.finished.config
        return config.image_size // config.vae.factor

    def config(self, **sizes: object) -> DiTConfig:
        """The config of a DiT for these latents; with `fast`, the smallest there is."""
        small = DIT_CONFIGS["tiny"] if self.conditions.fast else DIT_CONFIGS["mnist"]
        if self.conditions.fast:
            sizes = {k: v for k, v in sizes.items() if k not in ("depth", "width", "heads")}
        return replace(
            small,
            latent_size=self.latent_size,
            latent_channels=self.finished.config.vae.latent_channels,
            classes=len(self.finished.source.images.names),
            **sizes,  # type: ignore[arg-type]
        )

    def trained(
        self,
        name: str,
        seed: int,
        dit: DiTConfig,
        loss: DiTLoss,
        steps: int,
        lr: float,
        ema_decay: float = 0.99,
    ) -> TrainedDiT:
        """A DiT trained in the folder `name`, or loaded from there if it is finished."""
        steps = min(steps, 4) if self.conditions.fast else steps
        recipe = Recipe(steps, DIT_BATCH, lr, warmup=min(50, steps // 2), weight_decay=0.0)
        finished = self.finished
        training = replace(training_of(finished.config), flow=recipe, ema_decay=ema_decay)
        config = replace(finished.config, training=training)
        names = [loss.objective, loss.density.__name__]  # "lesson" in finished runs
        job = network_job(
            self.conditions, finished, name, config, seed, dit=asdict(dit), lesson=names
        )
        with job.run.alone():
            network = train_dit(job, self.features, self.labels, dit, loss)
        found = job.run.stages["dit"]
        return TrainedDiT(network, found["validation"], found["thread_seconds"])
