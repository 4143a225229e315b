"""Training the text encoders from scratch on the captions: two CLIPs and a T5.

Official models come with encoders trained on billions of captions. Here each is trained on its own
task at a small scale, so that no part of the system is a stand-in: the CLIPs match images to their
captions within a batch, T5 fills in removed words. The networks that only these tasks need (image
tower, decoder) are saved with their stage and not used afterwards; SD3 never sees them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.data.mnist import plain_captions, to_model
from nanosd3.data.sources import Digits
from nanosd3.errors import InputError
from nanosd3.lazy_modules import LazyModules
from nanosd3.official.own_runs import read_tokenizers
from nanosd3.random_streams import rng
from nanosd3.storage.files import save_weights, write_json
from nanosd3.t5 import T5Encoder
from nanosd3.text import TextEncoders, Tokenizers, make_encoders
from nanosd3.tokenizers import END, PAD
from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet, thumbnails
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load, in_chunks, last_loss

T5_CAPTIONS = 20000  # captions that T5 is trained on, at most
RETRIEVAL_IMAGES = 100  # in the test of CLIP on images without classes


# --- CLIP -----------------------------------------------------------------------------------------


def clip_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss (CLIP, arXiv 2103.00020) of embeddings (B, D): each image should find its
    caption among those of the batch, and each caption its image.

    `same` (B, B) is 1 where two captions are equal: they share the target probability.
    """
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class CLIPTrainer(nn.Module):
    """Both CLIP text encoders, and whatever else their training needs."""

    def __init__(self, clip_l: nn.Module, clip_g: nn.Module, dl: int, dg: int, channels: int):
        super().__init__()
        self.clip_l, self.clip_g, self.widths = clip_l, clip_g, [dl, dg]
        self.tower = ConvNet(dl + dg, channels)
        self.projection_l = nn.Linear(dl, dl, bias=False)  # SD3 uses L unprojected
        self.log_scale = nn.ParameterList([torch.tensor(math.log(10))])

    def embed_text(self, ids_l: Tensor, ids_g: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids to embeddings (B, dl) and (B, dg)."""
        pooled_l = self.clip_l(ids_l)[1]
        return self.projection_l(pooled_l), self.clip_g(ids_g)[1]

    def embed_images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to embeddings (B, dl) and (B, dg)."""
        image_l, image_g = self.tower(thumbnails(x)).split(self.widths, dim=1)
        return image_l, image_g


def train_clip(job: Job, text: TextEncoders) -> None:
    """Train both CLIPs against one image tower, or load them."""
    source, config, recipe = job.source, job.config, job.training.clip
    dl, dg, channels = config.text.clip_l.width, config.text.clip_g.width, config.vae.image_channels
    ids_l, ids_g = (ids.to(job.device) for ids in text.clip_ids(source.texts))
    clip_l, clip_g = text.parts["clip_l"], text.parts["clip_g"]
    net = build(job, "clip", lambda: CLIPTrainer(clip_l, clip_g, dl, dg, channels)).to(job.device)

    def embed_text(index: Tensor) -> tuple[Tensor, Tensor]:
        return net.embed_text(ids_l[index], ids_g[index])

    def embed_images(x: Tensor) -> tuple[Tensor, Tensor]:
        return net.embed_images(x.to(job.device))

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        # Always of the whole batch: an image's loss depends on all captions.
        generator = step_rng.generator()
        i = source.draw(recipe.batch, generator)
        index = source.captions(i, torch.rand(recipe.batch, generator=generator)).to(job.device)
        image_l, image_g = embed_images(source.pixels(i))
        text_l, text_g = embed_text(index)
        same = (index[:, None] == index).float()
        scale = net.log_scale[0].exp().clamp(max=100)
        return clip_loss(image_l, text_l, same, scale) + clip_loss(image_g, text_g, same, scale), {}

    def train() -> dict:
        fit(job.run, "clip", net, loss_of, recipe, job.seed)
        if isinstance(source, Digits):
            return zero_shot(source, embed_text, embed_images)
        return {"found": retrieval_accuracy(job, embed_text, embed_images)}

    results = finish_or_load(job, "clip", net, train)
    if "found" in results:
        print(
            f"clip: retrieves the right caption for {results['found']:.1%} of "
            f"{RETRIEVAL_IMAGES} images"
        )
    else:
        print(
            f"clip: zero-shot accuracy {results['zero_shot_l']:.1%} (L) and "
            f"{results['zero_shot_g']:.1%} (G) on the test images"
        )


Embed = Callable[[Tensor], tuple[Tensor, Tensor]]  # to the embeddings of L and G


@torch.no_grad()
def zero_shot(source: Digits, embed_text: Embed, embed_images: Embed) -> dict:
    """Zero-shot accuracy: a test image's class is the one whose captions' mean embedding is
    nearest to the image's."""
    images, index = source.images, {text: i for i, text in enumerate(source.texts)}
    anchors: tuple[list, list] = ([], [])
    for label in range(len(images.names)):
        ids = torch.tensor([index[text] for text in plain_captions(images.names, label)])
        for anchor, embedded in zip(anchors, embed_text(ids), strict=True):
            anchor.append(F.normalize(embedded, dim=1).mean(0))
    test = to_model(images.test_images, CLASSIFIER_SIZE)
    channels = source.config.vae.image_channels
    outputs = in_chunks(lambda x: torch.cat(embed_images(x.expand(-1, channels, -1, -1)), 1), test)
    embeddings = outputs.split([anchor[0].numel() for anchor in anchors], dim=1)
    correct = [
        (F.normalize(image, dim=1) @ torch.stack(anchor).T).argmax(1).cpu() == images.test_labels
        for image, anchor in zip(embeddings, anchors, strict=True)
    ]
    return {
        f"zero_shot_{name}": c.float().mean().item() for name, c in zip("lg", correct, strict=True)
    }


@torch.no_grad()
def retrieval_accuracy(job: Job, embed_text: Embed, embed_images: Embed) -> float:
    """Share of RETRIEVAL_IMAGES training images whose nearest caption, among the captions of all of
    them, is their own, according to the trained CLIP-L."""
    index = job.source.draw(RETRIEVAL_IMAGES, rng(job.seed, "clip", "found"))
    captions = job.source.captions(index, torch.zeros(RETRIEVAL_IMAGES))
    image, text = embed_images(job.source.pixels(index))[0], embed_text(captions)[0]
    nearest = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).argmax(1).cpu()
    return (captions[nearest] == captions).float().mean().item()


