"""Makes the repository of the fused solver for the `kernels` library, from the package's own files.

    python scripts/make_kernel.py --output-dir build/optvq-sinkhorn

Copies kernels/optvq-sinkhorn, adds the solver's modules to its sources in torch-ext, and writes the build for any machine
(Triton compiles on first use), which `kernels.get_local_kernel` loads from there, and `kernels.get_kernel` from the Hub.
"""

import argparse
import json
import shutil
import tomllib
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
MODULES = (
    "costs",
    "distances",
    "nearest",
    "sinkhorn",
    "sinkhorn_blocks",
    "sinkhorn_fused",
    "sinkhorn_kernels",
    "sinkhorn_rows",
    "solver_choice",
    "solver_inputs",
)


def make_kernel(output_dir: Path) -> None:
    """Writes the repository to a folder, which must not be there yet."""
    source = REPOSITORY / "kernels" / "optvq-sinkhorn"
    shutil.copytree(source, output_dir)
    general = tomllib.loads((source / "build.toml").read_text())["general"]
    module = general["name"].replace("-", "_")
    package = output_dir / "torch-ext" / module
    for name in MODULES:
        shutil.copy(REPOSITORY / "src" / "optvq_hf" / f"{name}.py", package)
    build = output_dir / "build" / "torch-universal"
    shutil.copytree(package, build)
    metadata = {
        "id": f"{module}_{general['version']}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    output_dir = parser.parse_args().output_dir
    make_kernel(output_dir)
    print(f"kernel     {output_dir}")
