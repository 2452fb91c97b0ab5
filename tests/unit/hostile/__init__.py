"""Hostile bytes: metadata, tables and messages that nobody of us has written, for compiled code.

    build       the extension modules under sanitizers, in folders of their own
    layout      bytes of a base: an independent reader and writer of docs/on-disk-format.md
    rules       which bases may be opened, and how, by docs/on-disk-format.md and durability.md
    mutate      what hypothesis makes of a sound base
    check_*     programs that a test runs under the sanitizers; each prints what it has covered

Only the check_* programs import the product.
"""
