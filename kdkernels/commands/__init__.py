"""The commands of ``python -m kdkernels``; :mod:`kdkernels.__main__` lists them."""
