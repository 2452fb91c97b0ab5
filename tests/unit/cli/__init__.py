"""The command, as people and scripts have it."""
