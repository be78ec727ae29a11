"""The generated world, and the training of the two networks that ship with the package."""
