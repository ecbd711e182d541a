"""What is raised for weights that cannot be used."""


class WeightsError(ValueError):
    """One sentence for the person who named the file: what is wrong with it, and what to do."""
