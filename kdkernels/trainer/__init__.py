"""``python -m kdkernels train MODE``: a small trainer that shows soft, hard, co- and on-policy distillation.

Read ``train.py`` first: it is the part to copy. ``codistill.py`` is the module and the trainer that
co-distillation needs, ``on_policy.py`` the trainer whose student writes, ``reliable.py`` and ``files.py`` what makes a run
safe to kill, ``summary.py`` and ``progress.py`` what it says, ``compare.py`` the demonstration.
"""
