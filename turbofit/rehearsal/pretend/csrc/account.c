/* The account of this process: who gets memory of which card. See account.h; all sizes are bytes.
 * A card's memory is a number: total - used - what the machine's processes hold (shared.c).
 */
#define _GNU_SOURCE
#include "shared.h"
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS_BITS 16
#define BUCKETS (1 << BUCKETS_BITS)
#define SMALL_COPY (1 * MIB)

struct block {
    char *address;
    size_t span;                  /* address space taken */
    size_t size;                  /* accounted */
    int device, kind;
    struct pretend_pool *pool;
    struct block *next;
};

static size_t malloc_live[PRETEND_MAX_DEVICES];
static char asked_free[PRETEND_MAX_DEVICES]; /* whether the engine has sized its cache */
static char has_context[PRETEND_MAX_DEVICES];
static struct block *table[BUCKETS];

size_t round_up(size_t n, size_t step) { return step ? (n + step - 1) / step * step : n; }

static size_t within(size_t size) { return size < PRETEND_MOST ? size : PRETEND_MOST; }

size_t accounted(size_t asked, size_t step) { return round_up(within(asked), step); }

/* --------------------------------------------------------------- holding */

static int area_row(int kind, int device) { return kind == PRETEND_PINNED ? PINNED_ROW : device; }

size_t held_on(int device) { return shared_mine()->held[device]; }

void unhold(int device, size_t bytes) { shared_give(device, bytes); }

static int make_context(int device)
{
    size_t left;
    if (has_context[device])
        return PRETEND_OK;
    if (machine.context) {
        if (shared_context(device, machine.context, &left)) {
            timeline_trace("O %d %d -1 %zu %zu %zu", device, PRETEND_CONTEXT, machine.context, left,
                           machine.context);
            return PRETEND_NO_MEMORY;
        }
        timeline_trace("K %d %zu %zu", device, machine.context, left - machine.context);
    }
    has_context[device] = 1;
    return PRETEND_OK;
}

/* What needs a context on the thread's device makes it current there, as the runtime does. */
static int take_context(int device)
{
    int status = make_context(device);
    if (!status && device == physical_of(*pretend_current_device()))
        *pretend_has_current() = 1;
    return status;
}

int fails(int device, int kind, int pool, size_t size)
{
    int pinned = kind == PRETEND_PINNED;
    uint64_t number = shared_count(pinned), first = pinned ? machine.fail_pinned_at : machine.fail_at;
    if (number != first)
        return 0;
    shared_refuse();
    timeline_trace("E %d %d %d %zu %zu %llu", device, kind, pool, size,
                   shared_free(area_row(kind, device)), (unsigned long long)number);
    fprintf(stderr, "turbofit pretend: SIMULATED: %s allocation %llu fails, as the scenario says\n",
            pinned ? "page-locked" : "device", (unsigned long long)number);
    return 1;
}

int hold(int device, int kind, int pool, size_t asked, size_t before, size_t wanted)
{
    size_t left;
    if (take_context(device))
        return PRETEND_NO_MEMORY;
    if (wanted > before && shared_take(device, wanted - before, &left)) {
        timeline_trace("O %d %d %d %zu %zu %zu", device, kind, pool, asked, left, wanted - before);
        return PRETEND_NO_MEMORY;
    }
    return PRETEND_OK;
}

/* ----------------------------------------------------------------- blocks */

static struct block **slot_of(const void *address)
{
    /* Large addresses are multiples of 2 MiB: of a product the high bits hang on all of them. */
    uint64_t spread = ((uint64_t)(size_t)address >> 9) * 0x9E3779B97F4A7C15u;
    struct block **p = &table[spread >> (64 - BUCKETS_BITS)];
    while (*p && (*p)->address != address)
        p = &(*p)->next;
    return p;
}

void blocks_leave(void)
{
    for (int i = 0; i < BUCKETS; ++i)
        for (struct block *b = table[i]; b; b = b->next)
            b->size = 0;
    memset(malloc_live, 0, sizeof malloc_live);
    memset(asked_free, 0, sizeof asked_free);
    memset(has_context, 0, sizeof has_context);
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
                   held_on(area_row(kind, device)),
                   address_offset(address));
    return PRETEND_OK;
}

/* ------------------------------------------------------------------ calls */

int pretend_context(int device)
{
    int physical = physical_of(device);
    if (physical < 0)
        return PRETEND_INVALID;
    enter();
    int status = make_context(physical);
    leave();
    return status;
}

int pretend_has_context(int device)
{
    int physical = physical_of(device);
    return physical >= 0 && has_context[physical];
}

