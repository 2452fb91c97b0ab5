"""The ABI, three ways: the kernel's header = our C header = the ctypes mirror; liburing = ctypes.

Each comparison is made by a C program that is generated from the names found in our own files, so
that nothing can be added to them and be forgotten here.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from ublk_ubi import abi, liburing

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = REPOSITORY / "cython" / "ublk_ubi" / "ublk_abi.h"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", f"-I{HEADER.parent}"]

KERNEL_NAMES = {
    "UBI_UBLK_CMD_BUF_OFFSET": "UBLKSRV_CMD_BUF_OFFSET",
    "UBI_UBLK_IO_BUF_OFFSET": "UBLKSRV_IO_BUF_OFFSET",
}
OURS_ALONE = {"UBI_SECTOR_SHIFT", "UBI_SECTOR_SIZE"}
SERVER_STRUCTS = {"ctrl_cmd", "ctrl_dev_info", "io_desc", "io_cmd"}

MIRROR = {
    "ctrl_cmd": abi.CtrlCmd,
    "ctrl_dev_info": abi.CtrlDevInfo,
    "param_basic": abi.ParamBasic,
    "param_discard": abi.ParamDiscard,
    "param_devt": abi.ParamDevt,
    "param_zoned": abi.ParamZoned,
    "param_dma_align": abi.ParamDmaAlign,
    "param_segment": abi.ParamSegment,
    "param_integrity": abi.ParamIntegrity,
    "params": abi.Params,
}
DATA_PLANE_ONLY = {"io_desc", "io_cmd"}
MIRRORED_ENUMS = {
    "UBI_UBLK_F_": abi.Feature,
    "UBI_UBLK_S_DEV_": abi.DevState,
    "UBI_UBLK_ATTR_": abi.Attr,
    "UBI_UBLK_PARAM_TYPE_": abi.ParamType,
    "UBI_U_CMD_": abi.Command,
}
LIBURING_STRUCTS = {
    "struct io_uring_sqe": liburing.Sqe,
    "struct io_uring_cqe": liburing.Cqe,
    "struct io_uring_params": liburing.RingParams,
    "struct io_sqring_offsets": liburing.SqOffsets,
    "struct io_cqring_offsets": liburing.CqOffsets,
    "struct io_uring_sq": liburing.RingSq,
    "struct io_uring_cq": liburing.RingCq,
    "struct io_uring": liburing.Ring,
}
# Padding: its name differs from release to release of liburing.
LIBURING_PADDING = {"pad", "pad1", "pad2", "resv", "resv1", "user_addr"}


@pytest.fixture(scope="session")
def kernel_headers():
    """Return the folder with the lab kernel's linux/ublk_cmd.h."""
    run = subprocess.run(
        [str(REPOSITORY / "tools" / "lab"), "--print", "headers"],
        capture_output=True, text=True, check=True,
    )
    folder = Path(run.stdout.strip().splitlines()[-1])
    assert (folder / "linux" / "ublk_cmd.h").is_file()
    return folder


