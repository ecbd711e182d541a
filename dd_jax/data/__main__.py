"""`python -m dd_jax.data NAME` downloads a data set."""

from dd_jax.data.download import main

main()
