"""A pytest plugin: tests that need a kernel with ublk run in tools/lab's guests, as if run here.

This session collects all tests. Those below the folders of the ini option `lab_folders` are handed
to guests, some tests of a file to each, and what the guests report is replayed into this session's
hooks: progress, captured output, durations, -x, --lf and the summary are those of one session.

    plugin      options, markers, the hooks of this session
    guard       no test file goes uncollected unnoticed, and no test unrun, if so asked
    shards      which tests go to which guest
    guests      what each guest is started with; the driver that runs them
    driver      a process beside this one: runs the guests, follows what they write
    replay      the guests' events as reports; what a guest did not report has failed
    failure     a report that has words for its traceback
    guestside   the guest's end: runs exactly the tests it was given, writes down what happens

    ┌ this session ───────┐  folder/plan.json    ┌ driver ┐  tools/lab   ┌ guest ─────────────┐
    │ shards, guests      │ ───────────────────▶ │        │ ───────────▶ │ pytest + guestside │
    │ replay              │ ◀─────────────────── │        │ ◀─────────── │                    │
    └─────────────────────┘  folder/events       └────────┘  records     └────────────────────┘

Events and records are files of JSON lines, written by one side and followed by the other. The
driver is neither a thread nor a child of this process, so that the tests that run here meanwhile
find it alone; it ends, and its guests with it, when its standard input does: however this session
ends.

Invariant: every test that this session has given away is reported exactly once, by its guest or
as a failure that says what became of the guest.
"""
