"""What `tools/demo` is made of: the image, the story, the way it is told."""
