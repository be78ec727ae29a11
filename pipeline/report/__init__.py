"""From numbers to files to look at."""
