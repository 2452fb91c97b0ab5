# Makes `ubi_sim` a package to `cimport`.
