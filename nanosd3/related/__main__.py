"""Train a related system on a finished run: `python -m nanosd3.related list`."""

import sys

from nanosd3.cli import run_main
from nanosd3.errors import InputError, shown
from nanosd3.related.cascade_system import CascadeSystem
from nanosd3.related.command import System, run_system
from nanosd3.related.dit_system import DiTSystem
from nanosd3.related.edit_command import run_editing
from nanosd3.related.hdit_system import HDiTSystem
from nanosd3.related.muse_system import MuseSystem
from nanosd3.related.sample_command import SamplingSystem, has_option, run_sampling
from nanosd3.related.train_consistency import Consistency
from nanosd3.related.train_consistency_decoder import ConsistencyDecoding
from nanosd3.related.train_paths import Paths
from nanosd3.related.video_system import VideoSystem
from nanosd3.torch_settings import usual_settings

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        DiTSystem(),
        Paths(),
        Consistency(),
        ConsistencyDecoding(),
        HDiTSystem(),
        MuseSystem(),
        CascadeSystem(),
        VideoSystem(),
    )
}


def listing() -> str:
    """A line for each system."""
    width = max(map(len, SYSTEMS))
    return "\n".join(f"{s.name:{width}}  {s.what} {s.paper}" for s in SYSTEMS.values())


def system_of(name: str) -> System:
    """The system of a name. Raises InputError if there is none."""
    if name not in SYSTEMS:
        raise InputError(f"no system {shown(name)}; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


@usual_settings()
def main(arguments: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["list"]
    if name in ("list", "-h", "--help"):
        print("python -m nanosd3.related NAME [options]; options of one: NAME --help\n")
        print(listing())
        if name != "list":
            sys.exit(0)  # as argparse does
        return 0
    system = system_of(name)
    if has_option("--sample", rest):
        if not isinstance(system, SamplingSystem):
            raise InputError(f"--sample: {name} has none; `nanosd3.generate` opens what can draw")
        return run_sampling(system, rest)
    if has_option("--edit", rest):
        if not isinstance(system, MuseSystem):
            raise InputError(f"--edit: {name} has none; muse has")
        return run_editing(system, rest)
    return run_system(system, rest)


if __name__ == "__main__":
    sys.exit(run_main(main))
