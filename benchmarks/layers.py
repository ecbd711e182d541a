"""Residual nets of plain Flax layers in the forms that users write them in, with our penalty and
the straightforward one.

    python benchmarks/layers.py [--forms plain remat scan series depthwise dilated transposed]

Three blocks of 32 channels on 16 x 16 images (series: 256 samples), batch 32, 3 steps, random
weights, one process.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dd_jax import xla  # noqa: E402

xla.set_flags()  # Before JAX starts, as train.py does.

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import third_party  # noqa: E402

NUM_BLOCKS, CHANNELS, BATCH, NUM_STEPS = 3, 32, 32, 3


class Block(nn.Module):
    """x + conv(relu(conv(relu(x)))), both convolutions of the form asked for."""

    form: str

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        """Returns a pair, as scans want it."""
        options = {
            "depthwise": {"feature_group_count": CHANNELS},
            "dilated": {"kernel_dilation": 2},
        }.get(self.form, {})
        layer = nn.ConvTranspose if self.form == "transposed" else nn.Conv
        size = (5,) if self.form == "series" else (3, 3)
        y = layer(CHANNELS, size, **options, name="first")(nn.relu(x))
        return x + layer(CHANNELS, size, name="second", **options)(nn.relu(y)), None


class Residual(nn.Module):
    """Blocks one after the other, each rematerialised, or scanned over."""

    form: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 16, 16, 3) to (batch, 10)."""
        x = x.reshape(x.shape[0], -1, x.shape[-1]) if self.form == "series" else x
        x = nn.Conv(CHANNELS, (3,) * (x.ndim - 2), name="stem")(x)
        if self.form == "scan":
            blocks = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=NUM_BLOCKS
            )
            x, _ = blocks(self.form, name="blocks")(x, None)
        else:
            block = nn.remat(Block) if self.form == "remat" else Block
            for i in range(NUM_BLOCKS):
                x, _ = block(self.form, name=f"block{i}")(x)
        return nn.Dense(10, name="out")(x.mean(axis=tuple(range(1, x.ndim - 1))))


FORMS = ("plain", "remat", "scan", "series", "depthwise", "dilated", "transposed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    inputs = jax.random.normal(jax.random.key(0), (BATCH, 16, 16, 3))
    for form in parser.parse_args().forms:
        net = Residual(form)
        params = net.init(jax.random.key(1), inputs)["params"]
        labels = jnp.argmax(net.apply({"params": params}, inputs), axis=-1)
        both = third_party.measure(net, params, inputs, labels, num_steps=NUM_STEPS)
        ours, theirs = both["dd_jax"], both["straightforward"]
        print(
            f"{form:10} dd_jax {ours['seconds']:6.3f} s (compiled in {ours['compile_seconds']:.1f} "
            f"s), straightforward "
            f"{theirs['seconds']:6.3f} s ({theirs['compile_seconds']:.1f} s); losses "
            f"{ours['loss']:.6f} {theirs['loss']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
