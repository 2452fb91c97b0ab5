"""The simulator: the compiled engines in a world that owns every completion, crash and error."""
