"""Planted bugs of the ring.

`old` is an expression or a whole line of its source, wherever it stands, and becomes `new`, which
is of the same type (a comparison's is bint). A line that begins with "if" is a condition.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`survives`: the same behaviour in other words."""

    name: str
    old: str
    new: str
    survives: bool = False


ROUNDED_UP = (
    "op.length = (action.minimum + DIRECT_ALIGNMENT - 1) & ~<uint32_t>(DIRECT_ALIGNMENT - 1)"
)
PUNCH = "if op.unmap and not ring.base_is_block and not ring.lacks_punch:"

ASKED = (
    Mutant("the image is read from the base", "FILE_IMAGE", "FILE_BASE"),
    Mutant("the base is written by another description", "FILE_BASE", "FILE_SYNC"),
    Mutant("the description that writes is synced", "FILE_SYNC", "FILE_BASE"),
    Mutant("fsync for fdatasync", "IORING_FSYNC_DATASYNC", "0"),
    Mutant("descriptors are not the fixed ones", "sqe.flags |= IOSQE_FIXED_FILE", "pass"),
    Mutant("no write is DSYNC", "if op.dsync:", "if False:"),
    Mutant("every write is DSYNC", "if op.dsync:", "if True:"),
    Mutant("the rest of a short write is not DSYNC", "if op.dsync:",
           "if op.dsync and op.done == 0:"),
    Mutant("DSYNC is not taken over", "op.dsync = action.dsync", "op.dsync = 0"),
    Mutant("every kind's first buffer", "action.index * memory.stride", "0"),
    Mutant("the same buffers for all kinds", "action.memory", "1"),
    Mutant("offsets of 32 bits", "op.offset = action.offset",
           "op.offset = <uint32_t>action.offset"),
    Mutant("a token that is another's", "tagged(CQE_OP, token)", "tagged(CQE_OP, 0)"),
)
SHORT = (
    Mutant("the rest goes over the beginning", "<void*>(op.address + op.done)",
           "<void*>op.address"),
    Mutant("the rest comes from the beginning", "op.offset + op.done", "op.offset"),
    Mutant("the rest is as long as the whole", "op.length - op.done", "op.length"),
    Mutant("a part is taken for all", "op.done >= op.needed", "op.done > 0"),
    Mutant("what stops has succeeded", "op.done < op.needed", "False"),
    Mutant("it goes on inside a block", "op.done -= op.done % ring.block", "pass"),
    Mutant("it goes on at a sector", "op.done % ring.block", "op.done % SECTOR"),
    Mutant("nothing is progress", "op.done > before", "True"),
    Mutant("a short transfer is an error", "op.done > before", "False"),
    Mutant("what the token's last use left", "memset(op, 0, sizeof(Op))", "pass"),
)
ZEROS = (
    Mutant("space is given back that must stay", PUNCH,
           "if not ring.base_is_block and not ring.lacks_punch:"),
    Mutant("a disk is punched", PUNCH, "if op.unmap and not ring.lacks_punch:"),
    Mutant("a hole for zeros", "FALLOC_FL_ZERO_RANGE", "FALLOC_FL_PUNCH_HOLE"),
    Mutant("the file grows", "FALLOC_FL_KEEP_SIZE", "0"),
    Mutant("punching is tried again and again", "ring.lacks_punch = True", "pass"),
    Mutant("zeroing is tried again and again", "ring.lacks_range = True", "pass"),
    Mutant("any failure is taken for a lack", "res == -EOPNOTSUPP", "res < 0"),
    Mutant("a lack is an error", "res == -EOPNOTSUPP", "False"),
    Mutant("what lies behind the zeros is written",
           "left if left < ring.zeros_bytes else ring.zeros_bytes", "left"),
    Mutant("a range that was zeroed is a short transfer", "op.method == ZERO_WRITE",
           "op.method != ZERO_PUNCH"),
    Mutant("a disk's discard is a file's", "if ring.base_is_block:", "if False:"),
    Mutant("a discard that is refused is an error", "res == -EINVAL", "False"),
    Mutant("no discard fails", "res == -EINVAL", "res < 0"),
    Mutant("a disk without discard is an error", "res == -ENOTTY", "False"),
    Mutant("a kernel without discard is an error", "res == -ENOSYS", "False"),
)
PAGES = (
    Mutant("pages that are registered are not used", "op.fixed = True", "pass"),
    Mutant("pages that are not there are used", "ring.registered[action.index]", "1"),
    Mutant("a stripe buffer is taken for pages", "action.memory == MEM_REQUEST", "True"),
    Mutant("the first request's pages", "op.index = <uint16_t>action.index", "op.index = 0"),
    Mutant("pages are registered nowhere", "sqe.addr = auto_buffer", "sqe.addr = 0"),
    Mutant("slots too few", "io_uring_register_buffers_sparse(&ring.uring, count)", "-22"),
)
IMAGE_END = (
    Mutant("the image must reach to its stripe's end", "action.minimum < action.length", "False"),
    Mutant("reads that direct I/O does not take", ROUNDED_UP, "op.length = action.minimum"),
    Mutant("the image's last bytes are left out", ROUNDED_UP,
           "op.length = action.minimum & ~<uint32_t>(DIRECT_ALIGNMENT - 1)"),
    Mutant("stale bytes behind the image's end", "op.filled - op.needed", "0"),
    Mutant("stale bytes of the image's last block", "op.address + op.needed",
           "op.address + op.length"),
    Mutant("zeros beyond the buffer", "op.filled - op.needed", "op.filled"),
    Mutant("the event promises what was read", "<int32_t>op.filled", "<int32_t>op.done"),
)
ERRORS = (
    Mutant("EINTR is an error", "res == -EINTR", "False"),
    Mutant("EAGAIN is an error", "res == -EAGAIN", "False"),
    Mutant("any error is tried again", "res == -EAGAIN", "res < 0"),
    Mutant("retries without end", "op.retries < MAX_RETRIES", "True"),
    Mutant("a retry less", "op.retries < MAX_RETRIES", "op.retries + 1 < MAX_RETRIES"),
    Mutant("retries are not counted", "op.retries += 1", "pass"),
    Mutant("a sync that failed has succeeded", "if res < 0:", "if res < 0 and op.kind != 4:"),
    Mutant("an error after a part is a success", "if res < 0:", "if res < 0 and op.done == 0:"),
    Mutant("the token stays taken", "op.kind = 0", "pass"),
    Mutant("a token is used twice", "op.kind == 0", "True"),
    Mutant("a stray completion is taken", "op.kind != 0", "True"),
)
AROUND = (
    Mutant("ublkc is not the fixed descriptor", "sqe.flags = IOSQE_FIXED_FILE", "pass"),
    Mutant("the command goes to the base", "FILE_UBLKC", "FILE_BASE"),
    Mutant("another queue", "io_cmd.q_id = queue", "io_cmd.q_id = 0"),
    Mutant("another tag", "io_cmd.tag = tag", "io_cmd.tag = 0"),
    Mutant("a completion for another tag", "tagged(CQE_UBLK, tag)", "tagged(CQE_UBLK, 0)"),
    Mutant("the result is lost", "io_cmd.result = result", "io_cmd.result = 0"),
    Mutant("the buffer is lost", "io_cmd.addr = address", "io_cmd.addr = 0"),
    Mutant("who rings hears it, too", "sqe.flags |= IOSQE_CQE_SKIP_SUCCESS", "pass"),
    Mutant("a failed doorbell is taken for one", "CQE_DOORBELL_FAILED", "CQE_DOORBELL"),
    Mutant("a doorbell is taken for an operation", "tagged(CQE_DOORBELL, 0)", "tagged(CQE_OP, 0)"),
    Mutant("a full queue is not submitted", "io_uring_submit(&ring.uring)", "pass"),
    Mutant("a wait without end", "timeout_ns == <uint64_t>-1", "True"),
    Mutant("no wait", "timeout_ns == 0", "True"),
    Mutant("whole seconds are lost", "timeout_ns // 1000000000", "0"),
    Mutant("the time's end is a fault", "status == -ETIME", "False"),
)
SQES = (
    Mutant("an SQE is as its last use left it", "memset(sqe, 0, sizeof(io_uring_sqe))", "pass"),
)
HARMLESS = (
    Mutant("a comparison the other way round", "op.retries < MAX_RETRIES",
           "not (op.retries >= MAX_RETRIES)", survives=True),
    Mutant("room for more completions", "4 * entries", "8 * entries", survives=True),
)

MUTANTS = ASKED + SHORT + ZEROS + PAGES + IMAGE_END + ERRORS + AROUND + SQES + HARMLESS
