"""Planted bugs of the ring, that its conformance test must find.

    mutants     what is planted
    build       the ring's module with a planted bug, among the checkout's other modules
    judge       a program: runs the conformance test against such builds
"""
