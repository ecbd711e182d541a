"""Nets of any depth and width, by names such as "wideresnet34_20", and how to tell from the names
and shapes of PyTorch's weights which of them a file holds.

A family is one entry of `FAMILIES`. Its `Naming` is PyTorch's name of every layer; both the layout
of the weights and the recognition of a file come from it.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from dd_jax.models.normalization import CIFAR10, CIFAR100, IMAGENET, NONE
from dd_jax.models.pre_activation import PreActivationNet
from dd_jax.models.residual import ResNet
from dd_jax.models.torch_layout import OWN_NORMALIZATION, Net, TorchLayout

Stages = tuple[tuple[int, int], ...]  # (channels, number of blocks) of each stage
Shapes = Mapping[str, tuple[int, ...]]  # of PyTorch's weights, by name
RESNET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC_DEPTHS = (18, 34)  # The deeper ones have bottlenecks.
_WIDE_RESNET_STEM = 16
_RESNET_FEATURES = (64, 128, 256, 512)  # of the stages


class Naming(NamedTuple):
    """PyTorch's names of the layers of a net. In `block`, {stage} and {index} count stages from 1
    and from 0, and {block} counts blocks from 0.
    """

    stem: str
    block: str
    head: str
    norm: str = ""
    norm1: str = "bn1"
    conv1: str = "conv1"
    norm2: str = "bn2"
    conv2: str = "conv2"
    shortcut: str = "shortcut"

    def block_name(self, stage: int, block: int) -> str:
        """PyTorch's name of a block, its stage counted from 1."""
        return self.block.format(stage=stage, index=stage - 1, block=block)

    def stages(self, shapes: Shapes, conv: str) -> Stages:
        """The stages of the net whose weights have these shapes; `conv` is the layer of a block
        that has the stage's channels. Empty if the names are others.
        """
        found: list[tuple[int, int]] = []
        while f"{self.block_name(len(found) + 1, 0)}.{conv}.weight" in shapes:
            stage, block = len(found) + 1, 0
            while (entry := f"{self.block_name(stage, block)}.{conv}.weight") in shapes:
                features, block = (*shapes[entry], 0)[0], block + 1
            found.append((features, block))
        return tuple(found) if len(shapes.get(f"{self.stem}.weight", ())) == 4 else ()


TRADES = Naming("conv1", "block{stage}.layer.{block}", "fc", norm="bn1", shortcut="convShortcut")
"""`wideresnet.py` of TRADES (Zhang et al. 2019), which most later code copies."""
HUANG2021 = TRADES._replace(stem="stem_conv", block="blocks.{index}.layer.{block}")
"""Huang et al., "Exploring architectural ingredients" (2021)."""
HUANG2022 = HUANG2021._replace(norm="norm1", shortcut="shortcut.0")
"""Huang et al., "Revisiting residual networks" (2022)."""
PRE_ACT = Naming("conv1", "layer{stage}.{block}", "linear", norm="bn", shortcut="shortcut.0")
DEEPMIND = Naming(
    stem="init_conv",
    block="layer.{index}.block.{block}",
    head="logits",
    norm="batchnorm",
    norm1="batchnorm_0",
    conv1="conv_0",
    norm2="batchnorm_1",
    conv2="conv_1",
)
"""DeepMind's `model_zoo.py` (Gowal et al. 2020)."""
DEEPMIND_PRE_ACT = DEEPMIND._replace(
    stem="conv_2d", block="layer_{index}.{block}", conv1="conv_2d_1", conv2="conv_2d_2"
)
TORCHVISION = Naming("conv1", "layer{stage}.{block}", "fc", shortcut="downsample")
SMALL_RESNET = TORCHVISION._replace(head="linear", shortcut="shortcut")