def compiled(tmp_path, includes, expressions, flags=()):
    """Give the value of each C expression (an integer), as unsigned 64 bits."""
    source = tmp_path / "probe.c"
    lines = [f"#include {name}" for name in ("<stdio.h>", "<stddef.h>", "<errno.h>", *includes)]
    lines.append("int main(void) {")
    lines += [f'printf("%llu\\n", (unsigned long long)({text}));' for text in expressions]
    lines.append("return 0; }")
    source.write_text("\n".join(lines))
    program = tmp_path / "probe"
    subprocess.run(["gcc", *FLAGS, *flags, str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    values = [int(line) for line in run.stdout.split()]
    assert len(values) == len(expressions)
    return dict(zip(expressions, values, strict=True))


def header_constants():
    names = re.findall(r"^#define (UBI_\w+) ", HEADER.read_text(), re.MULTILINE)
    assert len(names) > 70
    assert len(names) == len(set(names))
    return names


def header_structs():
    """Name → field names of every struct in our header."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structs = {}
    pattern = re.compile(r"^struct ubi_ublk_(\w+) \{(.*?)^\};", re.DOTALL | re.MULTILINE)
    for name, body in pattern.findall(text):
        structs[name] = re.findall(r"(\w+)(?:\[\d+\])?;", body)
    assert len(structs) == 12
    return structs


def kernel_name(constant):
    return KERNEL_NAMES.get(constant) or re.sub(r"^UBI_(UBLK_|(?=U_))", "UBLK_", constant)


def layout_expressions(struct, fields):
    return [f"sizeof({struct})"] + [
        text
        for field in fields
        for text in (f"offsetof({struct}, {field})", f"sizeof((({struct} *)0)->{field})")
    ]


def test_the_names_of_constants_map_to_the_kernels():
    assert kernel_name("UBI_U_CMD_ADD_DEV") == "UBLK_U_CMD_ADD_DEV"
    assert kernel_name("UBI_UBLK_F_QUIESCE") == "UBLK_F_QUIESCE"
    assert kernel_name("UBI_UBLK_IO_BUF_OFFSET") == "UBLKSRV_IO_BUF_OFFSET"


def test_every_constant_is_the_kernels(tmp_path, kernel_headers):
    ours = [name for name in header_constants() if name not in OURS_ALONE]
    theirs = [kernel_name(name) for name in ours]
    values = compiled(
        tmp_path, ["<linux/ublk_cmd.h>", '"ublk_abi.h"'], ours + theirs, [f"-I{kernel_headers}"],
    )
    assert {name: values[name] for name in ours} == {
        name: values[other] for name, other in zip(ours, theirs, strict=True)
    }


@pytest.mark.parametrize("name", sorted(header_structs()))
def test_every_struct_is_laid_out_as_the_kernels(tmp_path, kernel_headers, name):
    fields = header_structs()[name]
    ours = layout_expressions(f"struct ubi_ublk_{name}", fields)
    prefix = "ublksrv" if name in SERVER_STRUCTS else "ublk"
    theirs = layout_expressions(f"struct {prefix}_{name}", fields)
    values = compiled(
        tmp_path, ['"ublk_abi.h"', "<linux/ublk_cmd.h>"], ours + theirs, [f"-I{kernel_headers}"],
    )
    assert [values[text] for text in ours] == [values[text] for text in theirs]


def test_positions_are_the_drivers(tmp_path):
    """The formulas of ublk_ch_mmap and of the USER_COPY position in drivers/block/ublk_drv.c."""
    expected = {
        "ubi_ublk_desc_map_len(1, 4096)": 4096,
        "ubi_ublk_desc_map_len(128, 4096)": 4096,
        "ubi_ublk_desc_map_len(171, 4096)": 8192,
        "ubi_ublk_desc_map_len(4096, 4096)": 98304,
        "ubi_ublk_desc_map_len(4096, 65536)": 131072,
        "ubi_ublk_desc_map_offset(0, 4096)": 0,
        "ubi_ublk_desc_map_offset(3, 4096)": 3 * 98304,
        "ubi_ublk_desc_map_offset(1, 65536)": 131072,
        "ubi_ublk_user_copy_pos(0, 0, 0)": 0x8000_0000,
        "ubi_ublk_user_copy_pos(5, 4095, 4096)": 0x8000_0000 + (5 << 41) + (4095 << 25) + 4096,
        "ubi_ublk_user_copy_pos(4095, 65535, 1)": 0x8000_0000 + (4095 << 41) + (65535 << 25) + 1,
        "ubi_ublk_auto_buf_reg_addr(513, UBI_UBLK_AUTO_BUF_REG_FALLBACK)": 513 | 1 << 16,
    }
    assert compiled(tmp_path, ['"ublk_abi.h"'], list(expected)) == expected


def test_the_operation_is_the_low_byte(tmp_path):
    text = "ubi_ublk_io_op(&(struct ubi_ublk_io_desc){.op_flags = 0xabcd05})"
    assert compiled(tmp_path, ['"ublk_abi.h"'], [text]) == {text: 5}


@pytest.mark.parametrize("name", sorted(MIRROR))
def test_ctypes_structs_mirror_the_header(tmp_path, name):
    struct = MIRROR[name]
    fields = [field for field, *_ in struct._fields_]
    assert fields == header_structs()[name]
    expressions = layout_expressions(f"struct ubi_ublk_{name}", fields)
    expected = [ctypes.sizeof(struct)]
    for field in fields:
        descriptor = getattr(struct, field)
        expected += [descriptor.offset, descriptor.size]
    values = compiled(tmp_path, ['"ublk_abi.h"'], expressions)
    assert [values[text] for text in expressions] == expected


def test_every_struct_is_mirrored_or_of_the_data_plane():
    assert set(MIRROR) | DATA_PLANE_ONLY == set(header_structs())


@pytest.mark.parametrize("prefix", sorted(MIRRORED_ENUMS))
def test_python_enums_mirror_the_header(tmp_path, prefix):
    members = {
        f"{prefix}{name}": int(member)
        for name, member in MIRRORED_ENUMS[prefix].__members__.items()
    }
    names = {name for name in header_constants() if name.startswith(prefix)}
    assert names == set(members)
    assert compiled(tmp_path, ['"ublk_abi.h"'], sorted(members)) == members


def test_python_constants_mirror_the_header(tmp_path):
    expected = {
        "UBI_SECTOR_SHIFT": abi.SECTOR_SHIFT,
        "UBI_SECTOR_SIZE": abi.SECTOR_SIZE,
        "UBI_UBLK_MAX_QUEUE_DEPTH": abi.MAX_QUEUE_DEPTH,
        "UBI_UBLK_MAX_NR_QUEUES": abi.MAX_NR_QUEUES,
        "UBI_UBLK_FEATURES_LEN": abi.FEATURES_LEN,
        "UINT32_MAX": abi.ANY_ID,
        "UINT16_MAX": abi.NO_QUEUE,
    }
    assert compiled(tmp_path, ['"ublk_abi.h"'], list(expected)) == expected


@pytest.mark.parametrize("struct", sorted(LIBURING_STRUCTS))
def test_liburing_structs(tmp_path, struct):
    mirror = LIBURING_STRUCTS[struct]
    fields = [name for name, *_ in mirror._fields_ if name not in LIBURING_PADDING]
    offsets = [f"offsetof({struct}, {field})" for field in fields]
    sizes = [f"sizeof((({struct} *)0)->{field})" for field in fields if field != "cmd"]
    whole = f"sizeof({struct})"
    values = compiled(tmp_path, ["<liburing.h>"], [whole, *offsets, *sizes])
    # An SQE128 ring's entries are two of the C struct's: `cmd` runs on into the second.
    factor = 2 if mirror is liburing.Sqe else 1
    assert values[whole] * factor == ctypes.sizeof(mirror)
    assert [values[text] for text in offsets] == [getattr(mirror, f).offset for f in fields]
    assert [values[text] for text in sizes] == [
        getattr(mirror, f).size for f in fields if f != "cmd"
    ]


def test_liburing_constants(tmp_path):
    expected = {
        "IORING_SETUP_SQE128": liburing.IORING_SETUP_SQE128,
        "IORING_OP_URING_CMD": liburing.IORING_OP_URING_CMD,
    }
    assert compiled(tmp_path, ["<liburing.h>"], list(expected)) == expected
    assert liburing.CMD_SIZE == liburing.Sqe.cmd.size == 80
    assert ctypes.sizeof(abi.CtrlCmd) <= liburing.CMD_SIZE


def test_only_symbols_of_2_3_are_called():
    """2.3's map file is the contract; what came later must not be needed."""
    called = set(re.findall(r"\blib\.(io_uring_\w+)", Path(liburing.__file__).read_text()))
    optional = {"io_uring_major_version", "io_uring_minor_version"}
    assert called - optional == {
        "io_uring_queue_init_params", "io_uring_queue_exit", "io_uring_get_sqe",
        "io_uring_submit", "io_uring_peek_batch_cqe",
    }
