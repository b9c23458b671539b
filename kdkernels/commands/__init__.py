"""``python -m kdkernels info | verify | train | cache``."""
