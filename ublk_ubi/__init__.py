"""A disk that is ready at once: copy-on-access block devices over Linux ublk and io_uring."""

__version__ = "0.1.0"
