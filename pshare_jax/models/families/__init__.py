"""The families of models, one file each; `models/registry` finds them."""
