"""The book's drawings: `python notebooks/draw.py` writes them all to nanosd3/assets/pictures, with
the moving ones and their stills.

They are written as text, without a library; sizes come from the configs and curves from the
package's functions, and tests compare them with the modules. Two runs are the same byte for byte.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from drawings import blocks, flow, latents, motion, overview, text  # noqa: E402

FOLDER = ROOT / "nanosd3" / "assets" / "pictures"
DRAWINGS = {
    "model.svg": overview.model,
    "rectified_flow.svg": flow.rectified_flow,
    "timesteps.svg": flow.timesteps,
    "patches.svg": latents.patches,
    "joint_block.svg": blocks.joint_block,
    "last_block.svg": blocks.last_block,
    "adaln_zero.svg": blocks.adaln_zero,
    "guidance.svg": flow.guidance,
    "vae.svg": latents.autoencoder,
    "encoders.svg": text.encoders,
    "moons_still.svg": motion.moons_still,
    "following_still.svg": motion.following_still,
}
MOVING = {"moons.svg": motion.moons_moving, "following.svg": motion.following}


def main() -> None:
    for name, draw in (DRAWINGS | MOVING).items():
        (FOLDER / name).write_bytes(draw().encode())


if __name__ == "__main__":
    main()
