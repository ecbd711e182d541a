"""From a configuration to a finished run: the only package that reads configurations."""
