"""Disks under SPDK; against a peer of its kind, or against SPDK's `vhost` (UBLK_UBI_SPDK)."""
