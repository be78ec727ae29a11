"""The stages of the pipeline as plain functions over cached artefacts.

Three of them train, as in "Semantic-Centric Alignment for Zero-Shot Panoptic and Semantic Segmentation".
"""
