/* Guests: one a queue, on its thread. Every sector of the disk belongs to one of them, which alone
 * writes and reads it; stripes are shared, but for every third, that its owner may write as a whole.
 */
enum { SECTOR = 512, WORDS = SECTOR / 8, MAX_DISCARD = 5 * STRIPE_SECTORS };
#define ZEROED 0xffffffffu         /* a version: zeros */

enum TagState { TAG_NEW, TAG_FREE, TAG_BUSY, TAG_GONE };

typedef struct {
    uint32_t first, count;         /* sectors */
    uint32_t version;
    uint8_t state, op, durable, latched;
    uint8_t written[STRIPES];      /* FLUSH: what was complete when it was sent */
} Tag;

typedef struct {
    Tag tags[MAX_DEPTH];
    uint32_t left;                 /* requests still to be sent */
    uint32_t version;
    uint8_t written[STRIPES];      /* written and complete */
    uint64_t reads, writes, flushes, zeroed, discards, failures;
} Guest;

static Guest guests[MAX_QUEUES];
/* What a sector holds; after writes that failed it may hold one of theirs instead. Its owner's. */
static uint32_t versions[SECTORS], failed_first[SECTORS], failed_last[SECTORS];
static uint8_t maybe_zero[SECTORS];        /* … or zeros: a discard's, or zeroing that failed */
static uint8_t busy[SECTORS];

static int owner_of(uint32_t sector)
{
    uint32_t stripe = sector / STRIPE_SECTORS;
    if (stripe % 3 == 0)
        return (int)(stripe / 3 % (uint32_t)queue_count);
    return (int)((stripe * 7 + sector % STRIPE_SECTORS / 2) % (uint32_t)queue_count);
}

static uint64_t word_of(uint32_t sector, uint32_t version)
{
    if (version == ZEROED)
        return 0;
    if (version == 0 && sector >= IMAGE_SECTORS && sector < IMAGE_STRIPES * STRIPE_SECTORS)
        return 0;                  /* the image ends inside this stripe */
    if (version == 0 && sector < IMAGE_SECTORS && sector / STRIPE_SECTORS % 5 == 2)
        return 0;                  /* a stripe of zeros */
    return (uint64_t)sector << 32 | version;
}

static void fill(uint8_t *to, uint32_t sector, uint32_t version)
{
    uint64_t word = word_of(sector, version);
    for (int i = 0; i < WORDS; i++)
        memcpy(to + 8 * i, &word, 8);
}

static int holds(const uint8_t *from, uint32_t sector, uint32_t version)
{
    uint8_t expected[SECTOR];
    fill(expected, sector, version);
    return memcmp(from, expected, SECTOR) == 0;
}

/* Whether a sector's content is one that it may have; from then on it must have that one. */
static int is_legal(const uint8_t *from, uint32_t sector)
{
    uint64_t word;
    memcpy(&word, from, 8);
    uint32_t version = (uint32_t)word;
    if (maybe_zero[sector] && holds(from, sector, ZEROED)) {
        versions[sector] = ZEROED;
    } else if (!holds(from, sector, versions[sector])) {
        if (!failed_last[sector] || version < failed_first[sector] || version > failed_last[sector]
            || !holds(from, sector, version))
            return 0;
        versions[sector] = version;
    }
    failed_last[sector] = maybe_zero[sector] = 0;
    return 1;
}

static int is_free(uint32_t first, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (busy[first + i])
            return 0;
    return 1;
}

/* A run of sectors that are this guest's and not in use; 0 if it finds none. */
static uint32_t place(FakeRing *fake, int me, uint32_t *first)
{
    for (int i = 0; i < 64; i++) {
        uint32_t stripe = random_of(&fake->random) % STRIPES;
        uint32_t start = stripe * STRIPE_SECTORS;
        uint32_t at = start + random_of(&fake->random) % (STRIPE_SECTORS / 2) * 2;
        uint32_t count = once_in(fake, 2) ? 2 : 1;
        if (owner_of(at) != me)
            continue;
        if (stripe % 3 == 0 && once_in(fake, 2)) {
            at = start;
            count = STRIPE_SECTORS;
        }
        if (is_free(at, count)) {
            *first = at;
            return count;
        }
    }
    return 0;
}

/* As far as all is this guest's and not in use, over the ends of stripes. */
static uint32_t longest(int me, uint32_t first, uint32_t count)
{
    while (count < MAX_DISCARD && first + count < SECTORS && owner_of(first + count) == me
           && !busy[first + count])
        count++;
    return count;
}

static int is_change(uint8_t op) { return op == CORE(OP_WRITE) || op == CORE(OP_WRITE_ZEROES); }

