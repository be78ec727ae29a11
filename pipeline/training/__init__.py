"""The machinery of the three training stages."""
