"""From a trained network to maps."""