class Family(NamedTuple):
    """Nets whose names match `pattern`.

    Attributes:
      pattern: a regular expression for the whole name.
      names: what users may write, for messages.
      make_net: from the match to the net; ValueError for numbers that make no net.
      name_of: from the shapes of weights to the name of the net, None where they are of another
        family. It looks at few weights; whether all fit is seen when they are read.
    """

    pattern: str
    names: str
    make_net: Callable[[re.Match], Net]
    name_of: Callable[[Shapes], str | None]


def find(name: str) -> Net | None:
    """The net of a name; None where no family has it. ValueError for impossible numbers."""
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            return family.make_net(match)
    return None


def detect(shapes: Shapes) -> str | None:
    """The name of the net that has weights of these names and shapes; None if there is none."""
    return next((name for family in FAMILIES if (name := family.name_of(shapes))), None)


def pre_activation(naming: Naming, stages: Stages, unused: str = "", **options: Any) -> Net:
    """A `PreActivationNet` with PyTorch's names of its weights; options are the net's attributes,
    and `unused` is as in `TorchLayout`.
    """
    renamed = OWN_NORMALIZATION | {
        "stem": naming.stem,
        "norm": naming.norm,
        "head": naming.head,
        **{name: getattr(naming, name) for name in ("norm1", "conv1", "norm2", "conv2")},
        "shortcut": naming.shortcut,
        **{f"sparse{place}": f"meansparse_{place}" for place in (0, 1, 2)},
        "sparse": "meansparse_end",
        **{
            f"stage{stage}_block{block}": naming.block_name(stage, block)
            for stage, (_, num_blocks) in enumerate(stages, start=1)
            for block in range(num_blocks)
        },
    }
    make = functools.partial(PreActivationNet, stages=stages, **options)
    return Net(make, TorchLayout("head", renamed=renamed, unused=unused))


def _wide_stages(depth: str, width: str) -> Stages:
    num_blocks, rest = divmod(int(depth) - 4, 6)
    if rest or num_blocks < 1 or int(width) < 1:
        raise ValueError(
            f"There is no WideResNet-{depth}-{width}; its depth must be 6 n + 4, such as 28, 34 or "
            "70, and its width at least 1."
        )
    return tuple((_WIDE_RESNET_STEM * int(width) * times, num_blocks) for times in (1, 2, 4))


