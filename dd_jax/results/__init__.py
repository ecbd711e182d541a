"""Reports, tables and plots, from dictionaries of figures: no net and no device is needed."""
