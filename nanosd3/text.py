"""Three text encoders joined into one conditioning, as in SD3.

    CLIP-L states (B, Lc, dl) | CLIP-G states (B, Lc, dg)   side by side, zeros up to T5's width
    T5 states (B, Lt, Dc)                                   behind them, as further tokens
        -> context (B, Lc + Lt, Dc): what the transformer's text stream reads
    CLIP-L pooled (B, dl) | CLIP-G pooled (B, dg)           side by side
        -> pooled (B, dl + dg): what modulates every block, together with the timestep

There are no separators and no positions on text tokens: the encoder states already carry the
word order. In training each encoder is dropped independently with probability 0.464, its
outputs set to zero (so a tenth of all samples has no text at all, which guidance needs); at
inference any may be left out the same way. The zero tokens stay in the sequence.
Paper: arXiv 2403.03206, section 4, appendix B.3.
"""

from collections.abc import Collection, Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.arguments import several, whole_number
from nanosd3.clip import CLIPText
from nanosd3.config_types import CLIPConfig, TextConfig
from nanosd3.errors import InputError, listed, options_of, shown
from nanosd3.lazy_modules import LazyModules
from nanosd3.t5 import T5Encoder
from nanosd3.tokenizers import BPE, PAD, Unigram, pad_or_truncate

ENCODERS = ("clip_l", "clip_g", "t5")
MAX_TEXT_ACTIVATIONS = 2**28  # numbers in the widest activation of an encoder, at most
MAX_T5_LENGTH = 4096  # tokens; T5 was trained on 512, and attention grows with the square


