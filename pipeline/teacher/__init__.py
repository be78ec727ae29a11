"""The frozen CLIP teacher: embeddings of class names, images and masked instances."""
