"""From a configuration to a finished run: the only package that reads configurations."""

from dd_jax import extras

with extras.needed("train"):
    import flax  # noqa: F401
    import ml_collections  # noqa: F401
    import tqdm  # noqa: F401
