"""Where checkpoints keep their state dict, and what its names are without the wrappers around the
net.

Training scripts nest the state dict in a larger dictionary, and wrappers (DataParallel, a
normalizing layer in front, an attack around the net) add prefixes and entries of their own.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from dd_jax.pretrained.errors import WeightsError

NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "last", "best")
"""Keys of the weights in checkpoints of training scripts. The first that is present is taken: of
"last" and "best" the last weights, as RobustBench does.
"""
PREFIXES = ("module.", "model.", "net.", "network.", "basic_net.", "0.", "1.")
"""What DataParallel, torch.compile's and the authors' wrappers and nn.Sequential put before every
name.
"""
MU, SIGMA = "mu", "sigma"  # The names of a net's own normalization here, as in RobustBench.
_MEANS = {MU: SIGMA, "mean": "std", "new_mean": "new_std"}
"""From the names that wrappers give to the mean to those of its standard deviation."""
_COPIES = "attacker."  # The `robustness` library stores the net and its normalization once more.
_MOST_PREFIXES = 4  # DataParallel of DataParallel of DeepFool has three.
_NAMES_SHOWN, _NAME_LENGTH = 5, 60  # Of names from files in errors.


def find_state_dict(path: str | os.PathLike, contents: Any, tensor_type: type) -> dict[str, Any]:
    """The tensors by name in the contents of a PyTorch file, with the names of the file.

    Raises WeightsError if there are none, or other values among them.
    """
    for _ in NESTED_UNDER:
        key = next((key for key in NESTED_UNDER if _has_mapping(contents, key)), None)
        contents = contents if key is None else contents[key]
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(
            f"{os.fspath(path)} holds no state dict; write one with torch.save(net.state_dict(), "
            f"path)."
        )
    others = [
        name
        for name, value in contents.items()
        if not (type(name) is str and isinstance(value, tensor_type))
    ]
    if others:
        named = ", ".join(shown(name) for name in others[:_NAMES_SHOWN])
        more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
        raise WeightsError(
            f"{os.fspath(path)} has {named}{more} among its tensors; write it with "
            f"torch.save(net.state_dict(), path)."
        )
    return dict(contents)


def _has_mapping(contents: Any, key: str) -> bool:
    return isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping)


def shown(value: Any) -> str:
    """The first characters of a text from a file, or the type of another value.

    Nested shared tuples would take too long to print.
    """
    return str(value)[:_NAME_LENGTH] if type(value) in (str, int) else type(value).__name__


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """From the net's own names of its weights to the names in a file.

    A prefix of `PREFIXES` that all names share is dropped, repeatedly. A mean and a standard
    deviation that a wrapper normalizes the inputs with (`mu` and `sigma`, `mean` and `std`,
    `normalizer.new_mean` and `new_std`, "0.mean" and "0.std", ...) are called "mu" and "sigma".
    The second copy of all weights that the `robustness` library writes is left out. If two names
    would become one, all names stay as they are.
    """
    given = tuple(names)
    plain = {name: name for name in given}
    normalization: dict[str, str] = {}
    for _ in range(_MOST_PREFIXES):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in plain)), "")
        plain = {name.removeprefix(prefix): file_name for name, file_name in plain.items()}
        if any(not name.startswith(_COPIES) for name in plain):
            plain = {name: old for name, old in plain.items() if not name.startswith(_COPIES)}
        found = {} if normalization else _own_normalization(plain)
        normalization |= {role: plain.pop(name) for role, name in found.items()}
    plain |= normalization
    is_copy = {name for name in given if name.rpartition(_COPIES)[1]}
    is_whole = len(plain) + len(is_copy) >= len(set(given))
    return plain if is_whole else {name: name for name in given}


def _own_normalization(names: Iterable[str]) -> dict[str, str]:
    """{"mu": name, "sigma": name} of a layer that has these two entries and no others, or of the
    net itself; empty if there is none.
    """
    by_layer: dict[str, set[str]] = {}
    for name in names:
        layer, _, entry = name.rpartition(".")
        by_layer.setdefault(layer, set()).add(entry)
    for layer, entries in by_layer.items():
        for mean, std in _MEANS.items():
            if {mean, std} <= entries and (not layer or len(entries) == 2):
                start = f"{layer}." if layer else ""
                return {MU: f"{start}{mean}", SIGMA: f"{start}{std}"}
    return {}
