"""The frozen CLIP: class names, images and masked instances to embeddings."""