def _wide_numbers(stages: Stages) -> str | None:
    """ "28_10" for the stages of a WideResNet-28-10; None where they are not a WideResNet's."""
    if len(stages) != 3:
        return None
    (features, num_blocks), *_ = stages
    depth, width = str(6 * num_blocks + 4), str(max(features // _WIDE_RESNET_STEM, 1))
    return f"{depth}_{width}" if stages == _wide_stages(depth, width) else None


_TRADES_VARIANTS: dict[str | None, dict[str, Any]] = {
    None: {},
    "silu": {"activation": "silu"},
    "pssilu": {"activation": "pssilu"},
    "cosine": {"cosine": True},
    "standardizing": {"standardizing": True},
}


def _trades(match: re.Match) -> Net:
    depth, width, variant = match.groups()
    # sub_block1 is trained nowhere. Every block lists the net's one activation again.
    unused = r"sub_block1\..*|.+\.activation\.(alpha|beta)"
    options = _TRADES_VARIANTS[variant]
    return pre_activation(TRADES, _wide_stages(depth, width), unused, **options)


def _trades_name(shapes: Shapes) -> str | None:
    numbers = _wide_numbers(TRADES.stages(shapes, "conv1"))
    if numbers is None:
        return None
    if "activation.alpha" in shapes:
        return f"wideresnet{numbers}_pssilu"
    return f"wideresnet{numbers}" + ("" if f"{TRADES.head}.bias" in shapes else "_cosine")


def _huang(match: re.Match) -> Net:
    *sizes, year = match.groups()
    stages = tuple((int(sizes[i + 1]), int(sizes[i])) for i in (0, 2, 4))
    if not all(number for stage in stages for number in stage):
        raise ValueError(f"{match.string} has a stage without blocks or channels.")
    if year == "2021":
        return pre_activation(HUANG2021, stages)
    return pre_activation(HUANG2022, stages, activation="silu", normalization=CIFAR10)


def _huang_name(shapes: Shapes) -> str | None:
    stages = HUANG2021.stages(shapes, "conv1")
    year = "2022" if f"{HUANG2022.norm}.weight" in shapes else "2021"
    sizes = "_".join(f"{num_blocks}x{features}" for features, num_blocks in stages)
    return f"wideresnet_{sizes}_huang{year}" if len(stages) == 3 else None


def _make_deepmind(make: Callable[..., nn.Module], num_classes: int = 10) -> nn.Module:
    """DeepMind's nets normalize by CIFAR-100's colors for 100 classes, else by CIFAR-10's."""
    colors = CIFAR100 if num_classes == 100 else CIFAR10
    return make(num_classes=num_classes, normalization=colors)


def deepmind(naming: Naming, stages: Stages, unused: str = "", **options: Any) -> Net:
    """A net of DeepMind's: SiLU, padding after, CIFAR's colors."""
    options = {"activation": "silu", "pads_after": True} | options
    net = pre_activation(naming, stages, unused, **options)
    return net._replace(make=functools.partial(_make_deepmind, net.make))


_DEEPMIND_VARIANTS: dict[str | None, dict[str, Any]] = {
    None: {},
    "relu": {"activation": "relu"},
    "meansparse": {"mean_sparse": True},
}


def _deepmind_wide(match: re.Match) -> Net:
    depth, width, variant = match.groups()
    unused = r".*meansparse_(\d|end)\.(flag_update_statistics|batch_num)"
    options = _DEEPMIND_VARIANTS[variant]
    return deepmind(DEEPMIND, _wide_stages(depth, width), unused, **options)


def _deepmind_wide_name(shapes: Shapes) -> str | None:
    numbers = _wide_numbers(DEEPMIND.stages(shapes, DEEPMIND.conv1))
    if numbers is None:
        return None
    is_sparse = "meansparse_end.threshold" in shapes
    return f"dm_wideresnet{numbers}" + ("_meansparse" if is_sparse else "")


def _resnet_stages(depth: str) -> Stages:
    return tuple(zip(_RESNET_FEATURES, RESNET_BLOCKS[int(depth)], strict=True))


def _basic_depth(stages: Stages) -> int | None:
    return next((d for d in _BASIC_DEPTHS if stages == _resnet_stages(str(d))), None)


def _deepmind_pre_act(match: re.Match) -> Net:
    stages = _resnet_stages(match[1])
    return deepmind(DEEPMIND_PRE_ACT, stages, stem_features=64, shortcut="padded_input")


def _deepmind_pre_act_name(shapes: Shapes) -> str | None:
    depth = _basic_depth(DEEPMIND_PRE_ACT.stages(shapes, DEEPMIND_PRE_ACT.conv1))
    return f"dm_preactresnet{depth}" if depth else None


def _pre_act(match: re.Match) -> Net:
    depth, plain = match.groups()
    options: dict[str, Any] = {"shortcut": "input", "final_norm": False} if plain else {}
    return pre_activation(PRE_ACT, _resnet_stages(depth), stem_features=64, **options)


def _pre_act_name(shapes: Shapes) -> str | None:
    depth = _basic_depth(PRE_ACT.stages(shapes, "conv1"))
    if depth is None or "bn1.weight" in shapes or f"{PRE_ACT.head}.weight" not in shapes:
        return None
    return f"preactresnet{depth}" + ("" if f"{PRE_ACT.norm}.weight" in shapes else "_plain")


def _resnet(match: re.Match) -> Net:
    wide, depth, variant = match.groups()
    depth, is_small = int(depth), variant == "cifar"
    if wide and depth in _BASIC_DEPTHS:
        raise ValueError(f"There is no {match.string}; wide_resnet has the depth 50, 101 or 152.")
    width = None if depth in _BASIC_DEPTHS else 2 if wide else 1
    colors = {None: None, "normalizing": IMAGENET, "cifar": NONE}[variant]
    naming = SMALL_RESNET if is_small else TORCHVISION
    sizes = {"bottleneck_width": width, "normalization": colors}
    return residual(naming, RESNET_BLOCKS[depth], small_images=is_small, **sizes)


def residual(
    naming: Naming, num_blocks: tuple[int, ...], *, small_images: bool = False, **options: Any
) -> Net:
    """A `ResNet` with PyTorch's names of its weights; options are the net's attributes."""
    renamed = OWN_NORMALIZATION | {
        **{
            f"layer{stage}_{block}": naming.block_name(stage, block)
            for stage, blocks in enumerate(num_blocks, start=1)
            for block in range(blocks)
        },
        "downsample_conv": f"{naming.shortcut}.0",
        "downsample_bn": f"{naming.shortcut}.1",
        "fc": naming.head,
    }
    classes = {"num_classes": 10} if small_images else {}
    attributes = {"num_blocks": num_blocks, "small_images": small_images, **classes, **options}
    return Net(functools.partial(ResNet, **attributes), TorchLayout("fc", renamed=renamed))


def _resnet_name(shapes: Shapes) -> str | None:
    """torchvision's nets with their own normalization, or those for small images."""
    has_bottlenecks = "layer1.0.conv3.weight" in shapes
    is_small = f"{SMALL_RESNET.head}.weight" in shapes
    naming = SMALL_RESNET if is_small else TORCHVISION
    stages = naming.stages(shapes, "conv3" if has_bottlenecks else "conv2")
    if not stages or "bn1.weight" not in shapes:
        return None
    blocks, depths = tuple(n for _, n in stages), [d for d in RESNET_BLOCKS]
    depths = [d for d in depths if (d in _BASIC_DEPTHS) != has_bottlenecks]
    depth = next((d for d in depths if RESNET_BLOCKS[d] == blocks), None)
    if depth is None:
        return None
    if is_small:
        return f"resnet{depth}_cifar"
    inner = (*shapes.get("layer1.0.conv1.weight", ()), 0)[0]
    wide = "wide_" if has_bottlenecks and inner == 2 * _RESNET_FEATURES[0] else ""
    return f"{wide}resnet{depth}{'_2' if wide else ''}_normalizing"


FAMILIES: tuple[Family, ...] = (
    Family(
        r"wideresnet(\d{1,3})_(\d{1,3})(?:_(silu|pssilu|cosine|standardizing))?",
        "wideresnet{depth}_{width}[_silu|_pssilu|_cosine|_standardizing]",
        _trades,
        _trades_name,
    ),
    Family(
        r"wideresnet" + r"_(\d{1,2})x(\d{1,4})" * 3 + r"_huang(2021|2022)",
        "wideresnet_{blocks}x{channels}_{blocks}x{channels}_{blocks}x{channels}_huang{2021|2022}",
        _huang,
        _huang_name,
    ),
    Family(r"preactresnet(18|34)(_plain)?", "preactresnet{18|34}[_plain]", _pre_act, _pre_act_name),
    Family(
        r"dm_wideresnet(\d{1,3})_(\d{1,3})(?:_(relu|meansparse))?",
        "dm_wideresnet{depth}_{width}[_relu|_meansparse]",
        _deepmind_wide,
        _deepmind_wide_name,
    ),
    Family(
        r"dm_preactresnet(18|34)",
        "dm_preactresnet{18|34}",
        _deepmind_pre_act,
        _deepmind_pre_act_name,
    ),
    Family(
        r"(wide_)?resnet(18|34|50|101|152)(?(1)_2)(?:_(normalizing|cifar))?",
        "resnet{18|34|50|101|152}[_cifar|_normalizing], wide_resnet{50|101}_2[_normalizing]",
        _resnet,
        _resnet_name,
    ),
)
