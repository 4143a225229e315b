"""Compare a checkpoint with what the model needs: missing, unexpected and misshapen tensors.

Loading is strict: every tensor must be there, in the right shape, in floating point. Unexpected
tensors are reported (except a few that official files are known to hold) and ignored; but if they
belong to the network itself, such as a block beyond its depth, it is another model and is refused.
No weights are read: shapes are compared with those of modules on the meta device.
"""

import re
from dataclasses import dataclass

from nanosd3.components import COMPONENTS, shapes
from nanosd3.config import CONFIGS
from nanosd3.config_types import Config
from nanosd3.errors import InputError
from nanosd3.official.checkpoint import Checkpoint
from nanosd3.official.key_names import is_known_extra
from nanosd3.official.tensors import State

NETWORK = {  # keys of a network's own layers, and of layers that other versions have
    "mmdit": r"joint_blocks\.|context_processor\.|register(_tokens)?$",
    "vae": r"(encoder|decoder)\.(down|up|mid)\.",
    "clip_l": r"text_model\.encoder\.",
    "clip_g": r"text_model\.encoder\.",
    "t5": r"encoder\.block\.",
}


@dataclass(frozen=True)
class Comparison:
    """A component's tensors compared with what the model needs."""

    matching: int
    nbytes: int
    dtypes: list[str]
    missing: list[str]
    misshapen: list[str]  # of the wrong shape, or not floating point
    unexpected: list[str]
    beyond: list[str]  # the unexpected ones that belong to the network itself


def check_part(config: Config, name: str, state: State) -> Comparison:
    """Compare the tensors of the component `name` with what the model needs."""
    needed = shapes(config, name)
    present = {key: state[key] for key in needed if key in state}
    # Single files may hold a projection for CLIP-L, which SD3 does not use.
    ignored = "text_projection.weight" if name == "clip_l" else ""
    wrong_shape = [
        f"{tensor.name}: has shape {tensor.shape}, expected {needed[key]}"
        for key, tensor in present.items()
        if tensor.shape != needed[key]
    ]
    wrong_dtype = [
        f"{tensor.name}: has dtype {tensor.dtype}, expected floating point"
        for tensor in present.values()
        if not tensor.dtype.is_floating_point
    ]
    unexpected = {
        key: tensor.name
        for key, tensor in state.items()
        if key not in needed and key != ignored and not is_known_extra(key)
    }
    return Comparison(
        matching=sum(tensor.shape == needed[key] for key, tensor in present.items()),
        nbytes=sum(tensor.nbytes for tensor in present.values()),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in present.values()}),
        missing=[key for key in needed if key not in state],
        misshapen=wrong_shape + wrong_dtype,
        unexpected=list(unexpected.values()),
        beyond=[tensor for key, tensor in unexpected.items() if re.match(NETWORK[name], key)],
    )


def report(checkpoint: Checkpoint) -> str:
    """A table of the checkpoint's components, and a list of the tensors that do not match."""
    sampling, t5 = checkpoint.config.sampling, checkpoint.config.text.t5
    nearly = "nearly " if checkpoint.config.name in CONFIGS and problems_of(checkpoint) else ""
    lines = [
        f"{checkpoint.path}: {nearly}{checkpoint.config.name} ({checkpoint.detected_by})",
        f"sampled with {sampling.steps} steps of {sampling.sampler}, guidance "
        f"{sampling.guidance:g}, shift {sampling.shift:g}; T5 length {t5.length}",
        f"{'component':9}{'tensors':>9}{'MB':>10}  {'dtype':18}{'missing':>8}{'misshapen':>11}"
        f"{'unexpected':>12}",
    ]
    details = []
    for name in COMPONENTS:
        if name not in checkpoint.parts:
            lines.append(f"{name:9}{'absent':>9}")
            continue
        c = check_part(checkpoint.config, name, checkpoint.parts[name])
        lines.append(
            f"{name:9}{c.matching:9}{c.nbytes / 1e6:10,.0f}  {', '.join(c.dtypes):18}"
            f"{len(c.missing):8}{len(c.misshapen):11}{len(c.unexpected):12}"
        )
        for problem in ("missing", "misshapen", "unexpected"):
            details += [f"  {name}, {problem}: {entry}" for entry in getattr(c, problem)]
    details += [f"  in no component: {name}" for name in checkpoint.unassigned]
    return "\n".join(lines + details)


def problems_of(checkpoint: Checkpoint) -> list[str]:
    """What is missing or misshapen, and what belongs to another model."""
    parts = checkpoint.parts.items()
    return [p for name, state in parts for p in problems_of_part(checkpoint.config, name, state)]


def problems_of_part(config: Config, name: str, state: State) -> list[str]:
    """The same for one component, compared with what the config needs."""
    comparison = check_part(config, name, state)
    return [
        *(f"{name} lacks {key}" for key in comparison.missing),
        *(f"{name} {entry}" for entry in comparison.misshapen),
        *(f"{name} of this size has no {key}" for key in comparison.beyond),
    ]


def check(checkpoint: Checkpoint) -> None:
    """Raise InputError listing the tensors that are missing, misshapen or from another model."""
    if problems := problems_of(checkpoint):
        kinds = "missing or misshapen"
        if any(" has no " in problem for problem in problems):
            kinds = "missing, misshapen or unknown"
        nearly = f"nearly {name}, but " if (name := checkpoint.config.name) in CONFIGS else ""
        more = f" ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(
            f"{checkpoint.path}: {nearly}{len(problems)} tensors {kinds}: "
            f"{'; '.join(problems[:20])}{more}"
        )
