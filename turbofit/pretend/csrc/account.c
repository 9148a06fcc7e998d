/* The account: what each card holds, and who gets memory of it. See account.h; all sizes are
 * bytes. A card's memory is a number: total - used - what this process holds.
 */
#define _GNU_SOURCE
#include "state.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 16384
#define UNIT 512 /* the driver rounds each allocation up to this */
#define SMALL_COPY (1 * MIB)

struct block {
    char *address;
    size_t span;                  /* address space taken */
    size_t size;                  /* accounted */
    int device, kind;
    struct pretend_pool *pool;
    struct block *next;
};

size_t held[PRETEND_MAX_DEVICES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static size_t malloc_live[PRETEND_MAX_DEVICES];
static size_t pinned_live;
static int asked[PRETEND_MAX_DEVICES]; /* whether the engine has sized its cache */
static struct block *table[BUCKETS];

static void start(void)
{
    scenario_read();
    addresses_start();
    pools_start();
    timeline_open(machine.timeline, machine.timeline_limit);
}

void account_start(void) { pthread_once(&once, start); }

void enter(void)
{
    account_start();
    thread_busy();
    pthread_mutex_lock(&lock);
}

void leave(void)
{
    pthread_mutex_unlock(&lock);
    thread_idle();
}

size_t round_up(size_t n, size_t step) { return step ? (n + step - 1) / step * step : n; }

size_t accounted(size_t asked) { return round_up(asked + machine.extra, UNIT); }

int pretend_abi(void) { return PRETEND_ABI; }

int pretend_device_count(void)
{
    account_start();
    return machine.count;
}

int valid(int device)
{
    return device >= 0 && device < pretend_device_count();
}

const struct pretend_device *pretend_device(int device)
{
    return valid(device) ? &machine.devices[device] : NULL;
}

int pretend_can_access(int from, int to)
{
    return valid(from) && valid(to) && (from == to || machine.peers[from][to]);
}

/* --------------------------------------------------------------- holding */

static size_t free_now(int device)
{
    size_t late = asked[device] ? machine.devices[device].late : 0;
    size_t gone = machine.devices[device].used + late + held[device];
    return gone < machine.devices[device].total ? machine.devices[device].total - gone : 0;
}

int hold(int device, int kind, int pool, size_t asked, size_t before, size_t wanted)
{
    if (wanted > before && wanted - before > free_now(device)) {
        timeline_trace("O %d %d %d %zu %zu %zu", device, kind, pool, asked, free_now(device),
                       wanted - before);
        return PRETEND_NO_MEMORY;
    }
    held[device] += wanted - before;
    return PRETEND_OK;
}

/* ----------------------------------------------------------------- blocks */

static struct block **slot_of(const void *address)
{
    struct block **p = &table[((size_t)address >> 9) % BUCKETS];
    while (*p && (*p)->address != address)
        p = &(*p)->next;
    return p;
}

int give_block(int device, int kind, struct pretend_pool *pool, size_t size, void **out)
{
    int area = kind == PRETEND_PINNED ? PINNED_AREA : device;
    struct block *b = malloc(sizeof *b);
    size_t span = 0;
    char *address = b ? take_address(area, size, &span) : NULL;
    if (!address) {
        free(b);
        return PRETEND_NO_MEMORY;
    }
    if (span < 64 * KIB)
        memset(address, 0, span);
    *b = (struct block){address, span, size, device, kind, pool, NULL};
    *slot_of(address) = b;
    *out = address;
    timeline_trace("A %d %d %d %zu %zu %zx", device, kind, pool ? pool->id : -1, size,
                   kind == PRETEND_PINNED ? pinned_live : held[device],
                   address_offset(address));
    return PRETEND_OK;
}

/* ------------------------------------------------------------------ calls */

void pretend_memory_info(int device, size_t *free_bytes, size_t *total_bytes)
{
    if (!valid(device))
        return;
    enter();
    *free_bytes = free_now(device);
    *total_bytes = machine.devices[device].total;
    timeline_trace("G %d %zu %zu", device, *free_bytes, *total_bytes);
    asked[device] = 1;
    leave();
}

size_t pretend_held(int device) { return valid(device) ? held[device] : 0; }

int pretend_malloc(int device, size_t size, void **out)
{
    *out = NULL;
    if (!valid(device))
        return PRETEND_INVALID;
    if (!size)
        return PRETEND_OK;
    enter();
    size = accounted(size);
    size_t before = round_up(malloc_live[device], machine.malloc_step);
    size_t wanted = round_up(malloc_live[device] + size, machine.malloc_step);
    int status = hold(device, PRETEND_MALLOC, -1, size, before, wanted);
    if (!status) {
        malloc_live[device] += size;
        status = give_block(device, PRETEND_MALLOC, NULL, size, out);
    }
    leave();
    return status;
}

int pretend_pinned(size_t size, void **out)
{
    *out = NULL;
    if (!size)
        return PRETEND_OK;
    enter();
    int status = PRETEND_NO_MEMORY;
    size = round_up(size, UNIT);
    if (size <= machine.pinned_limit - pinned_live) {
        pinned_live += size;
        status = give_block(*pretend_current_device(), PRETEND_PINNED, NULL, size, out);
    } else {
        timeline_trace("O %d %d -1 %zu %zu %zu", *pretend_current_device(), PRETEND_PINNED, size,
                       machine.pinned_limit - pinned_live, size);
    }
    leave();
    return status;
}

int pretend_free(void *pointer)
{
    if (!pointer)
        return PRETEND_OK;
    enter();
    struct block **p = slot_of(pointer), *b = *p;
    if (!b) {
        leave();
        return PRETEND_INVALID;
    }
    *p = b->next;
    if (b->kind == PRETEND_PINNED) {
        pinned_live -= b->size;
    } else if (b->kind == PRETEND_MALLOC) {
        size_t before = round_up(malloc_live[b->device], machine.malloc_step);
        malloc_live[b->device] -= b->size;
        held[b->device] -= before - round_up(malloc_live[b->device], machine.malloc_step);
    } else {
        pool_returned(b->pool, b->size);
    }
    give_address(b->kind == PRETEND_PINNED ? PINNED_AREA : b->device, b->address, b->span);
    timeline_line("F %zx %zu", address_offset(b->address),
                  b->kind == PRETEND_PINNED ? pinned_live : held[b->device]);
    free(b);
    leave();
    return PRETEND_OK;
}

void pretend_mark(const char *phase)
{
    enter();
    timeline_line("P %s", phase);
    leave();
}

int pretend_locate(const void *pointer, int *device, int *pinned)
{
    account_start();
    int area = address_area(pointer);
    *pinned = area == PINNED_AREA;
    *device = area < 0 ? vmm_device(pointer) : *pinned ? -1 : area;
    return *device >= 0;
}

void pretend_copy(void *to, const void *from, size_t size)
{
    if (to && from && size <= SMALL_COPY)
        memmove(to, from, size);
}

void pretend_fill(void *to, int value, size_t size)
{
    if (to && size <= SMALL_COPY)
        memset(to, value, size);
}

