"""Training the text encoders from scratch on the captions: two CLIPs and a T5.

Official models bring encoders trained on billions of captions; here each learns its own task on
a small scale, so that no part of the system is a stand-in. The CLIPs learn to find an image's
caption in a batch and the other way round, T5 to fill in removed words. The networks that only
the tasks need (image tower, decoder) are thrown away; SD3 never sees them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.checkpoint import save_weights, write_json
from nanosd3.data import plain_captions, to_model
from nanosd3.loop import Draw, fit
from nanosd3.metrics import JUDGED, ConvNet, thumbnails
from nanosd3.parts import Parts
from nanosd3.runtime import InputError, rng
from nanosd3.sources import Digits
from nanosd3.stages import Job, build, finish_or_load, in_chunks, last_loss
from nanosd3.text import TextEncoders, Tokenizers, make_encoders
from nanosd3.tokenizers import END, PAD

LEARNED = 20000  # captions that T5 learns from, at most
FOUND = 100  # images whose captions are looked for


def clip_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss (CLIP, arXiv 2103.00020): each image finds its caption and each caption
    its image, among those of the batch. Equal captions share the answer: `same` (B, B)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    answer = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def train_clip(job: Job, text: TextEncoders) -> None:
    """Train both CLIPs against one image tower, which is thrown away afterwards."""
    source, config, recipe = job.source, job.config, job.config.training.clip
    dl, dg = config.text.clip_l.width, config.text.clip_g.width
    ids_l, ids_g = (ids.to(job.device) for ids in text.clip_ids(source.texts))
    students = build(job, "clip", lambda: nn.ModuleDict({
        "clip_l": text.parts["clip_l"],
        "clip_g": text.parts["clip_g"],
        "tower": ConvNet(dl + dg, config.vae.image_channels),
        "projection_l": nn.Linear(dl, dl, bias=False),  # SD3 uses L unprojected
        "log_scale": nn.ParameterList([torch.tensor(math.log(10))]),
    })).to(job.device)  # fmt: skip

    def embed_text(index: Tensor) -> tuple[Tensor, Tensor]:
        pooled_l = students["clip_l"](ids_l[index])[1]
        return students["projection_l"](pooled_l), students["clip_g"](ids_g[index])[1]

    def embed_images(x: Tensor) -> tuple[Tensor, Tensor]:
        return students["tower"](thumbnails(x.to(job.device))).split([dl, dg], dim=1)

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:  # of the whole batch: each needs all others
        generator = draw.generator()
        i = source.draw(recipe.batch, generator)
        index = source.captions(i, torch.rand(recipe.batch, generator=generator)).to(job.device)
        image_l, image_g = embed_images(source.pixels(i))
        text_l, text_g = embed_text(index)
        same = (index[:, None] == index).float()
        scale = students["log_scale"][0].exp().clamp(max=100)
        return clip_loss(image_l, text_l, same, scale) + clip_loss(image_g, text_g, same, scale), {}

    def train() -> dict:
        fit(job.run, "clip", students, loss_of, recipe, job.seed)
        if isinstance(source, Digits):
            return zero_shot(source, embed_text, embed_images)
        return {"found": found_again(job, embed_text, embed_images)}

    results = finish_or_load(job, "clip", students, train)
    if "found" in results:
        print(f"clip: finds the caption of {results['found']:.1%} of {FOUND} images among theirs")
    else:
        print(f"clip: by its caption alone, the class of {results['zero_shot_l']:.1%} (L) and "
              f"{results['zero_shot_g']:.1%} (G) of the test images is found")  # fmt: skip


Embed = Callable[[Tensor], tuple[Tensor, Tensor]]  # to the embeddings that L and G share


@torch.no_grad()
def zero_shot(source: Digits, embed_text: Embed, embed_images: Embed) -> dict:
    """Class of each test image by the nearest mean of its class's captions."""
    images, index = source.images, {text: i for i, text in enumerate(source.texts)}
    anchors: tuple[list, list] = ([], [])
    for label in range(len(images.names)):
        ids = torch.tensor([index[text] for text in plain_captions(images.names, label)])
        for anchor, embedded in zip(anchors, embed_text(ids), strict=True):
            anchor.append(F.normalize(embedded, dim=1).mean(0))
    test = to_model(images.test_images, JUDGED)
    channels = source.config.vae.image_channels
    outputs = in_chunks(lambda x: torch.cat(embed_images(x.expand(-1, channels, -1, -1)), 1), test)
    outputs = outputs.split([anchor[0].numel() for anchor in anchors], dim=1)
    right = [
        (F.normalize(image, dim=1) @ torch.stack(anchor).T).argmax(1).cpu() == images.test_labels
        for image, anchor in zip(outputs, anchors, strict=True)
    ]
    return {
        f"zero_shot_{name}": r.float().mean().item() for name, r in zip("lg", right, strict=True)
    }


