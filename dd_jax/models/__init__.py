"""The nets of the paper's experiments, and those of published robust models, as Flax Linen modules,
by name.

    model = models.create("lenet")
    variables = model.init(key, jnp.zeros((1, *models.input_shape("lenet"))))
    logits = model.apply(variables, images)

Every net is called as `model.apply(variables, images, train=False)`. It maps images (batch, height,
width, channels) to logits (batch, num_classes), each row independently of the others. Variables are
{"params": ...}, and for nets with batch normalization also "batch_stats", the running statistics.

The nets of the families `wideresnet`, `preactresnet`, `dm_...`, `..._cifar` and `..._normalizing`
normalize images themselves, by mu and sigma in "batch_stats"; they take images with entries in
[0, 1]. A new net has (x - 0) / 1, or what its published code fixes (DeepMind's: CIFAR's colors,
`..._normalizing`: ImageNet's).

Batch normalization uses the stored statistics, with and without `train`. To train the statistics,
call a net that has "batch_stats" with `update_batch_stats`:

    logits, updated = model.apply(
        variables, images, train=True, update_batch_stats=True, mutable=["batch_stats"]
    )

Rows then depend on one another through the batch's mean and variance; attacks need the first form.
"""

from dd_jax import extras

with extras.needed("train"):
    import flax.linen as nn

    from dd_jax.models.catalog import NETS, find
    from dd_jax.models.families import FAMILIES, detect
    from dd_jax.models.normalization import NORMALIZATIONS, Normalization
    from dd_jax.models.torch_layout import Net, TorchLayout

__all__ = [
    "FAMILIES",
    "NAMES",
    "NETS",
    "NORMALIZATIONS",
    "Net",
    "Normalization",
    "TorchLayout",
    "create",
    "detect",
    "find",
    "input_shape",
]

NAMES: tuple[str, ...] = tuple(NETS)
"""The names that are listed one by one; names of `FAMILIES` have a depth and width of choice."""


def create(name: str, num_classes: int | None = None) -> nn.Module:
    """Returns the net of a name, one of `NAMES` or of a family, without weights.

    `num_classes` None stands for the net's own number of classes: 1000 for the nets for ImageNet,
    10 for the others.

    Raises:
      ValueError: unknown name, a depth that the family lacks, or fewer than two classes.
    """
    net = find(name)
    if num_classes is None:
        return net.make()
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2.")
    return net.make(num_classes=num_classes)


def input_shape(name: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the net of that name takes.

    Raises:
      ValueError: as `create`.
    """
    return create(name).input_shape
