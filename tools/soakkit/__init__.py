"""What `tools/soak` is made of: where it runs, a disk's life, what is told of it."""
