"""``python -m kdkernels train MODE``: a small trainer that shows soft, hard and co-distillation.

Read ``train.py`` first: it is the part to copy. ``codistill.py`` is the module and the trainer that
co-distillation needs, ``reliable.py`` what makes a run safe to kill, ``summary.py`` and ``progress.py`` what it says,
``compare.py`` the demonstration.
"""