int pretend_memory_info(int device, size_t *free_bytes, size_t *total_bytes)
{
    int physical = physical_of(device);
    if (physical < 0)
        return PRETEND_INVALID;
    enter();
    int status = take_context(physical);
    *free_bytes = shared_free(physical);
    *total_bytes = machine.devices[physical].total;
    timeline_trace("G %d %zu %zu", physical, *free_bytes, *total_bytes);
    if (!asked_free[physical] && machine.devices[physical].late)
        shared_late(physical, machine.devices[physical].late);
    asked_free[physical] = 1;
    leave();
    return status;
}

size_t pretend_held(int device)
{
    int physical = physical_of(device);
    return physical < 0 ? 0 : shared_mine()->held[physical];
}

int pretend_malloc(int device, size_t size, void **out)
{
    *out = NULL;
    device = physical_of(device);
    if (device < 0)
        return PRETEND_INVALID;
    if (!size)
        return PRETEND_OK;
    enter();
    size = accounted(size, UNIT);
    size_t before = round_up(malloc_live[device], machine.malloc_step);
    size_t wanted = round_up(malloc_live[device] + size, machine.malloc_step);
    int status = fails(device, PRETEND_MALLOC, -1, size) ? PRETEND_NO_MEMORY
                 : hold(device, PRETEND_MALLOC, -1, size, before, wanted);
    if (!status) {
        malloc_live[device] += size;
        status = give_block(device, PRETEND_MALLOC, NULL, size, out);
    }
    leave();
    return status;
}

static int current_or_first(void) /* without a device page-locked memory counts all the same */
{
    int current = physical_of(*pretend_current_device());
    return current < 0 ? 0 : current;
}

static int take_pinned(int current, size_t size, void **out)
{
    size_t left;
    if (fails(current, PRETEND_PINNED, -1, size))
        return PRETEND_NO_MEMORY;
    if (!shared_take(PINNED_ROW, size, &left)) {
        if (!give_block(current, PRETEND_PINNED, NULL, size, out))
            return PRETEND_OK;
        unhold(PINNED_ROW, size);
        return PRETEND_NO_MEMORY;
    }
    timeline_trace("O %d %d -1 %zu %zu %zu", current, PRETEND_PINNED, size, left, size);
    return PRETEND_NO_MEMORY;
}

int pretend_pinned(size_t size, void **out)
{
    *out = NULL;
    if (!size)
        return PRETEND_OK;
    enter();
    int status = take_pinned(current_or_first(), round_up(within(size), UNIT), out);
    leave();
    return status;
}

int pretend_register(size_t size)
{
    enter();
    int refused = fails(current_or_first(), PRETEND_PINNED, -1, round_up(within(size), UNIT));
    leave();
    return refused ? PRETEND_NO_MEMORY : PRETEND_OK;
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
        unhold(PINNED_ROW, b->size);
    } else if (b->kind == PRETEND_MALLOC) {
        size_t before = round_up(malloc_live[b->device], machine.malloc_step);
        malloc_live[b->device] -= b->size;
        unhold(b->device, before - round_up(malloc_live[b->device], machine.malloc_step));
    } else {
        pool_returned(b->pool, b->size);
    }
    give_address(b->kind == PRETEND_PINNED ? PINNED_AREA : b->device, b->address, b->span);
    timeline_line("F %zx %zu", address_offset(b->address),
                  held_on(area_row(b->kind, b->device)));
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

void pretend_site(const char *text)
{
    enter();
    timeline_line("S %s", text);
    leave();
}

int pretend_locate(const void *pointer, int *device, int *pinned)
{
    account_start();
    int area = address_area(pointer);
    *pinned = area == PINNED_AREA;
    int physical = area < 0 ? vmm_device(pointer) : *pinned ? -1 : area;
    *device = physical < 0 ? -1 : visible_of(physical);
    return *device >= 0;
}

int pretend_range(const void *pointer, void **base, size_t *size)
{
    enter();
    int status = PRETEND_INVALID;
    for (size_t i = 0; i < BUCKETS && status; ++i)
        for (struct block *b = table[i]; b && status; b = b->next)
            if ((const char *)pointer >= b->address && (const char *)pointer < b->address + b->span) {
                *base = b->address;
                *size = b->size;
                status = PRETEND_OK;
            }
    leave();
    return status;
}

void pretend_copy(void *to, const void *from, size_t size)
{
    /* What is there already is not written: pages that are only read stay the kernel's zero page, so
     * that the many small weights of experts, all zeros in a stand-in, take no memory of the host. */
    if (to && from && size <= SMALL_COPY && memcmp(to, from, size))
        memmove(to, from, size);
}

void pretend_fill(void *to, int value, size_t size)
{
    unsigned char *bytes = to;
    if (!to || !size || size > SMALL_COPY)
        return;
    if (*bytes != (unsigned char)value || memcmp(bytes, bytes + 1, size - 1))
        memset(to, value, size);
}

