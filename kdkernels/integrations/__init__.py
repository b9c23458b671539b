"""One file per trainer that kdkernels plugs into; each needs that trainer's package and nothing more."""
