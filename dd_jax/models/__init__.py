"""The nets of the paper's experiments and of later ones, as Flax Linen modules, by name.

    model = models.create("lenet")
    variables = model.init(key, jnp.zeros((1, *models.input_shape("lenet"))))
    logits = model.apply(variables, images)

Every net is called as `model.apply(variables, images, train=False)`. It maps images (batch, height,
width, channels) to logits (batch, num_classes), each row independently of the others. Variables are
{"params": ...}, and for nets with batch normalization also "batch_stats", the running statistics.

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

    from dd_jax.models.catalog import NETS, Net, TorchLayout

__all__ = ["NAMES", "NETS", "Net", "TorchLayout", "create", "input_shape"]

NAMES: tuple[str, ...] = tuple(NETS)


def create(name: str, num_classes: int | None = None) -> nn.Module:
    """Returns the net of a name, one of `NAMES`, without weights.

    `num_classes` None stands for the net's own number of classes: 1000 for the nets for ImageNet,
    10 for the others.

    Raises:
      ValueError: unknown name, or fewer than two classes.
    """
    if num_classes is None:
        return _module(name)()
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2.")
    return _module(name)(num_classes=num_classes)


def input_shape(name: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the net of that name takes.

    Raises:
      ValueError: unknown name.
    """
    return _module(name).input_shape


def _module(name: str) -> type[nn.Module]:
    if name not in NETS:
        raise ValueError(f"There is no net {name!r}; choose one of {', '.join(NAMES)}.")
    return NETS[name].module
