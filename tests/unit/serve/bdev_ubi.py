"""What bdev_ubi's users have: the request of its README, the configuration of its examples."""

from __future__ import annotations

from typing import Any

REQUEST = """\
{
  "jsonrpc": "2.0",
  "id": 1,
  "method": "bdev_ubi_create",
  "params": {
    "name": "ubi0",
    "base_bdev": "aio0",
    "image_path": "/opt/images/large-image.raw",
    "stripe_size_mb": 1
  }
}
"""
CONFIGURATION: dict[str, Any] = {"subsystems": [
    {"subsystem": "bdev", "config": [
        {"method": "bdev_aio_create", "params": {
            "name": "aio0", "block_size": 512, "filename": "write-space", "readonly": False,
        }},
        {"method": "bdev_ubi_create", "params": {
            "name": "ubi0", "base_bdev": "aio0", "image_path": "jammy.raw",
            "stripe_size_kb": 1024, "copy_on_read": False, "directio": True,
        }},
    ]},
    {"subsystem": "vhost_blk", "config": [
        {"method": "vhost_create_blk_controller", "params": {
            "ctrlr": "vhost.0", "dev_name": "ubi0", "cpumask": "1", "readonly": False,
            "transport": "vhost_user_blk",
        }},
    ]},
]}
