"""Mistakes in backbones and in the experiments that compare them, as in faults_related_fm.py."""

BACKBONES_FILE = "related/backbones.py"
ARMS_FILE, RANKS_OF_ARMS_FILE = "claims/sd3_backbone_networks.py", "claims/sd3_backbones.py"

FAULTS_BACKBONES = [
    (
        BACKBONES_FILE,
        "s = torch.cat([y, x], dim=1)",
        "s = torch.cat([x, y], dim=1)",
        "text for the image",
    ),
    (BACKBONES_FILE, "s, q = x, q[:, :, -N:]", "s, q = x, q[:, :, :N]", "the text's queries"),
    (
        BACKBONES_FILE,
        "else s[:, :-N]",
        "else y",
        "the text is not updated",
    ),
    (BACKBONES_FILE, "attention(self.ln_q(q), self.ln_k(k), v)", "attention(q, k, v)", "no norms"),
    (
        BACKBONES_FILE,
        "x = x + self.cross_attn(self.norm_cross(x), y)",
        "x = self.cross_attn(self.norm_cross(x), y)",
        "reading in place of a residual",
    ),
    (
        BACKBONES_FILE,
        "self.cross_attn(self.norm_cross(x), y)",
        "self.cross_attn(self.norm_cross(x), x)",
        "the image reads itself",
    ),
    (
        BACKBONES_FILE,
        "streams = (self.clip_block, self.t5_block, self.x_block)",
        "streams = (self.clip_block, self.clip_block, self.x_block)",
        "T5's tokens by CLIP's weights",
    ),
    (
        BACKBONES_FILE,
        "sizes = [self.clip_tokens, y.shape[1] - self.clip_tokens, x.shape[1]]",
        "sizes = [y.shape[1] - self.clip_tokens, self.clip_tokens, x.shape[1]]",
        "the two texts are cut at the wrong place",
    ),
    (
        BACKBONES_FILE,
        "torch.cat([clip, t5], dim=1)",
        "torch.cat([t5, clip], dim=1)",
        "texts change places in every block",
    ),
    (BACKBONES_FILE, "self.norm2(h), 1 + scale)", "self.norm2(h), scale)", "a closed scale"),
    (BACKBONES_FILE, "return x + self.conv2(F.silu(h))", "return self.conv2(F.silu(h))", "no skip"),
    (
        BACKBONES_FILE,
        "h = h + super().forward(h, t, context, pooled, skip)",
        "h = super().forward(h, t, context, pooled, skip)",
        "the high resolution is lost on the way down",
    ),
    (
        BACKBONES_FILE,
        "for block in self.up_blocks:",
        "for block in self.down_blocks:",
        "the same blocks on both sides",
    ),
    (BACKBONES_FILE, "nn.init.zeros_(module.proj.weight)", "pass", "reads before it has learned"),
    (BACKBONES_FILE, "return HEAD_DIM * self.heads", "return 64 * self.depth", "depth widens"),
    (ARMS_FILE, "x.new_zeros(len(x), self.dim)", "x[:, :1].expand(-1, self.dim)", "it is heard"),
    (ARMS_FILE, "if not pooled:", "if pooled:", "with it is without it"),
    (
        ARMS_FILE,
        "conditions.fast else BACKBONE_RECIPE, lr=arm.lr)",
        "conditions.fast else BACKBONE_RECIPE)",
        "one rate for all",
    ),
    (ARMS_FILE, '{"depth": self.depth, ', '{"depth": 2, ', "deeper ones are as deep"),
    (
        RANKS_OF_ARMS_FILE,
        'if text == "tokens" else',
        'if text == "pooled" else',
        "all arms with the pooled text",
    ),
    (
        RANKS_OF_ARMS_FILE,
        "return [losses[-1] for losses in",
        "return [losses[0] for losses in",
        "early losses decide",
    ),
    (RANKS_OF_ARMS_FILE, "ahead and means == sorted(means)", "ahead", "any order behind MMDiT"),
    (
        RANKS_OF_ARMS_FILE,
        "mean < -2 * spread for mean, spread in leads.values()",
        "mean < -spread for mean, spread in leads.values()",
        "one of six pairs at the spread refutes",
    ),
    (
        RANKS_OF_ARMS_FILE,
        "mean < -2 * spread for mean, spread in leads)",
        "mean < -spread for mean, spread in leads)",
        "one of three pairs at the spread refutes",
    ),
    (
        RANKS_OF_ARMS_FILE,
        "for name in AS_LARGE_BACKBONES]",
        "for name in BACKBONES_RANKED[1:]]",
        "smaller ones are compared",
    ),
    (RANKS_OF_ARMS_FILE, "[b / a for a, b in", "[b for a, b in", "one in a hundred of what"),
    (
        RANKS_OF_ARMS_FILE,
        "mean - spread > THIRD_WORTH",
        "mean + spread > THIRD_WORTH",
        "refuted where undecided",
    ),
]
