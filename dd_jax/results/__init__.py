"""Reports, tables and plots from dictionaries of figures. No net and no device is needed."""
