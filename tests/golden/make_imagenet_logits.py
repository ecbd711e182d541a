"""Makes imagenet_logits.json: what PyTorch computes with the nets for ImageNet, weights and images
drawn by NumPy from a seed.

    pip install torch==2.13.0 numpy
    python tests/golden/make_imagenet_logits.py

Weights are not stored: `state_dict` and `image` draw them again in the test, under PyTorch's names
and in PyTorch's layout. The nets are written out here, with the names of torchvision's and Caffe's
layers; torchvision 0.28's own definitions give the same.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SEED = 20181203
CLASSES = (0, 1, 2, 3, 500, 997, 998, 999)  # whose logits are stored
# the rows, and the columns, at which gradients are stored
PIXELS = (0, 1, 2, 57, 110, 111, 112, 200)
CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)  # gray levels, BGR
TORCH_MEAN, TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB


def state_dict(
    shapes: dict[str, tuple[int, ...]], head: str, head_scale: float
) -> dict[str, np.ndarray]:
    """Weights for PyTorch's names and shapes, drawn in the order of the names; `head` is the last
    layer's name.
    """
    generator = np.random.default_rng(SEED)
    arrays = {}
    for name in sorted(shapes):
        shape = shapes[name]
        draw = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            draw *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
            arrays[name] = draw * np.float32(head_scale if name.startswith(head) else 1)
        elif name.endswith("running_var"):
            arrays[name] = np.float32(0.5) + np.abs(draw)
        elif name.endswith("weight"):
            arrays[name] = 1 + np.float32(0.1) * draw
        else:
            arrays[name] = np.float32(0.1) * draw
    return arrays


def image(size: int) -> np.ndarray:
    """A picture in gray levels, integers from 0 to 255, (height, width, 3): waves and noise,
    different in each channel.
    """
    generator = np.random.default_rng(SEED + size)
    row, column = np.ogrid[:size, :size]
    waves = [np.sin(row / (5 + 3 * i) + i) * np.cos(column / (9 - 2 * i)) for i in range(3)]
    return np.round(
        np.clip(
            128 + 80 * np.stack(waves, -1) + 20 * generator.standard_normal((size, size, 3)), 0, 255
        )
    )


def caffe_input(levels: np.ndarray) -> np.ndarray:
    """What Caffe's AlexNet takes: RGB to BGR, minus the mean, still in gray levels."""
    return levels[:, :, ::-1] - np.array(CAFFE_MEAN)


def torchvision_input(levels: np.ndarray) -> np.ndarray:
    """What torchvision's nets take."""
    return (levels / 255 - np.array(TORCH_MEAN)) / np.array(TORCH_STD)


# From the name of each net to the side of its images, what makes its input, its last layer, and a
# scale for that layer's weights at which logits are of the order of one.
NETS = {
    "alexnet": (227, caffe_input, "fc8", 0.02),
    "alexnet_torchvision": (224, torchvision_input, "classifier.6", 0.25),
    "resnet18": (224, torchvision_input, "fc", 0.1),
}


def _modules() -> dict:
    import torch
    import torch.nn.functional as F
    from torch import nn

    class CaffeAlexNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
            self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
            self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
            self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
            self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
            self.fc6, self.fc7, self.fc8 = (
                nn.Linear(9216, 4096),
                nn.Linear(4096, 4096),
                nn.Linear(4096, 1000),
            )

        def forward(self, x):
            for layer in (self.conv1, self.conv2):
                x = F.local_response_norm(F.relu(layer(x)), 5, alpha=1e-4, beta=0.75, k=1.0)
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = F.relu(self.conv5(F.relu(self.conv4(F.relu(self.conv3(x))))))
            x = F.max_pool2d(x, 3, 2, ceil_mode=True).flatten(1)
            return self.fc8(F.relu(self.fc7(F.relu(self.fc6(x)))))

    class TorchvisionAlexNet(nn.Module):
        def __init__(self):
            super().__init__()
            pool, relu = nn.MaxPool2d(3, 2), nn.ReLU()
            self.features = nn.Sequential(
                nn.Conv2d(3, 64, 11, stride=4, padding=2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool,
                nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu,
                nn.Conv2d(256, 256, 3, padding=1), relu, pool,
            )  # fmt: skip
            self.classifier = nn.Sequential(
                nn.Dropout(),
                nn.Linear(9216, 4096),
                relu,
                nn.Dropout(),
                nn.Linear(4096, 4096),
                relu,
                nn.Linear(4096, 1000),
            )

        def forward(self, x):
            return self.classifier(F.adaptive_avg_pool2d(self.features(x), 6).flatten(1))

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(*shortcut) if stride > 1 else None

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet18(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            inputs = 64
            for i, outputs in enumerate((64, 128, 256, 512), start=1):
                blocks = Block(inputs, outputs, 1 if i == 1 else 2), Block(outputs, outputs, 1)
                setattr(self, f"layer{i}", nn.Sequential(*blocks))
                inputs = outputs
            self.fc = nn.Linear(512, 1000)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    return {
        "alexnet": CaffeAlexNet,
        "alexnet_torchvision": TorchvisionAlexNet,
        "resnet18": ResNet18,
    }


def figures(name: str, module) -> dict:
    """Logits, an input gradient and a gradient of that gradient, in float64.

    input_gradient: of logit 0 minus logit 1, in what the net of this library takes (Caffe's gray
      levels / 255).
    double_gradient: of the sum of its squares, in the first layer's weights.
    """
    import torch

    size, make_input, head, head_scale = NETS[name]
    shapes = {
        entry: tuple(value.shape) for entry, value in module.state_dict().items() if value.ndim
    }
    arrays = state_dict(shapes, head, head_scale)
    module.load_state_dict(
        {entry: torch.from_numpy(array) for entry, array in arrays.items()}, strict=False
    )
    module.double().eval()
    unit = 255.0 if name == "alexnet" else 1.0
    x = torch.from_numpy(make_input(image(size)).transpose(2, 0, 1)[None] / unit).requires_grad_()
    logits = module(x * unit)
    (gradient,) = torch.autograd.grad(logits[0, 0] - logits[0, 1], x, create_graph=True)
    first = next(module.parameters())
    (double_gradient,) = torch.autograd.grad(gradient.square().sum(), first)
    return {
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
        "sum_of_weights": float(sum(array.sum(dtype=np.float64) for array in arrays.values())),
        "logits": logits[0, list(CLASSES)].tolist(),
        "logits_norm": logits.norm().item(),
        "input_gradient": gradient[0, 0][list(PIXELS), list(PIXELS)].tolist(),
        "input_gradient_norm": gradient.norm().item(),
        "double_gradient": double_gradient[:8, 1, 3, 2].tolist(),
        "double_gradient_norm": double_gradient.norm().item(),
    }


def main() -> None:
    """Writes the file, with the versions that made it."""
    import torch

    torch.set_num_threads(2)
    nets = {name: figures(name, module()) for name, module in _modules().items()}
    made_with = f"torch {torch.__version__}, numpy {np.__version__}, seed {SEED}"
    (HERE / "imagenet_logits.json").write_text(
        json.dumps({"made_with": made_with, "nets": nets}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