# --- T5 -------------------------------------------------------------------------------------------


def span_corruptions(
    rows: list[list[int]], sentinels: tuple[int, int], length: int
) -> tuple[Tensor, Tensor]:
    """Every way to remove one span, of up to half its tokens, from each row of ids.

    Returns inputs (n, length), where the first sentinel replaces the span, and targets (n, length):
    that sentinel, the span, the second sentinel, the end token.
    """
    pad = lambda ids: (ids + [PAD] * length)[:length]  # noqa: E731
    inputs, targets = [], []
    for ids in rows:
        words = ids[:-1]  # without the end token
        for span in range(1, max(1, len(words) // 2) + 1):
            for start in range(len(words) - span + 1):
                inputs.append(pad([*words[:start], sentinels[0], *words[start + span :], END]))
                targets.append(pad([sentinels[0], *words[start : start + span], sentinels[1], END]))
    return torch.tensor(inputs), torch.tensor(targets)


class T5Trainer(nn.Module):
    """T5's encoder with a one-layer decoder for its training task."""

    def __init__(self, t5: T5Encoder):
        super().__init__()
        config = t5.config
        self.t5 = t5
        self.decoder = nn.TransformerDecoderLayer(
            config.width, config.heads, config.hidden, dropout=0.0, batch_first=True
        )
        self.position = nn.Embedding(config.length, config.width)
        self.output = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, ids: Tensor, previous: Tensor, causal: Tensor) -> Tensor:
        """Logits (B, L - 1, vocab) of the target's tokens, given the corrupted ids (B, L), the
        target's previous tokens (B, L - 1) and the causal mask (L - 1, L - 1)."""
        states = self.t5(ids)  # (B, L, D)
        y = self.t5.encoder["embed_tokens"](previous) + self.position.weight[:-1]
        y = self.decoder(y, states, tgt_mask=causal, tgt_is_causal=True)  # (B, L - 1, D)
        return self.output(y)


def train_t5(job: Job, text: TextEncoders) -> None:
    """Train T5 by span corruption, or load it."""
    config, recipe, t5 = job.config.text.t5, job.training.t5, text.parts["t5"]
    assert isinstance(t5, T5Encoder)
    unigram = text.tokenizers.unigram
    rows = [unigram.encode(caption)[: config.length] for caption in job.source.texts[:T5_CAPTIONS]]
    sentinels = (unigram.sentinel(0), unigram.sentinel(1))
    inputs, targets = (
        ids.to(job.device) for ids in span_corruptions(rows, sentinels, config.length)
    )
    net = build(job, "t5", lambda: T5Trainer(t5)).to(job.device)
    causal = nn.Transformer.generate_square_subsequent_mask(config.length - 1, device=job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        i = torch.randint(len(inputs), (recipe.batch,), generator=step_rng.generator())
        i = step_rng.take(i).to(job.device)
        logits = net(inputs[i], targets[i, :-1], causal)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[i, 1:].flatten(), ignore_index=PAD)
        return loss, {}

    def train() -> dict:
        fit(job.run, "t5", net, loss_of, recipe, job.seed)
        return {"loss": last_loss(job, "t5")}

    results = finish_or_load(job, "t5", net, train)
    print(
        f"t5: loss {results['loss']:.2f} nats per token on removed words "
        f"(uniform guess: {math.log(config.vocab):.2f})"
    )


# --- all three ------------------------------------------------------------------------------------


def train_tokenizers(job: Job) -> Tokenizers:
    """Train the tokenizers in the main process, or read them.

    Raises InputError if the captions do not fit the config's vocabularies.
    """
    path, config = job.run.folder / "tokenizers.json", job.config
    if job.group.is_main and not path.exists():
        try:
            tokenizers = Tokenizers.train(job.source.texts, config.text)
        except ValueError as error:  # too many different characters
            raise InputError(
                f"{job.source.name}: the captions do not fit the vocabularies of config "
                f"{config.name} ({error}); use a larger --config or fewer different characters"
            ) from None
        write_json(path, tokenizers.to_json())
    job.group.barrier()
    try:
        return read_tokenizers(path, config)
    except InputError as error:
        raise InputError(f"{error}; delete it to train them again") from None


def train_text_encoders(job: Job) -> TextEncoders:
    """Train tokenizers and the three encoders, or load them; the encoders come back frozen.

    Raises InputError if the captions do not fit the config's vocabularies or token limits. (Longer
    captions of pictures are truncated, and counted, when they are encoded.)
    """
    config, captions = job.config, job.source.texts
    tokenizers = train_tokenizers(job)
    encoders = build(job, "text", lambda: make_encoders(config.text)).to(job.device)
    parts = LazyModules(dict(encoders.items()), job.device)
    widths = (config.mmdit.context_dim, config.mmdit.pooled_dim)
    text = TextEncoders(config.text, tokenizers, parts, *widths)
    if isinstance(job.source, Digits) and (long := text.truncated(captions)):
        raise InputError(
            f"{job.source.name}: class names too long for config {config.name}, shorten them: "
            f"a caption is {long[0]}"
        )
    train_clip(job, text)
    train_t5(job, text)
    if job.group.is_main:
        save_weights(encoders, job.run.folder / "text.safetensors")
    job.group.barrier()
    encoders.requires_grad_(False).eval()
    return text
