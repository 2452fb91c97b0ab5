"""What the tests of the engines share: forked children, exact actions, a base in memory.

Nothing here uses the product, but for the names of actions in `actions` and `basedisk`.
"""
