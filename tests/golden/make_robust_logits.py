"""Makes robust_logits.json: what PyTorch computes with small nets of the published robust
architectures, weights and images drawn by NumPy from a seed.

    pip install torch==2.13.0 numpy
    cd tests && python -m golden.make_robust_logits

Weights are not stored: the test draws them again for the names and shapes in the file. The nets are
written out here, with the names of the layers in the published code. `NETS` says what each of them
is; those of a name of `dd_jax.models` have the sizes that belong to it.
"""

import json
import pathlib

import numpy as np
from golden.make_imagenet_logits import SEED, state_dict

HERE = pathlib.Path(__file__).parent
IMAGE_SHAPE = (2, 16, 16, 3)
NUM_CLASSES = 4
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

TRADES = {
    "stem": "conv1", "stages": "block{0}", "blocks": "layer", "shortcut": "convShortcut", "norm": "bn1", "head": "fc",
    "block": ("bn1", "conv1", "bn2", "conv2"),
}  # fmt: skip
HUANG = TRADES | {"stem": "stem_conv", "list": "blocks"}
PRE_ACT = TRADES | {
    "stages": "layer{0}",
    "blocks": "",
    "shortcut": "shortcut.0",
    "norm": "bn",
    "head": "linear",
}
DEEPMIND = {
    "stem": "init_conv", "list": "layer", "blocks": "block", "shortcut": "shortcut", "norm": "batchnorm", "head": "logits",
    "block": ("batchnorm_0", "conv_0", "batchnorm_1", "conv_1"),
}  # fmt: skip
DEEPMIND_PRE_ACT = DEEPMIND | {
    "stem": "conv_2d", "list": "", "stages": "layer_{1}", "blocks": "", "block": ("batchnorm_0", "conv_2d_1", "batchnorm_1", "conv_2d_2")
}  # fmt: skip
SMALL_WIDE = {"stem_features": 16, "stages": ((16, 1), (32, 1), (64, 1))}  # WideResNet-10-1
UNEQUAL = {"stem_features": 16, "stages": ((16, 1), (24, 2), (8, 1))}
SMALL = {"stem_features": 8, "stages": ((8, 1), (16, 2))}
BASIC = {"features": 8, "num_blocks": (1, 2)}

NETS = {
    # sub_block1 is a second first stage that the published code makes and never calls.
    "wideresnet10_1": ("pre_act", dict(names=TRADES, sub_block1=True, **SMALL_WIDE)),
    "wideresnet10_1_silu": ("pre_act", dict(names=TRADES, activation="silu", **SMALL_WIDE)),
    "wideresnet10_1_cosine": ("pre_act", dict(names=TRADES, cosine=True, **SMALL_WIDE)),
    "wideresnet10_1_standardizing": (
        "pre_act",
        dict(names=TRADES, standardizing=True, **SMALL_WIDE),
    ),
    "wideresnet10_1_pssilu": ("pre_act", dict(names=TRADES, activation="pssilu", **SMALL_WIDE)),
    "wideresnet_1x16_2x24_1x8_huang2021": ("pre_act", dict(names=HUANG, **UNEQUAL)),
    "wideresnet_1x16_2x24_1x8_huang2022": (
        "pre_act",
        dict(
            names=HUANG | {"norm": "norm1", "shortcut": "shortcut.0"},
            activation="silu",
            colors=CIFAR10,
            **UNEQUAL,
        ),
    ),
    "dm_wideresnet10_1": (
        "pre_act",
        dict(names=DEEPMIND, activation="silu", pads_after=True, colors=CIFAR10, **SMALL_WIDE),
    ),
    "dm_wideresnet10_1_meansparse": (
        "pre_act",
        dict(
            names=DEEPMIND,
            activation="silu",
            pads_after=True,
            colors=CIFAR10,
            mean_sparse=True,
            **SMALL_WIDE,
        ),
    ),
    "small_dm_preactresnet": (
        "pre_act",
        dict(
            names=DEEPMIND_PRE_ACT,
            activation="silu",
            pads_after=True,
            shortcut="padded_input",
            colors=CIFAR10,
            **SMALL,
        ),
    ),
    "small_preactresnet": ("pre_act", dict(names=PRE_ACT, **SMALL)),
    "small_preactresnet_plain": (
        "pre_act",
        dict(names=PRE_ACT, shortcut="input", final_norm=False, **SMALL),
    ),
    "small_resnet_cifar": ("resnet", dict(small_images=True, **BASIC)),
    "small_bottleneck_resnet_cifar": ("resnet", dict(small_images=True, width=1, **BASIC)),
    "small_wide_bottleneck_resnet": ("resnet", dict(small_images=False, width=2, **BASIC)),
}


