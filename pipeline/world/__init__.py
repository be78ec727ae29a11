"""The generated world, and how the two shipped networks were made."""
