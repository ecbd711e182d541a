"""What is raised for weights that cannot be used."""

# What a compressed file may come to, which can be a thousand times its size. AlexNet, the largest
# net, has 0.5 GB of doubles.
MOST_UNCOMPRESSED = 2**30


class WeightsError(ValueError):
    """One sentence for the person who named the file: what is wrong with it, and what to do."""
