"""Parseval training: weight matrices are kept nearly orthonormal by a step after every update."""

from typing import Any

import jax
from jaxtyping import Array


def parseval_retraction(params: Any, *, beta: float = 1e-4) -> Any:
    """Moves every weight matrix one step towards orthonormality, W <- (1 + beta) W - beta W W^T W
    (Cisse et al., ICML 2017).

    Leaves with two axes or more are weights, kernels of (..., inputs, outputs). They become
    matrices of (all but the last axis, outputs). Others (biases, scales) do not change. A kernel
    with k positions touches every input up to k times. Its matrix is retracted in units of
    1 / sqrt(k), so that singular values approach 1 / sqrt(k) and the layer's Lipschitz constant
    stays at 1. Singular values s (in these units) become s + beta (s - s^3): they approach 1 while
    beta * s^2 is well below 1, and diverge where it is above 2.
    """

    def retract(weights: Array) -> Array:
        if weights.ndim < 2:
            return weights
        scale = (weights.size // (weights.shape[-1] * weights.shape[-2])) ** 0.5
        matrix = scale * weights.reshape(-1, weights.shape[-1])
        inner = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        cubed = matrix @ inner if matrix.shape[0] >= matrix.shape[1] else inner @ matrix
        return (((1 + beta) * matrix - beta * cubed) / scale).reshape(weights.shape)

    return jax.tree.map(retract, params)
