"""Torch modules and losses, tensors in, tensors out. Nothing here reads the store, a stage or a flag.

The method is that of "Semantic-Centric Alignment for Zero-Shot Panoptic and Semantic Segmentation".
"""
