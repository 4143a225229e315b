"""The names of official weights: one table, read in both directions.

Two layouts are in use. A *single file* has all parts under prefixes, and inside each the names
that our modules have too. A *diffusers* folder has a subfolder for each part and other names:
queries, keys and values apart, (scale, shift) for (shift, scale) in the two modulations that
have no gate, the decoder's levels counted from the inside, 1x1 convolutions of the autoencoder's
attention as matrices. The text encoders have the names of transformers in both.

`from_diffusers` and `to_diffusers` map a part's whole dictionary of `Stored` tensors; the
numbers move only when one is read. A name that is in no table stays as it is, and so is found
and reported as unexpected later.
"""

import re

from nanosd3.parts import State, Stored, stack_rows

COMPONENTS = ("mmdit", "vae", "clip_l", "clip_g", "t5")
PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
FOLDERS = {  # of diffusers: subfolder, file name
    "mmdit": ("transformer", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "clip_l": ("text_encoder", "model"),
    "clip_g": ("text_encoder_2", "model"),
    "t5": ("text_encoder_3", "model"),
}

# Ours and single file | diffusers. {} is one step of a name. Several names on the right: their
# rows are stacked. "swap": the halves change places. "reversed": the first number counts down.
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


def parse(table: str, ours: str = "", theirs: str = "") -> list[tuple[str, list[str], str]]:
    """Rows (our name, their names, what else is different); prefixes go before each name."""
    rows = []
    for line in table.strip().splitlines():
        name, *rest = line.split()
        words = [word for word in rest if "." not in word]
        rows.append((ours + name, [theirs + r for r in rest if "." in r], *(words or [""])))
    return rows


TABLES = {
    "mmdit": parse(BLOCK, "joint_blocks.{}.", "transformer_blocks.{}.") + parse(STEM),
    "vae": parse(VAE),
    "clip_l": [],
    "clip_g": [],
    "t5": [],
}


def match(pattern: str, name: str) -> list[str] | None:
    """What stands at the {} of a pattern, or None."""
    found = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"([^.]+)"), name)
    return list(found.groups()) if found else None


def count(state: State, part: str) -> int:
    """How many numbers follow `part` in the names, which count from 0."""
    numbers = [int(n) for name in state for n in re.findall(rf"(?:^|\.){part}\.(\d+)\.", name)]
    return max(numbers, default=-1) + 1


def alter(tensor: Stored, name: str, what: str, last_block: int, to_diffusers: bool) -> Stored:
    """Apply what is different between the layouts, besides the name, to one tensor of ours."""
    ungated = f"joint_blocks.{last_block}.context_block.adaLN_modulation."
    if what == "swap" or name.startswith(ungated):
        return tensor.halves_swapped()
    if what == "matrix" and to_diffusers and len(tensor.shape) == 4:
        return tensor.reshaped(tensor.shape[:2])
    if what == "matrix" and not to_diffusers and len(tensor.shape) == 2:
        return tensor.reshaped((*tensor.shape, 1, 1))
    return tensor


def to_diffusers(component: str, state: State) -> State:
    """Our tensors of one part under diffusers' names."""
    blocks, levels = count(state, "joint_blocks"), count(state, "up")
    out = {}
    for name, tensor in state.items():
        for ours, theirs, what in TABLES[component]:
            if (steps := match(ours, name)) is None:
                continue
            if what == "reversed":
                steps[0] = str(levels - 1 - int(steps[0]))
            tensor = alter(tensor, name, what, blocks - 1, to_diffusers=True)
            for i, pattern in enumerate(theirs):
                share = tensor.rows(i, len(theirs)) if len(theirs) > 1 else tensor
                out[pattern.format(*steps)] = share
            break
        else:
            out[name] = tensor
    return out


def from_diffusers(component: str, state: State) -> State:
    """Tensors of one part from diffusers' names to ours. Of stacked tensors all are needed: of
    an incomplete set the rest stay under their own names."""
    blocks, levels = count(state, "transformer_blocks"), count(state, "up_blocks")
    out = {}
    for name, tensor in state.items():
        for ours, theirs, what in TABLES[component]:
            if (steps := match(theirs[0], name)) is None:
                continue
            names = [pattern.format(*steps) for pattern in theirs]
            if not stackable(names, state):
                continue
            if what == "reversed" and steps[0].isdecimal():
                steps[0] = str(levels - 1 - int(steps[0]))
            ours = ours.format(*steps)
            if len(names) > 1:
                tensor = stack_rows([state[other] for other in names])
            out[ours] = alter(tensor, ours, what, blocks - 1, to_diffusers=False)
            break
        else:
            if not part_of_stack(component, name, state):
                out[name] = tensor
    return out


def part_of_stack(component: str, name: str, state: State) -> bool:
    """Whether `name` is one of several tensors, all there, that are stacked."""
    for _, theirs, _ in TABLES[component]:
        for pattern in theirs[1:]:
            if (steps := match(pattern, name)) is not None:
                return stackable([other.format(*steps) for other in theirs], state)
    return False


def stackable(names: list[str], state: State) -> bool:
    """Whether these tensors are all there and of one shape."""
    if len(names) == 1:
        return True
    shapes = {state[name].shape if name in state else None for name in names}
    return len(shapes) == 1 and shapes not in ({None}, {()})
