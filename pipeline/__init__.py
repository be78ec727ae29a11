"""The stages of the pipeline as plain functions over cached artefacts."""
