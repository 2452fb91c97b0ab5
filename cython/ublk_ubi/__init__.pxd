# Makes `ublk_ubi` a package to `cimport`; the Python package of the same name is ../../ublk_ubi.