def images() -> np.ndarray:
    """(batch, height, width, 3), entries in [0, 1]."""
    return np.random.default_rng(SEED).random(IMAGE_SHAPE)


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The weights for PyTorch's names and shapes: as in `make_imagenet_logits`, but with a threshold
    that matters, and numbers for what is one number.
    """
    drawn = state_dict({name: shape for name, shape in shapes.items() if shape}, "no head", 1.0)
    ones = {name: np.float32(0.4) for name, shape in shapes.items() if not shape}
    return drawn | ones


def _modules():
    import torch
    import torch.nn.functional as F
    from torch import nn

    class PSSiLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            alpha, beta = self.alpha.abs(), self.beta.abs()
            return x * (torch.sigmoid(alpha * x) - beta) / (1 - beta)

    class MeanSparse(nn.Module):
        def __init__(self, features):
            super().__init__()
            for name in ("running_mean", "running_var"):
                self.register_buffer(name, torch.zeros(features))
            for name in ("threshold", "flag_update_statistics", "batch_num"):
                self.register_buffer(name, torch.tensor(0.0))

        def forward(self, x):
            mean = self.running_mean[None, :, None, None].expand_as(x)
            crop = self.threshold * self.running_var.sqrt()[None, :, None, None]
            return torch.where((x - mean).abs() < crop, mean, x)

    def add(module, name, layer):
        """Adds a layer under a name that may have a dot, as nn.Sequential makes it."""
        outer, _, inner = name.partition(".")
        setattr(module, outer, nn.Sequential(layer) if inner else layer)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride, act, options):
            super().__init__()
            names = options["names"]
            self.layer_names = names["block"]
            norm1, conv1, norm2, conv2 = names["block"]
            self.stride, self.options, self.act_fn = stride, options, lambda x: act(x)
            if isinstance(act, PSSiLU):
                self.activation = act
            setattr(self, norm1, nn.BatchNorm2d(inputs))
            setattr(self, conv1, nn.Conv2d(inputs, outputs, 3, stride, bias=False))
            setattr(self, norm2, nn.BatchNorm2d(outputs))
            setattr(self, conv2, nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
            self.projects = inputs != outputs or stride > 1
            self.padded = options.get("shortcut") == "padded_input"
            if self.projects:
                size = 3 if self.padded else 1
                layer = nn.Conv2d(inputs, outputs, size, stride, bias=False)
                add(self, names["shortcut"], layer)
            if options.get("mean_sparse"):
                for place, features in enumerate((inputs, outputs, outputs)):
                    setattr(self, f"meansparse_{place}", MeanSparse(features))

        def call(self, name, x):
            return getattr(self, name)(x)

        def sparse(self, place, x):
            return self.call(f"meansparse_{place}", x) if self.options.get("mean_sparse") else x

        def pad(self, x):
            after = self.options.get("pads_after") and self.stride == 2
            return F.pad(x, (0, 1, 0, 1) if after else (1, 1, 1, 1))

        def forward(self, x):
            norm1, conv1, norm2, conv2 = self.layer_names
            active = self.act_fn(self.sparse(0, self.call(norm1, x)))
            y = self.call(conv1, self.pad(active))
            y = self.act_fn(self.sparse(1, self.call(norm2, y)))
            y = self.call(conv2, y)
            if self.projects:
                source = x if self.options.get("shortcut") in ("input", "padded_input") else active
                name = self.options["names"]["shortcut"].partition(".")[0]
                x = self.call(name, self.pad(source) if self.padded else source)
            return self.sparse(2, x + y)

    class Holder(nn.Module):
        """A stage of TRADES' and DeepMind's code: its blocks are in a list of this name."""

        def __init__(self, name, blocks):
            super().__init__()
            self.name = name
            setattr(self, name, blocks)

        def forward(self, x):
            return getattr(self, self.name)(x)

    class PreAct(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options, names = options, options["names"]
            kind = options.get("activation", "relu")
            act = PSSiLU() if kind == "pssilu" else {"relu": F.relu, "silu": F.silu}[kind]
            if kind == "pssilu":
                self.activation = act
            self.act_fn = lambda x: act(x)  # Not a second name for the module.
            setattr(
                self,
                names["stem"],
                nn.Conv2d(3, options["stem_features"], 3, padding=1, bias=False),
            )
            inputs, made = options["stem_features"], []
            for index, (outputs, count) in enumerate(options["stages"]):
                blocks = []
                for block in range(count):
                    stride = 2 if index and not block else 1
                    blocks.append(Block(inputs, outputs, stride, act, options))
                    inputs = outputs
                stage = nn.Sequential(*blocks)
                made.append(Holder(names["blocks"], stage) if names["blocks"] else stage)
            if names.get("list"):
                setattr(self, names["list"], nn.ModuleList(made))
            else:
                for index, stage in enumerate(made):
                    setattr(self, names["stages"].format(index + 1, index), stage)
            self.made = lambda: made
            if options.get("sub_block1"):
                outputs, count = options["stages"][0]
                first = Block(options["stem_features"], outputs, 1, act, options)
                self.sub_block1 = Holder("layer", nn.Sequential(first))
            if options.get("final_norm", True):
                setattr(self, names["norm"], nn.BatchNorm2d(inputs))
            if options.get("mean_sparse"):
                self.meansparse_end = MeanSparse(inputs)
            head = nn.Linear(inputs, NUM_CLASSES, bias=not options.get("cosine"))
            setattr(self, names["head"], head)

        def forward(self, x):
            names, options = self.options["names"], self.options
            if "colors" in options:
                mean, std = (torch.tensor(c)[:, None, None].to(x) for c in options["colors"])
                x = (x - mean) / std
            if options.get("standardizing"):
                std = x.std(dim=(1, 2, 3), keepdim=True)
                x = (x - x.mean(dim=(1, 2, 3), keepdim=True)) / std.clamp(min=x[0].numel() ** -0.5)
            x = getattr(self, names["stem"])(x)
            for stage in self.made():
                x = stage(x)
            if options.get("final_norm", True):
                x = getattr(self, names["norm"])(x)
                x = self.meansparse_end(x) if options.get("mean_sparse") else x
                x = self.act_fn(x)
            x = x.mean((2, 3))
            head = getattr(self, names["head"])
            if options.get("cosine"):
                return F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
            return head(x)

    class Residual(nn.Module):
        def __init__(self, inputs, features, stride, options):
            super().__init__()
            width, self.shortcut_name = (
                options.get("width"),
                "shortcut" if options["small_images"] else "downsample",
            )
            self.bottleneck, outputs = width is not None, features * (4 if width else 1)
            if self.bottleneck:
                inner = width * features
                sizes = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1))
            else:
                sizes = ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))
            self.count = len(sizes)
            for i, (a, b, size, step) in enumerate(sizes, start=1):
                setattr(self, f"conv{i}", nn.Conv2d(a, b, size, step, size // 2, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            self.projects = stride > 1 or inputs != outputs
            if self.projects:
                layers = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                setattr(self, self.shortcut_name, nn.Sequential(*layers))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = F.relu(y) if i < self.count else y
            return F.relu(y + (getattr(self, self.shortcut_name)(x) if self.projects else x))

    class ResNet(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.small, features = options["small_images"], options["features"]
            size, stride = (3, 1) if self.small else (7, 2)
            self.conv1 = nn.Conv2d(3, features, size, stride, size // 2, bias=False)
            self.bn1, inputs = nn.BatchNorm2d(features), features
            self.stages = len(options["num_blocks"])
            for index, count in enumerate(options["num_blocks"]):
                blocks = []
                for block in range(count):
                    stride = 2 if index and not block else 1
                    blocks.append(Residual(inputs, features * 2**index, stride, options))
                    inputs = features * 2**index * (4 if options.get("width") else 1)
                setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
            head = nn.Linear(inputs, NUM_CLASSES)
            setattr(self, "linear" if self.small else "fc", head)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = x if self.small else F.max_pool2d(x, 3, 2, 1)
            for stage in range(1, self.stages + 1):
                x = getattr(self, f"layer{stage}")(x)
            return (self.linear if self.small else self.fc)(x.mean((2, 3)))

    return {"pre_act": PreAct, "resnet": ResNet}


def figures(module) -> dict:
    """Names and shapes of the weights, logits, and the norm of an input gradient, in float64.

    input_gradient_norm: of the sum over the images of logit 0 minus logit 1, per image.
    """
    import torch

    shapes = {
        entry: tuple(value.shape)
        for entry, value in module.state_dict().items()
        if not entry.endswith("num_batches_tracked")
    }
    weights = arrays(shapes)
    # One activation is shared by all blocks, and all its names must give the same numbers.
    for entry in weights:
        if ".activation." in entry:
            weights[entry] = weights[
                entry.partition(".activation.")[1].lstrip(".") + entry.rpartition(".")[2]
            ]
    module.load_state_dict(
        {entry: torch.from_numpy(np.array(array)) for entry, array in weights.items()}, strict=False
    )
    module.double().eval()
    x = torch.from_numpy(np.ascontiguousarray(images().transpose(0, 3, 1, 2))).requires_grad_()
    logits = module(x)
    (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), x)
    return {
        "shapes": {entry: list(shape) for entry, shape in shapes.items()},
        "sum_of_weights": float(sum(np.sum(a, dtype=np.float64) for a in weights.values())),
        "logits": logits.tolist(),
        "input_gradient_norm": gradient.flatten(1).norm(dim=1).tolist(),
    }


def main() -> None:
    """Writes the file, with the versions that made it."""
    import torch

    torch.set_num_threads(1)
    kinds = _modules()
    nets = {name: figures(kinds[kind](**options)) for name, (kind, options) in NETS.items()}
    made_with = f"torch {torch.__version__}, numpy {np.__version__}, seed {SEED}"
    (HERE / "robust_logits.json").write_text(
        json.dumps({"made_with": made_with, "nets": nets}).replace('}, "', '},\n"') + "\n"
    )


if __name__ == "__main__":
    main()
