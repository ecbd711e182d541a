"""Cuts the authors' golden vectors down to what the tests read.

    python tests/golden/cut.py FOLDER_OF_FULL_VECTORS

Writes one small `.npz` per net beside this file. Parameters are stored as float16 (they are
float16-representable) and gradients only for parameters of at most 100,000 entries, which keeps the
folder at a few MB.
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
LARGEST_GRADIENT = 100_000
KEPT = (
    "input/",
    "hyper/",
    "clean/",
    "deepfool/",
    "loss/",
    "grad/regularizer",
    "grad/total",
    "fixed_source/",
)
DROPPED = ("deepfool/step_norm", "deepfool/input_l2", "deepfool/l2")


def cut_attack_vectors(source: pathlib.Path, name: str) -> None:
    full = np.load(source / f"{name}.npz")
    kept = {}
    for key in full.files:
        value = full[key]
        if key.startswith("param/"):
            kept[key] = value.astype(np.float16)
            assert np.array_equal(kept[key].astype(value.dtype), value), (
                f"{key} is not float16-representable"
            )
        elif (
            key.startswith(KEPT)
            and key not in DROPPED
            and (value.size <= LARGEST_GRADIENT or "grad/" not in key)
        ):
            kept[key] = value
    np.savez_compressed(HERE / f"{name}.npz", **kept)


def cut_pooling_vectors(source: pathlib.Path) -> None:
    full = np.load(source / "overlapping_maxpool.npz")
    names = ("param/", "input/", "logits", "double_backward/")
    kept = {key: full[key] for key in full.files if key.startswith(names)}
    kept["jacobian"] = full["jacobian"].astype(np.float32)
    np.savez_compressed(HERE / "overlapping_maxpool.npz", **kept)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = pathlib.Path(sys.argv[1])
    for name in ("mlp", "lenet", "convnet", "nin", "mlp_degenerate"):
        cut_attack_vectors(source, name)
    cut_pooling_vectors(source)


if __name__ == "__main__":
    main()
