"""Key names of official weights: one table, read in both directions.

There are two layouts. A *single file* holds every component under a prefix, with our modules' own
key names. A *diffusers* folder has a subfolder for each component, and differs in
  - names;
  - queries, keys and values, which are separate tensors;
  - (scale, shift) instead of (shift, scale) in the two modulations without a gate;
  - the decoder's levels, which are counted from the innermost;
  - the 1x1 convolutions of the autoencoder's attention, which are matrices.
Text encoders have transformers' names in both.

`to_diffusers` and `from_diffusers` convert a component's whole state; no numbers are read until a
tensor is read. A key that is in no table keeps its name and is later reported as unexpected.
"""

import re

from nanosd3.official.tensors import State, StoredTensor, stack_rows

PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}

FOLDERS = {  # subfolder and file stem in diffusers
    "mmdit": ("transformer", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "clip_l": ("text_encoder", "model"),
    "clip_g": ("text_encoder_2", "model"),
    "t5": ("text_encoder_3", "model"),
}

# T5's embedding: our name, and the one that transformers, ComfyUI and others look for.
T5_EMBEDDING, T5_SHARED = "encoder.embed_tokens.weight", "shared.weight"

# Tensors that official files hold and our models do not have.
KNOWN_EXTRAS = r"(.*\.)?(position_ids|logit_scale|shared\.weight|loss\..*|model_ema\..*)"

# Ours | diffusers. {} stands for one dot-separated field. Several names on the right are stacked
# along the rows. swap: the two halves change places. reversed: the first number counts down.
# matrix: a 1x1 convolution of ours.
BLOCK = """
x_block.attn.qkv.{}                   attn.to_q.{} attn.to_k.{} attn.to_v.{}
x_block.attn.ln_q.{}                  attn.norm_q.{}
x_block.attn.ln_k.{}                  attn.norm_k.{}
x_block.attn.proj.{}                  attn.to_out.0.{}
x_block.attn2.qkv.{}                  attn2.to_q.{} attn2.to_k.{} attn2.to_v.{}
x_block.attn2.ln_q.{}                 attn2.norm_q.{}
x_block.attn2.ln_k.{}                 attn2.norm_k.{}
x_block.attn2.proj.{}                 attn2.to_out.0.{}
x_block.adaLN_modulation.1.{}         norm1.linear.{}
x_block.mlp.fc1.{}                    ff.net.0.proj.{}
x_block.mlp.fc2.{}                    ff.net.2.{}
context_block.attn.qkv.{}             attn.add_q_proj.{} attn.add_k_proj.{} attn.add_v_proj.{}
context_block.attn.ln_q.{}            attn.norm_added_q.{}
context_block.attn.ln_k.{}            attn.norm_added_k.{}
context_block.attn.proj.{}            attn.to_add_out.{}
context_block.adaLN_modulation.1.{}   norm1_context.linear.{}
context_block.mlp.fc1.{}              ff_context.net.0.proj.{}
context_block.mlp.fc2.{}              ff_context.net.2.{}
"""

STEM = """
pos_embed                             pos_embed.pos_embed
x_embedder.proj.{}                    pos_embed.proj.{}
t_embedder.mlp.0.{}                   time_text_embed.timestep_embedder.linear_1.{}
t_embedder.mlp.2.{}                   time_text_embed.timestep_embedder.linear_2.{}
y_embedder.mlp.0.{}                   time_text_embed.text_embedder.linear_1.{}
y_embedder.mlp.2.{}                   time_text_embed.text_embedder.linear_2.{}
context_embedder.{}                   context_embedder.{}
final_layer.adaLN_modulation.1.{}     norm_out.linear.{}                            swap
final_layer.linear.{}                 proj_out.{}
"""

VAE = """
encoder.down.{}.block.{}.nin_shortcut.{}  encoder.down_blocks.{}.resnets.{}.conv_shortcut.{}
encoder.down.{}.block.{}.{}.{}            encoder.down_blocks.{}.resnets.{}.{}.{}
encoder.down.{}.downsample.conv.{}        encoder.down_blocks.{}.downsamplers.0.conv.{}
decoder.up.{}.block.{}.nin_shortcut.{}    decoder.up_blocks.{}.resnets.{}.conv_shortcut.{} reversed
decoder.up.{}.block.{}.{}.{}              decoder.up_blocks.{}.resnets.{}.{}.{}            reversed
decoder.up.{}.upsample.conv.{}            decoder.up_blocks.{}.upsamplers.0.conv.{}        reversed
{}.mid.block_1.{}.{}                      {}.mid_block.resnets.0.{}.{}
{}.mid.block_2.{}.{}                      {}.mid_block.resnets.1.{}.{}
{}.mid.attn_1.norm.{}                     {}.mid_block.attentions.0.group_norm.{}
{}.mid.attn_1.q.{}                        {}.mid_block.attentions.0.to_q.{}                matrix
{}.mid.attn_1.k.{}                        {}.mid_block.attentions.0.to_k.{}                matrix
{}.mid.attn_1.v.{}                        {}.mid_block.attentions.0.to_v.{}                matrix
{}.mid.attn_1.proj_out.{}                 {}.mid_block.attentions.0.to_out.0.{}            matrix
{}.norm_out.{}                            {}.conv_norm_out.{}
{}.conv_in.{}                             {}.conv_in.{}
{}.conv_out.{}                            {}.conv_out.{}
"""


TableRow = tuple[str, list[str], str]  # our pattern, diffusers' patterns, how the tensor changes


def parse_table(table: str, our_prefix: str = "", their_prefix: str = "") -> list[TableRow]:
    """Parse a table; the prefixes are put in front of every name."""
    rows = []
    for line in table.strip().splitlines():
        ours, *rest = line.split()
        theirs = [their_prefix + word for word in rest if "." in word]
        changes = [word for word in rest if "." not in word]
        rows.append((our_prefix + ours, theirs, changes[0] if changes else ""))
    return rows


TABLES: dict[str, list[TableRow]] = {
    "mmdit": parse_table(BLOCK, "joint_blocks.{}.", "transformer_blocks.{}.") + parse_table(STEM),
    "vae": parse_table(VAE),
    "clip_l": [],
    "clip_g": [],
    "t5": [],
}


def is_known_extra(name: str) -> bool:
    """Whether official files hold a tensor of this name that none of our models has."""
    return re.fullmatch(KNOWN_EXTRAS, name) is not None


def match(pattern: str, name: str) -> list[str] | None:
    """The fields of a name at each {} of a pattern, or None if it does not match."""
    matched = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"([^.]+)"), name)
    return list(matched.groups()) if matched else None