@torch.no_grad()
def found_again(job: Job, embed_text: Embed, embed_images: Embed) -> float:
    """The share of some images that trained CLIP-L gives their own caption, among those of all."""
    index = job.source.draw(FOUND, rng(job.seed, "clip", "found"))
    captions = job.source.captions(index, torch.zeros(FOUND))
    image, said = embed_images(job.source.pixels(index))[0], embed_text(captions)[0]
    nearest = (F.normalize(image, dim=1) @ F.normalize(said, dim=1).T).argmax(1).cpu()
    return (captions[nearest] == captions).float().mean().item()


def span_corruptions(
    rows: list[list[int]], sentinels: tuple[int, int], length: int
) -> tuple[Tensor, Tensor]:
    """Every way to remove one span, of up to half its tokens, from each row of ids.

    Returns inputs (n, length), where the first sentinel stands for the span, and targets
    (n, length): that sentinel, the span, the second sentinel, end.
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


def train_t5(job: Job, text: TextEncoders) -> None:
    """Train T5 by span corruption, with a one-layer decoder that is thrown away afterwards."""
    config, recipe = job.config.text.t5, job.config.training.t5
    unigram = text.tokenizers.unigram
    rows = [unigram.encode(caption)[: config.length] for caption in job.source.texts[:LEARNED]]
    sentinels = (unigram.sentinel(0), unigram.sentinel(1))
    inputs, targets = (
        ids.to(job.device) for ids in span_corruptions(rows, sentinels, config.length)
    )
    students = build(job, "t5", lambda: nn.ModuleDict({
        "t5": text.parts["t5"],
        "decoder": nn.TransformerDecoderLayer(
            config.width, config.heads, config.hidden, dropout=0.0, batch_first=True
        ),
        "position": nn.Embedding(config.length, config.width),
        "output": nn.Linear(config.width, config.vocab, bias=False),
    })).to(job.device)  # fmt: skip
    causal = nn.Transformer.generate_square_subsequent_mask(config.length - 1, device=job.device)

    def loss_of(draw: Draw) -> tuple[Tensor, dict]:
        i = torch.randint(len(inputs), (recipe.batch,), generator=draw.generator())
        i = draw.of(i).to(job.device)
        states = students["t5"](inputs[i])
        said, asked = targets[i, :-1], targets[i, 1:]
        y = students["t5"].encoder["embed_tokens"](said) + students["position"].weight[:-1]
        y = students["decoder"](y, states, tgt_mask=causal, tgt_is_causal=True)
        loss = F.cross_entropy(
            students["output"](y).flatten(0, 1), asked.flatten(), ignore_index=PAD
        )
        return loss, {}

    def train() -> dict:
        fit(job.run, "t5", students, loss_of, recipe, job.seed)
        return {"loss": last_loss(job, "t5")}

    results = finish_or_load(job, "t5", students, train)
    print(f"t5: fills in removed words with a loss of {results['loss']:.2f} nats a piece "
          f"(a blind guess: {math.log(config.vocab):.2f})")  # fmt: skip


def train_text_encoders(job: Job) -> TextEncoders:
    """Tokenizers and the three encoders, trained, frozen and saved."""
    config, captions = job.config, job.source.texts
    try:
        tokenizers = Tokenizers.train(captions, config.text)
    except ValueError as error:  # more characters than places
        raise InputError(f"{job.source.name}: captions too varied for {config.name}: "
                         f"{error}") from None  # fmt: skip
    encoders = build(job, "text", lambda: make_encoders(config.text)).to(job.device)
    widths = (config.mmdit.context_dim, config.mmdit.pooled_dim)
    text = TextEncoders(config.text, tokenizers, Parts(encoders, job.device), *widths)
    if long := text.truncated(captions):
        if isinstance(job.source, Digits):
            raise InputError(f"{job.source.name}: class names too long for {config.name}: "
                             f"a caption is {long[0]}")  # fmt: skip
        print(f"text: {len(long)} of {len(captions)} captions are cut, such as one {long[0]}")
    train_clip(job, text)
    train_t5(job, text)
    if job.team.leads:
        write_json(job.run.folder / "tokenizers.json", tokenizers.to_json())
        save_weights(encoders, job.run.folder / "text.safetensors")
    job.team.wait()
    encoders.requires_grad_(False).eval()
    return text
