"""The error for weight files that cannot be used, and the limit on their size."""

# The largest size of a compressed file's contents, which can be a thousand times the file's size.
# AlexNet, the largest net, has 0.5 GB of doubles.
MOST_UNCOMPRESSED = 2**30


class WeightsError(ValueError):
    """Says in one sentence what is wrong with a file and what the user can do."""