def join_context(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """States of the three encoders to the context (B, Lc + Lt, Dc)."""
    clip = torch.cat([clip_l, clip_g], dim=2)  # (B, Lc, dl + dg)
    clip = F.pad(clip, (0, t5.shape[2] - clip.shape[2]))  # (B, Lc, Dc)
    return torch.cat([clip, t5], dim=1)


def widened(x: Tensor, width: int) -> Tensor:
    """Features (..., d) padded with zeros to a width: small encoders for a large transformer."""
    return F.pad(x, (0, width - x.shape[-1]))


def drop_encoders(
    context: Tensor, pooled: Tensor, keep: Tensor, config: TextConfig
) -> tuple[Tensor, Tensor]:
    """Zero the outputs of the encoders whose entry in `keep` (B, 3) is False."""
    keep = keep.to(context)
    keep_l, keep_g, keep_t5 = keep[:, :, None].unbind(1)  # each (B, 1)
    dl, length = config.clip_l.width, config.clip_l.length
    B, M, Dc = context.shape
    keep_clip = torch.cat([keep_l.expand(B, dl), keep_g.expand(B, Dc - dl)], dim=1)  # (B, Dc)
    clip, rest = context.split([length, M - length], dim=1)
    context = torch.cat([clip * keep_clip[:, None], rest * keep_t5[:, None]], dim=1)
    keep_pooled = torch.cat([keep_l.expand(B, dl), keep_g.expand(B, pooled.shape[1] - dl)], dim=1)
    return context, pooled * keep_pooled


@dataclass
class Tokenizers:
    """Byte pairs for both CLIPs, pieces for T5, and the words of the training captions.

    `words` is empty for the official vocabularies, which have seen every word.
    """

    bpe: BPE
    unigram: Unigram
    words: frozenset[str]

    @classmethod
    def official(cls) -> "Tokenizers":
        """The published vocabularies."""
        return cls(BPE.official(), Unigram.official(), frozenset())

    @classmethod
    def train(cls, corpus: list[str], config: TextConfig) -> "Tokenizers":
        words = frozenset(word for text in corpus for word in text.lower().split())
        bpe = BPE.train(corpus, config.clip_l.vocab)
        return cls(bpe, Unigram.train(corpus, config.t5.vocab), words)

    def to_json(self) -> dict:
        return {
            "clip_merges": [" ".join(pair) for pair in self.bpe.merges],
            "clip_vocab": self.bpe.vocab,
            "t5_pieces": self.unigram.pieces,
            "t5_lower_case": self.unigram.lower_case,
            "words": sorted(self.words),
        }

    @classmethod
    def from_json(cls, content: dict) -> "Tokenizers":
        merges = [tuple(pair.split(" ")) for pair in content["clip_merges"]]
        pieces = [(piece, score) for piece, score in content["t5_pieces"]]
        return cls(
            BPE(merges, content["clip_vocab"]),
            Unigram(pieces, content["t5_lower_case"]),
            frozenset(content["words"]),
        )

    def unknown_words(self, prompts: Collection[str]) -> list[str]:
        """Words of the prompts that occur in no caption, each once, in order. A number is
        known if its digits are, and captions contain numbers at least as long."""
        if not self.words:
            return []
        numbers = [word for word in self.words if word.isdecimal()]
        longest, digits = max(map(len, numbers), default=0), set("".join(numbers))

        def is_known(word: str) -> bool:
            spelled = word.isdecimal() and len(word) <= longest and digits.issuperset(word)
            return word in self.words or spelled

        said = [word for prompt in prompts for word in prompt.lower().split()]
        return [word for word in dict.fromkeys(said) if not is_known(word)]


def make_encoders(config: TextConfig) -> nn.ModuleDict:
    """The three encoders with fresh weights."""
    made = (CLIPText(config.clip_l), CLIPText(config.clip_g), T5Encoder(config.t5))
    return nn.ModuleDict(dict(zip(ENCODERS, made, strict=True)))


# --- what may be asked for ------------------------------------------------------------------------


def check_prompts(prompts: str | Collection[str], negative: str = "") -> list[str]:
    """The prompts as a list. Raises InputError if any is not text, or there is none."""
    if isinstance(prompts, Set):
        raise InputError("prompts must be text or a list of texts, got a set, which has no order")
    prompts = several("prompts", prompts, "text or a list of texts")
    if not prompts:
        raise InputError("no prompts given")
    for prompt in (*prompts, negative):
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, got {shown(prompt)}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(
                f"prompt {shown(prompt)}: is not valid Unicode; was it typed in UTF-8?"
            )
    return prompts


def dropped_encoders(drop: str | Collection[str]) -> list[str]:
    """The text encoders to leave out. Raises InputError for a name that is not an encoder's."""
    names = several("drop", drop, "the name of a text encoder or a list of them")
    for name in names:
        if name not in ENCODERS:
            raise InputError(f"drop: no encoder {shown(name)}; there are {', '.join(ENCODERS)}")
    return names


def check_t5_length(t5_length: int | None) -> int | None:
    """The number of tokens for T5; None is the config's."""
    if t5_length is None:
        return None
    length = whole_number("t5_length", t5_length)
    if length < 1:
        raise InputError(f"t5_length must be at least 1, got {length}")
    if length > MAX_T5_LENGTH:
        raise InputError(f"t5_length must be at most {MAX_T5_LENGTH}, got {length}")
    return length


# --- the three together ---------------------------------------------------------------------------


class TextEncoders:
    """Prompts to (context, pooled) of the widths that a transformer reads (Dc, Dp). An encoder that
    is not among the `parts` counts as dropped."""

    def __init__(
        self,
        config: TextConfig,
        tokenizers: Tokenizers,
        parts: LazyModules,
        context_dim: int,
        pooled_dim: int,
    ):
        self.config, self.tokenizers, self.parts = config, tokenizers, parts
        self.context_dim, self.pooled_dim = context_dim, pooled_dim

    def clip_ids(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, Lc) for CLIP-L and for CLIP-G, which pad differently."""
        bpe = self.tokenizers.bpe
        encoded = [bpe.encode(prompt) for prompt in prompts]

        def padded(config: CLIPConfig) -> Tensor:
            pad = bpe.end if config.pad < 0 else config.pad
            return torch.tensor([pad_or_truncate(ids, config.length, pad) for ids in encoded])

        return padded(self.config.clip_l), padded(self.config.clip_g)

    def t5_ids(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Ids (B, Lt) for T5; `length` None is the config's."""
        encode, length = self.tokenizers.unigram.encode, length or self.config.t5.length
        return torch.tensor([pad_or_truncate(encode(prompt), length, PAD) for prompt in prompts])

    def truncated(
        self, prompts: list[str], t5_length: int | None = None, drop: Collection[str] = ()
    ) -> list[str]:
        """A line for each prompt that is too long for an encoder and will be truncated."""
        bpe, unigram = self.tokenizers.bpe, self.tokenizers.unigram
        heard = [name for name in ENCODERS if name in self.parts and name not in drop]
        limits = {}
        if "clip_l" in heard or "clip_g" in heard:
            limits["the CLIPs"] = (bpe.encode, self.config.clip_l.length)
        if "t5" in heard:
            limits["T5"] = (unigram.encode, t5_length or self.config.t5.length)
        lines = []
        for prompt in prompts:
            tokens = {name: len(encode(prompt)) for name, (encode, _) in limits.items()}
            cut = [
                f"{name} ({length} of {tokens[name]} tokens kept)"
                for name, (_, length) in limits.items()
                if tokens[name] > length
            ]
            if cut:
                lines.append(f"too long for {' and '.join(cut)}, cut at the end: {shown(prompt)}")
        return lines

    def absent(self, drop: Collection[str]) -> list[str]:
        """Warnings about absent encoders. Raises InputError for a CLIP."""
        absent = [name for name in ENCODERS if name not in self.parts and name not in drop]
        for name in absent:
            if name != "t5":
                raise InputError(
                    f"{name} is absent; name its file ({options_of([name])}), "
                    f"or leave it out knowingly (--drop {name})"
                )
        message = "t5 is absent; zeros stand for its tokens, as when it was dropped in training"
        return [message] if absent else []

    def remarks(
        self, prompts: list[str], t5_length: int | None, drop: Collection[str]
    ) -> list[str]:
        """Warnings about distinct prompts. Raises InputError if a CLIP is absent."""
        remarks = self.absent(drop)
        if unknown := self.tokenizers.unknown_words(prompts):
            words = listed([shown(word) for word in unknown], 20)
            remarks.append(f"words that occur in no training caption: {words}")
        return remarks + self.truncated(prompts, t5_length, drop)

    def run(self, name: str, ids: Tensor, drop: Collection[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and, for the CLIPs, pooled vector (B, D) of one encoder; zeros if it
        is dropped or absent. Raises InputError if they are not finite."""
        config = getattr(self.config, name)
        if name in drop or name not in self.parts:
            states = torch.zeros(*ids.shape, config.width, device=self.parts.device)
            return states, states[:, 0]
        widest = config.hidden if name == "t5" else 4 * config.width
        chunk = max(1, MAX_TEXT_ACTIVATIONS // (ids.shape[1] * widest))
        with self.parts.using(name):
            encoder = self.parts[name]
            outputs = [encoder(part) for part in ids.to(self.parts.device).split(chunk)]
            del encoder
        if name == "t5":
            outputs = [(states, states[:, 0]) for states in outputs]
        states, pooled = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        if not (states.isfinite().all() and pooled.isfinite().all()):
            raise InputError(
                f"{name}: its output is not finite; float16 is too narrow for it, "
                "take float32 or bfloat16"
            )
        return states, pooled

    @torch.no_grad()
    def encode(
        self, prompts: list[str], drop: Collection[str] = (), t5_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp) of the prompts; `drop` leaves out encoders.

        Where the config says so, "" gives zeros, the input of samples trained without text.
        Raises InputError for a name in `drop` that is not an encoder's.
        """
        drop = dropped_encoders(drop)
        ids_l, ids_g = self.clip_ids(prompts)
        states_l, pooled_l = self.run("clip_l", ids_l, drop)
        states_g, pooled_g = self.run("clip_g", ids_g, drop)
        states_t5, _ = self.run("t5", self.t5_ids(prompts, t5_length), drop)
        context = widened(join_context(states_l, states_g, states_t5), self.context_dim)
        pooled = widened(torch.cat([pooled_l, pooled_g], dim=1), self.pooled_dim)
        if not self.config.empty_is_zero:
            return context, pooled
        keep = torch.tensor([[bool(prompt.strip())] for prompt in prompts]).expand(-1, 3)
        return drop_encoders(context, pooled, keep, self.config)


def rows_of(text: dict[str, tuple[Tensor, Tensor]], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Context (B, M, Dc) and pooled (B, Dp) of prompts that are already encoded."""
    context, pooled = zip(*(text[prompt] for prompt in prompts), strict=True)
    return torch.stack(context), torch.stack(pooled)
