"""How each config is trained: steps, batches and learning rates of every stage, as numbers."""

from dataclasses import replace

from nanosd3.config_types import Recipe, Training

MNIST_TRAINING = Training(
    train_images=60000,
    test_images=10000,
    judge=Recipe(steps=800, batch=128, lr=2e-3, warmup=50, weight_decay=1e-2),
    autoencoder=Recipe(steps=300, batch=64, lr=2e-3, warmup=50, weight_decay=0.0),
    clip=Recipe(steps=300, batch=256, lr=2e-3, warmup=50, weight_decay=1e-2),
    t5=Recipe(steps=250, batch=128, lr=2e-3, warmup=50, weight_decay=0.0),
    flow=Recipe(steps=1900, batch=128, lr=1e-2, warmup=100, weight_decay=0.0, optimizer="muon"),
    kl_weight=1e-2,
    time_mean=0.8,  # nearer to noise than SD3's 0: that is where the digit is decided
    time_std=1.0,
    encoder_dropout=0.464,
    ema_decay=0.999,
    evaluate=1000,
)

TINY_TRAINING = Training(
    train_images=512,
    test_images=64,
    judge=Recipe(steps=12, batch=32, lr=2e-3, warmup=2, weight_decay=1e-2),
    autoencoder=Recipe(steps=12, batch=16, lr=2e-3, warmup=2, weight_decay=0.0),
    clip=Recipe(steps=8, batch=32, lr=2e-3, warmup=2, weight_decay=1e-2),
    t5=Recipe(steps=8, batch=16, lr=2e-3, warmup=2, weight_decay=0.0),
    flow=Recipe(steps=12, batch=32, lr=2e-3, warmup=2, weight_decay=0.0),
    kl_weight=1e-2,
    time_mean=0.0,
    time_std=1.0,
    encoder_dropout=0.464,
    ema_decay=0.99,
    evaluate=40,
)

SMALL_TRAINING = Training(
    train_images=60000,
    test_images=10000,
    judge=MNIST_TRAINING.judge,
    autoencoder=Recipe(steps=600, batch=32, lr=2e-3, warmup=50, weight_decay=0.0),
    clip=Recipe(steps=500, batch=128, lr=2e-3, warmup=50, weight_decay=1e-2),
    t5=Recipe(steps=300, batch=128, lr=2e-3, warmup=50, weight_decay=0.0),
    flow=Recipe(steps=2000, batch=64, lr=3e-3, warmup=100, weight_decay=0.0),
    kl_weight=1e-2,
    time_mean=0.0,
    time_std=1.0,
    encoder_dropout=0.464,
    ema_decay=0.999,
    evaluate=1000,
)

SCENES_TRAINING = Training(
    train_images=20000,  # scenes
    test_images=10000,
    judge=Recipe(steps=1200, batch=128, lr=4e-3, warmup=50, weight_decay=1e-2),
    autoencoder=Recipe(steps=300, batch=32, lr=4e-3, warmup=50, weight_decay=0.0),
    clip=Recipe(steps=1500, batch=128, lr=4e-3, warmup=50, weight_decay=1e-2),
    t5=Recipe(steps=250, batch=128, lr=2e-3, warmup=50, weight_decay=0.0),
    flow=Recipe(steps=8000, batch=64, lr=1e-2, warmup=100, weight_decay=0.0, optimizer="muon"),
    kl_weight=1e-3,  # most of a scene is black: with more, most of a latent is noise
    time_mean=0.8,
    time_std=1.0,
    encoder_dropout=0.464,
    ema_decay=0.999,
    evaluate=800,
)

# How configs without a published recipe are trained. Untried at full length: the learning rates are
# the usual ones for networks of this size.
LARGE_TRAINING = replace(
    MNIST_TRAINING,
    autoencoder=Recipe(steps=5000, batch=8, lr=1e-4, warmup=500, weight_decay=0.0),
    flow=Recipe(steps=100_000, batch=64, lr=1e-4, warmup=1000, weight_decay=0.01),
    time_mean=0.0,
    ema_decay=0.9999,
    evaluate=200,
)
