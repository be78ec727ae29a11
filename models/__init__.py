"""Torch modules and losses: tensors in, tensors out. Nothing here knows about files of the store, stages or flags."""
