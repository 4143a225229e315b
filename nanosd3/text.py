"""Three text encoders to one conditioning, joined as in SD3.

    CLIP-L states (B, Lc, dl) | CLIP-G states (B, Lc, dg)   side by side, zeros up to T5's width
    T5 states (B, Lt, Dc)                                   behind them, as further tokens
        -> context (B, Lc + Lt, Dc): what the transformer's text stream reads
    CLIP-L pooled (B, dl) | CLIP-G pooled (B, dg)           side by side
        -> pooled (B, dl + dg): what modulates every block, together with the timestep

There are no separators and no positions on text tokens: the encoders have put order into the
states already. In training each encoder is dropped on its own with probability 0.464, its
outputs set to zero (so a tenth of all samples has no text at all, which guidance needs); at
inference any may be left out the same way. The zero tokens stay in the sequence.
Paper: arXiv 2403.03206, section 4, appendix B.3.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.clip import CLIPText
from nanosd3.config import TextConfig
from nanosd3.runtime import InputError
from nanosd3.t5 import T5Encoder
from nanosd3.tokenizers import BPE, PAD, Unigram, fit_length

ENCODERS = ("clip_l", "clip_g", "t5")


def join_context(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """States of the three encoders to the context (B, Lc + Lt, Dc)."""
    clip = torch.cat([clip_l, clip_g], dim=2)  # (B, Lc, dl + dg)
    clip = F.pad(clip, (0, t5.shape[2] - clip.shape[2]))  # (B, Lc, Dc)
    return torch.cat([clip, t5], dim=1)


def drop_encoders(
    context: Tensor, pooled: Tensor, keep: Tensor, config: TextConfig
) -> tuple[Tensor, Tensor]:
    """Zero the outputs of the encoders whose entry in `keep` (B, 3) is False."""
    keep = keep.to(context)
    keep_l, keep_g, keep_t5 = keep[:, :, None].unbind(1)  # each (B, 1)
    dl, dg, length = config.clip_l.width, config.clip_g.width, config.clip_l.length
    B, M, Dc = context.shape
    keep_clip = torch.cat([keep_l.expand(B, dl), keep_g.expand(B, Dc - dl)], dim=1)  # (B, Dc)
    clip, rest = context.split([length, M - length], dim=1)
    context = torch.cat([clip * keep_clip[:, None], rest * keep_t5[:, None]], dim=1)
    return context, pooled * torch.cat([keep_l.expand(B, dl), keep_g.expand(B, dg)], dim=1)


@dataclass
class Tokenizers:
    """Byte pairs for both CLIPs, pieces for T5, and the words of the captions trained on.

    `words` is empty for the official vocabularies, which have seen every word.
    """

    bpe: BPE
    unigram: Unigram
    words: frozenset[str]

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
        """Words of the prompts that stood in no caption, each once, in order."""
        if not self.words:
            return []
        said = [word for prompt in prompts for word in prompt.lower().split()]
        return [word for word in dict.fromkeys(said) if word not in self.words]


class TextEncoders(nn.Module):
    """Prompts to (context, pooled)."""

    def __init__(self, config: TextConfig, tokenizers: Tokenizers):
        super().__init__()
        self.config = config
        self.tokenizers = tokenizers
        self.clip_l = CLIPText(config.clip_l)
        self.clip_g = CLIPText(config.clip_g)
        self.t5 = T5Encoder(config.t5)

    def clip_ids(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, Lc) for CLIP-L and for CLIP-G, which pad differently."""
        bpe = self.tokenizers.bpe
        encoded = [bpe.encode(prompt) for prompt in prompts]
        return tuple(
            torch.tensor([
                fit_length(ids, c.length, bpe.end if c.pad < 0 else c.pad) for ids in encoded
            ])
            for c in (self.config.clip_l, self.config.clip_g)
        )  # fmt: skip

    def t5_ids(self, prompts: list[str]) -> Tensor:
        """Ids (B, Lt) for T5."""
        encode, length = self.tokenizers.unigram.encode, self.config.t5.length
        return torch.tensor([fit_length(encode(prompt), length, PAD) for prompt in prompts])

    def truncated(self, prompts: list[str]) -> list[str]:
        """The prompts that are too long for CLIP or T5, and will be cut."""
        clip, t5 = self.config.clip_l.length, self.config.t5.length
        encode_clip, encode_t5 = self.tokenizers.bpe.encode, self.tokenizers.unigram.encode
        return [p for p in prompts if len(encode_clip(p)) > clip or len(encode_t5(p)) > t5]

    @torch.no_grad()
    def encode(self, prompts: list[str], drop: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """Context (B, M, Dc) and pooled (B, Dp) of the prompts; `drop` leaves out encoders.

        Where the config says so, "" gives zeros, the input of samples trained without text.
        Raises InputError for a name in `drop` that is no encoder.
        """
        for name in drop:
            if name not in ENCODERS:
                raise InputError(f"drop: no encoder {name!r}; there are {', '.join(ENCODERS)}")
        device = self.clip_l.text_model.final_layer_norm.weight.device
        ids_l, ids_g = self.clip_ids(prompts)
        states_l, pooled_l = self.clip_l(ids_l.to(device))
        states_g, pooled_g = self.clip_g(ids_g.to(device))
        context = join_context(states_l, states_g, self.t5(self.t5_ids(prompts).to(device)))
        pooled = torch.cat([pooled_l, pooled_g], dim=1)
        keep = torch.tensor([name not in drop for name in ENCODERS]).expand(len(prompts), 3)
        if self.config.empty_is_zero:
            keep = keep & torch.tensor([[bool(prompt.strip())] for prompt in prompts])
        return drop_encoders(context, pooled, keep.to(device), self.config)
