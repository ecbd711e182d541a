"""Makes cifar_resnet_logits.json: what PyTorch computes with PreActResNet-18 and WideResNet-28-10,
weights and images drawn by NumPy from a seed.

    pip install torch==2.13.0 numpy
    cd tests && python -m golden.make_cifar_resnet_logits

Weights are not stored: the test draws them again. The nets are written out here, with the names of
the layers in RobustBench (PreActResNet with PreActBlockV2 and bn_before_fc) and in TRADES.
"""

import json
import pathlib

import numpy as np
from golden.make_imagenet_logits import SEED, image, state_dict, torchvision_input

HERE = pathlib.Path(__file__).parent
SIZE = 32
# the rows, and the columns, at which input gradients are stored
PIXELS = (0, 1, 2, 9, 15, 16, 30, 31)
# From the name of each net to its last layer, and a scale for that layer's weights at which logits
# are of the order of one.
NETS = {"preactresnet18": ("linear", 0.1), "wideresnet28_10": ("fc", 0.1)}
BATCH_SIZE = 4  # of the batch by whose statistics is normalized
# The batch normalizations of PreActResNet-18 whose updated statistics are stored.
UPDATED = ("layer1.0.bn1", "layer2.0.bn2", "layer4.1.bn1", "bn")
CHANNELS = (0, 1, 2, 31, 62, 63)


def batch() -> np.ndarray:
    """Inputs (BATCH_SIZE, height, width, 3): the picture and darker and mirrored ones of it."""
    first = image(SIZE)
    pictures = [first, first[::-1] * 0.5, first[:, ::-1] * 0.25, np.clip(first + 60, 0, 255)]
    return np.stack([torchvision_input(picture) for picture in pictures])


def _modules() -> dict:
    import torch.nn.functional as F
    from torch import nn

    def convolution(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride, shortcut):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 3, stride)
            self.bn2, self.conv2 = nn.BatchNorm2d(outputs), convolution(outputs, outputs, 3)
            self.projection = shortcut
            if inputs != outputs:
                projection = convolution(inputs, outputs, 1, stride)
                # RobustBench's shortcut is a sequence of one layer, TRADES' the layer itself.
                setattr(
                    self,
                    shortcut,
                    nn.Sequential(projection) if shortcut == "shortcut" else projection,
                )

        def forward(self, x):
            active = F.relu(self.bn1(x))
            y = self.conv2(F.relu(self.bn2(self.conv1(active))))
            return y + (getattr(self, self.projection)(active) if x.shape != y.shape else x)

    def stage(inputs, outputs, count, stride, shortcut):
        return nn.Sequential(
            *(
                Block(outputs if i else inputs, outputs, 1 if i else stride, shortcut)
                for i in range(count)
            )
        )

    class PreActResNet18(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = convolution(3, 64, 3)
            self.layer1 = stage(64, 64, 2, 1, "shortcut")
            self.layer2 = stage(64, 128, 2, 2, "shortcut")
            self.layer3 = stage(128, 256, 2, 2, "shortcut")
            self.layer4 = stage(256, 512, 2, 2, "shortcut")
            self.bn, self.linear = nn.BatchNorm2d(512), nn.Linear(512, 10)

        def forward(self, x):
            x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
            return self.linear(F.avg_pool2d(F.relu(self.bn(x)), 4).flatten(1))

    class Stage(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.layer = stage(inputs, outputs, 4, stride, "convShortcut")

        def forward(self, x):
            return self.layer(x)

    class WideResNet28x10(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = convolution(3, 16, 3)
            self.block1, self.block2 = Stage(16, 160, 1), Stage(160, 320, 2)
            self.block3 = Stage(320, 640, 2)
            self.bn1, self.fc = nn.BatchNorm2d(640), nn.Linear(640, 10)

        def forward(self, x):
            x = self.block3(self.block2(self.block1(self.conv1(x))))
            return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))

    return {"preactresnet18": PreActResNet18, "wideresnet28_10": WideResNet28x10}


def _torch_input(images: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def figures(name: str, module) -> dict:
    """Number and names of the weights, logits of one image, and an input gradient, in float64.

    input_gradient: of logit 0 minus logit 1, at the stored pixels of the first channel.
    """
    import torch

    shapes = {
        entry: tuple(value.shape) for entry, value in module.state_dict().items() if value.ndim
    }
    arrays = state_dict(shapes, *NETS[name])
    module.load_state_dict(
        {entry: torch.from_numpy(array) for entry, array in arrays.items()}, strict=False
    )
    module.double().eval()
    x = _torch_input(batch()[:1]).requires_grad_()
    logits = module(x)
    (gradient,) = torch.autograd.grad(logits[0, 0] - logits[0, 1], x)
    return {
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
        "sum_of_weights": float(sum(array.sum(dtype=np.float64) for array in arrays.values())),
        "logits": logits[0].tolist(),
        "input_gradient": gradient[0, 0][list(PIXELS), list(PIXELS)].tolist(),
        "input_gradient_norm": gradient.norm().item(),
    }


def training_figures(module) -> dict:
    """Logits of a batch in PyTorch's training mode, and the running averages after that call."""
    module.train()
    logits = module(_torch_input(batch()))
    layers = dict(module.named_modules())
    return {
        "logits": logits.tolist(),
        "running_mean": {n: layers[n].running_mean[list(CHANNELS)].tolist() for n in UPDATED},
        "running_var": {n: layers[n].running_var[list(CHANNELS)].tolist() for n in UPDATED},
    }


def main() -> None:
    """Writes the file, with the versions that made it."""
    import torch

    torch.set_num_threads(2)
    modules = {name: module() for name, module in _modules().items()}
    nets = {name: figures(name, module) for name, module in modules.items()}
    made_with = f"torch {torch.__version__}, numpy {np.__version__}, seed {SEED}"
    contents = {
        "made_with": made_with,
        "nets": nets,
        "training": training_figures(modules["preactresnet18"]),
    }
    (HERE / "cifar_resnet_logits.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
