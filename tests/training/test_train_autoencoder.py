"""Training the autoencoder: in parts of a batch that fit, and in how much memory."""

from dataclasses import replace

import pytest
import torch

from nanosd3.config import CONFIGS, Recipe, trainable
from nanosd3.measure.memory_check import autoencoder_memory, autoencoder_rows
from nanosd3.storage.files import read_tensors
from nanosd3.storage.run import Run
from nanosd3.training import train_autoencoder as stage
from nanosd3.training.stages import Job
from nanosd3.vae import AutoencoderKL, sample_posterior

TINY = CONFIGS["tiny"]


class Images:
    """Ten images of noise."""

    trained, count = 10, 10

    def draw(self, batch, generator):
        return torch.randint(10, (batch,), generator=generator)

    def pixels(self, index):
        drawn = [torch.randn(1, 32, 32, generator=torch.manual_seed(int(i))) for i in index]
        return torch.stack(drawn)

    def groups(self, numbers):
        return [torch.tensor(list(numbers))]


def trained(folder, monkeypatch, rows: int) -> tuple[dict, list[float]]:
    """The weights and losses after three steps of a batch of six, so many images at once."""
    recipe = Recipe(steps=3, batch=6, lr=1e-3, warmup=1, weight_decay=0.0)
    config = replace(TINY, training=replace(TINY.training, autoencoder=recipe))
    monkeypatch.setattr(stage, "autoencoder_rows", lambda _: rows)
    run = Run.open(folder, {"config": {}})
    stage.train_autoencoder(Job(run, config, Images(), torch.device("cpu"), 0))
    losses = [entry["loss"] for entry in run.read_log("autoencoder")]
    return read_tensors(folder / "autoencoder.safetensors"), losses


def test_parts_of_a_batch_train_what_the_batch_trains(tmp_path, monkeypatch):
    weights, losses = trained(tmp_path / "whole", monkeypatch, 6)
    in_parts, losses_in_parts = trained(tmp_path / "parts", monkeypatch, 2)
    assert losses_in_parts == pytest.approx(losses, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(in_parts[key], value, atol=1e-3, rtol=1e-2)


def test_rows():
    """All of a batch of small images, one large image, always a divisor of the batch."""
    assert all(
        autoencoder_rows(CONFIGS[name]) == CONFIGS[name].training.autoencoder.batch
        for name in ("tiny", "mnist", "small", "scenes", "tiny-scenes")
    )
    medium = trainable(CONFIGS["sd3-medium"])
    assert autoencoder_rows(medium) == 1
    assert autoencoder_rows(replace(medium, image_size=256)) == 8
    assert autoencoder_rows(replace(medium, image_size=320)) == 4  # 5 fit


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_memory(name):
    """What autograd saves for a real batch, and 16 bytes a parameter."""
    config = CONFIGS[name].vae
    network, x = AutoencoderKL(config), torch.randn(3, config.image_channels, 32, 32)
    own, saved = {p.untyped_storage()._cdata for p in network.parameters()}, {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean, logvar = network.encode(x)
        network.decode(sample_posterior(mean, logvar, torch.randn_like(mean))).square().sum()
    held = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    weights, each = autoencoder_memory(config, 32)
    assert weights == 16 * sum(p.numel() for p in network.parameters())
    assert held == pytest.approx(3 * each, rel=0.02)
