"""What the device tests stand on; fixtures for it are in ../conftest.py.

Nothing here imports the product: the tests look at it from outside, through its command, its
control socket, its devices and the bytes it leaves.
"""
