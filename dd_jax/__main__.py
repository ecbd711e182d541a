"""`python -m dd_jax COMMAND` is `dd-jax COMMAND`."""

from dd_jax.commands import main

if __name__ == "__main__":
    main(program="python -m dd_jax")
