"""Makes torch_tensors.pth and torch_tensors_legacy.pth: what torch.save writes, for the readers of
files to be tested on.

    pip install torch==2.13.0 numpy
    python tests/golden/make_torch_files.py

`CONTENTS` says what is in them, so that the test needs no PyTorch.
"""

import collections
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
COUNT = np.arange(24).reshape(2, 3, 4)
CONTENTS = {  # From the name of each tensor to its values and its dtype in the file.
    "of_float32": (COUNT / 8, "float32"),
    "of_float64": (COUNT / 8, "float64"),
    "of_float16": (COUNT / 8, "float16"),
    "of_bfloat16": (COUNT / 8, "bfloat16"),
    "of_int64": (COUNT, "int64"),
    "parameter": (COUNT / 8, "float32"),
    "transposed": (COUNT.transpose(2, 0, 1) / 8, "float32"),
    "every_other": (COUNT[1, :, ::2] / 8, "float32"),  # strided, from the middle of its storage
    "expanded": (np.broadcast_to(np.array([[1.0], [2.0]]), (2, 3)), "float32"),  # stride 0
    "scalar": (np.array(7.5), "float32"),
    "empty": (np.zeros((0, 3)), "float32"),
}


def main() -> None:
    """Writes both files; in the zip file the state dict lies in a checkpoint, as training scripts
    write them.
    """
    import torch

    tensors = {
        name: torch.from_numpy(np.array(value, order="C")) for name, (value, _) in CONTENTS.items()
    }
    tensors = {
        name: tensor.to(getattr(torch, CONTENTS[name][1])) for name, tensor in tensors.items()
    }
    count = tensors["of_float32"]
    tensors["parameter"] = torch.nn.Parameter(tensors["parameter"])
    tensors["transposed"] = count.permute(2, 0, 1)  # shares its storage
    tensors["every_other"] = count[1, :, ::2]
    tensors["expanded"] = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    state = collections.OrderedDict((f"module.{name}", tensor) for name, tensor in tensors.items())
    state._metadata = {"": {"version": 1}}  # as in the state dicts of modules
    optimizer = torch.optim.SGD([tensors["parameter"]], lr=0.1, momentum=0.9).state_dict()
    torch.save(
        {"epoch": 3, "state_dict": state, "optimizer": optimizer, "best": None},
        HERE / "torch_tensors.pth",
    )
    torch.save(tensors, HERE / "torch_tensors_legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