static void send_request(FakeRing *fake, int me, uint32_t number)
{
    Guest *guest = &guests[me];
    Tag *tag = &guest->tags[number];
    struct ubi_ublk_io_desc *desc = (struct ubi_ublk_io_desc *)&fake->queue->descriptors[number];
    uint8_t *buffer = fake->queue->buffers + number * fake->queue->buffer_stride;
    uint32_t lot = random_of(&fake->random) % 100;
    int fua = lot >= 90, unmap = once_in(fake, 2);
    tag->op = lot < 10 ? CORE(OP_FLUSH) : lot < 55 ? CORE(OP_READ) : lot < 58 ? CORE(OP_DISCARD)
              : lot < 65 || lot >= 97 ? CORE(OP_WRITE_ZEROES) : CORE(OP_WRITE);
    tag->durable = device.shared.cache == CORE(CACHE_WRITETHROUGH)
                   || (fua && device.shared.cache == CORE(CACHE_WRITEBACK));
    tag->count = 0;
    if (tag->op == CORE(OP_FLUSH)) {
        memcpy(tag->written, guest->written, STRIPES);
        tag->latched = __atomic_load_n(device.shared.latch, __ATOMIC_ACQUIRE) != 0;
    } else {
        tag->count = place(fake, me, &tag->first);
        if (!tag->count)
            return;
        if (tag->op == CORE(OP_DISCARD))
            tag->count = longest(me, tag->first, tag->count);
    }
    tag->version = ++guest->version;
    for (uint32_t i = 0; i < tag->count; i++) {
        busy[tag->first + i] = 1;
        if (tag->op == CORE(OP_WRITE))
            fill(buffer + i * SECTOR, tag->first + i, tag->version);
    }
    desc->op_flags = tag->op | (fua ? UBI_UBLK_IO_F_FUA : 0) | (unmap ? 0 : UBI_UBLK_IO_F_NOUNMAP);
    desc->nr_sectors = tag->count;
    desc->start_sector = tag->count ? tag->first : (uint64_t)-1;
    tag->state = TAG_BUSY;
    guest->left--;
    push(fake, RING(CQE_UBLK), number, UBI_UBLK_IO_RES_OK);
}

/* New requests for free tags; at the end the kernel takes the tags back. */
static void guest_turn(FakeRing *fake)
{
    int me = fake->queue->queue.index;
    for (uint32_t i = 0; i < (uint32_t)depth; i++) {
        Tag *tag = &guests[me].tags[i];
        if (tag->state != TAG_FREE)
            continue;
        if (guests[me].left > 0) {
            if (once_in(fake, 2))
                send_request(fake, me, i);
        } else {
            tag->state = TAG_GONE;
            push(fake, RING(CQE_UBLK), i, UBI_UBLK_IO_RES_ABORT);
        }
    }
    /* A guest that has nothing under way is never idle for long. */
    if (guests[me].left > 0 && fake->head == fake->tail && fake->queue->queue.active == 0)
        for (uint32_t i = 0; i < (uint32_t)depth && fake->head == fake->tail; i++)
            if (guests[me].tags[i].state == TAG_FREE)
                send_request(fake, me, i);
}

static void must_be_durable(uint32_t stripe)
{
    if (stripe < IMAGE_STRIPES && !__atomic_load_n(&durable[stripe], __ATOMIC_RELAXED))
        violation("a flush is complete, and a header bit is not durable", stripe, 0);
}

static void read_is_right(const uint8_t *buffer, const Tag *tag)
{
    for (uint32_t i = 0; i < tag->count; i++)
        if (!is_legal(buffer + i * SECTOR, tag->first + i))
            violation("a read returns what was never written there", tag->first + i,
                      versions[tag->first + i]);
}

static void ended(Guest *guest, Tag *tag, const uint8_t *buffer, int32_t result)
{
    uint32_t stripe = tag->first / STRIPE_SECTORS;
    if (result < 0) {
        guest->failures++;
        if (!faults && !has_latched())
            violation("a request fails on sound disks", tag->op, (uint64_t)-result);
        for (uint32_t i = 0; i < tag->count; i++) {
            uint32_t sector = tag->first + i;
            if (tag->op == CORE(OP_WRITE_ZEROES) || tag->op == CORE(OP_DISCARD))
                maybe_zero[sector] = 1;
            if (tag->op != CORE(OP_WRITE))
                continue;
            if (!failed_last[sector])
                failed_first[sector] = tag->version;
            failed_last[sector] = tag->version;
        }
    } else if (result != (int32_t)(tag->count * SECTOR)) {
        violation("a request ends with a part", (uint64_t)result, tag->count);
    } else if (tag->op == CORE(OP_READ)) {
        guest->reads++;
        read_is_right(buffer, tag);
    } else if (is_change(tag->op)) {
        int zeroes = tag->op == CORE(OP_WRITE_ZEROES);
        zeroes ? guest->zeroed++ : guest->writes++;
        guest->written[stripe] = 1;
        for (uint32_t i = 0; i < tag->count; i++) {
            versions[tag->first + i] = zeroes ? ZEROED : tag->version;
            failed_last[tag->first + i] = maybe_zero[tag->first + i] = 0;
        }
        if (tag->durable)
            must_be_durable(stripe);
    } else if (tag->op == CORE(OP_DISCARD)) {
        guest->discards++;
        for (uint32_t i = 0; i < tag->count; i++)
            maybe_zero[tag->first + i] = 1;
    } else {
        guest->flushes++;
        if (tag->latched)
            violation("a flush succeeds after the latch was seen", 0, 0);
        for (uint32_t i = 0; i < STRIPES && device.shared.cache != CORE(CACHE_UNSAFE); i++)
            if (tag->written[i])
                must_be_durable(i);
    }
    for (uint32_t i = 0; i < tag->count; i++)
        busy[tag->first + i] = 0;
}

static void fake_ublk(Ring *ring, uint32_t command, uint16_t queue, uint16_t number, int32_t result,
                      uint64_t address, uint64_t auto_buffer)
{
    Tag *tag = &guests[queue].tags[number];
    if (command == UBI_U_IO_COMMIT_AND_FETCH_REQ) {
        if (tag->state != TAG_BUSY)
            violation("a request ends twice", queue, number);
        ended(&guests[queue], tag, (const uint8_t *)address, result);
    }
    tag->state = TAG_FREE;
}
