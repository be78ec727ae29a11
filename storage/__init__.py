"""Bytes on disk: keys, the artefact store, shards, tokens, queries, checkpoints. No neural network."""