def count(state: State, field: str) -> int:
    """The length of a module list: how many different numbers follow `field` in the keys.

    Not the largest of them: a single key numbered a million would make a million layers.
    """
    return len({n for name in state for n in re.findall(rf"(?:^|\.){field}\.(\d+)\.", name)})


def convert(
    tensor: StoredTensor, our_name: str, change: str, last_block: int, to_diffusers: bool
) -> StoredTensor:
    """Convert a tensor's contents between the layouts."""
    ungated = f"joint_blocks.{last_block}.context_block.adaLN_modulation."
    if change == "swap" or our_name.startswith(ungated):
        return tensor.halves_swapped()
    if change == "matrix" and to_diffusers and len(tensor.shape) == 4:
        return tensor.reshaped(tensor.shape[:2])
    if change == "matrix" and not to_diffusers and len(tensor.shape) == 2:
        return tensor.reshaped((*tensor.shape, 1, 1))
    return tensor


def to_diffusers(component: str, state: State) -> State:
    """Convert a component's state from our layout to diffusers'."""
    blocks, levels = count(state, "joint_blocks"), count(state, "up")
    out = {}
    for name, tensor in state.items():
        for ours, theirs, change in TABLES[component]:
            if (fields := match(ours, name)) is None:
                continue
            if change == "reversed":
                fields[0] = str(levels - 1 - int(fields[0]))
            tensor = convert(tensor, name, change, blocks - 1, to_diffusers=True)
            for i, pattern in enumerate(theirs):
                rows = tensor.rows(i, len(theirs)) if len(theirs) > 1 else tensor
                out[pattern.format(*fields)] = rows
            break
        else:
            out[name] = tensor
    return out


def from_diffusers(component: str, state: State) -> State:
    """Convert a component's state from diffusers' layout to ours.

    Tensors are stacked only if all of them are there; otherwise those present keep their names.
    """
    blocks, levels = count(state, "transformer_blocks"), count(state, "up_blocks")
    out = {}
    for name, tensor in state.items():
        for ours, theirs, change in TABLES[component]:
            if (fields := match(theirs[0], name)) is None:
                continue
            names = [pattern.format(*fields) for pattern in theirs]
            if not stackable(names, state):
                continue
            if change == "reversed" and fields[0].isdecimal():
                fields[0] = str(levels - 1 - int(fields[0]))
            our_name = ours.format(*fields)
            if len(names) > 1:
                tensor = stack_rows([state[other] for other in names])
            out[our_name] = convert(tensor, our_name, change, blocks - 1, to_diffusers=False)
            break
        else:
            if not stacked_into_first(component, name, state):
                out[name] = tensor
    return out


def stacked_into_first(component: str, name: str, state: State) -> bool:
    """Whether `name` is stacked under the first tensor of its row, as keys are under queries."""
    for _, theirs, _ in TABLES[component]:
        for pattern in theirs[1:]:
            if (fields := match(pattern, name)) is not None:
                return stackable([other.format(*fields) for other in theirs], state)
    return False


def stackable(names: list[str], state: State) -> bool:
    """Whether these tensors are all present, of one shape, and not scalars."""
    if len(names) == 1:
        return True
    shapes = {state[name].shape if name in state else None for name in names}
    return len(shapes) == 1 and shapes not in ({None}, {()})
