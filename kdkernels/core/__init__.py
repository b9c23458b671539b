"""A call on its way from the public losses to a backend: checked, planned, walked, tied to autograd."""
