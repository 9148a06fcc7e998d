/* Addresses: a reserved range for each device and one for page-locked host memory, backed by
 * nothing until they are touched. First fit, so that two runs get the same ones; large addresses
 * are aligned to BIG. What was given back lies in a search tree by address,
 * balanced by orders drawn at random, whose nodes know the largest hole below: an engine that loads
 * many experts leaves thousands of holes too small for the next tensor. */
#define _GNU_SOURCE
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SPAN (4 * KIB * GIB)
#define BIG (32 * MIB)
#define AREAS (PRETEND_MAX_DEVICES + 1)

struct hole {
    char *address;
    size_t span, largest; /* its own, and of all below it */
    unsigned order;       /* above those of all below it */
    struct hole *low, *high;
};

static char *range;
static char *top[AREAS];
static struct hole *holes[AREAS];

void addresses_start(void)
{
    size_t size = AREAS * SPAN + BIG;
    void *mapped = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
        fputs("turbofit pretend: no address space\n", stderr);
        abort();
    }
    madvise(mapped, size, MADV_DONTDUMP); /* an engine that dies must not write a core of it */
    range = (char *)round_up((size_t)mapped, BIG);
    for (size_t i = 0; i < AREAS; ++i)
        top[i] = range + i * SPAN;
}

size_t address_offset(const void *address) { return (size_t)((const char *)address - range); }

int address_area(const void *address)
{
    const char *p = address;
    return p < range || p >= range + AREAS * SPAN ? -1 : (int)(address_offset(p) / SPAN);
}

/* ------------------------------------------------------------------ holes */

static size_t largest(const struct hole *h) { return h ? h->largest : 0; }

static void measure(struct hole *h)
{
    h->largest = h->span;
    if (largest(h->low) > h->largest)
        h->largest = largest(h->low);
    if (largest(h->high) > h->largest)
        h->largest = largest(h->high);
}

static void split(struct hole *h, const char *at, struct hole **low, struct hole **high)
{
    if (!h) {
        *low = *high = NULL;
        return;
    }
    if (h->address < at) {
        *low = h;
        split(h->high, at, &h->high, high);
    } else {
        *high = h;
        split(h->low, at, low, &h->low);
    }
    measure(h);
}

static struct hole *join(struct hole *low, struct hole *high)
{
    if (!low || !high)
        return low ? low : high;
    struct hole *top = low->order > high->order ? low : high;
    if (top == low)
        low->high = join(low->high, high);
    else
        high->low = join(low, high->low);
    measure(top);
    return top;
}

static void add_hole(int area, char *address, size_t span)
{
    static unsigned order = 1;
    struct hole *low, *high, *h = span ? malloc(sizeof *h) : NULL;
    if (!h)
        return;
    order = order * 1664525u + 1013904223u; /* the same in each run */
    *h = (struct hole){address, span, span, order, NULL, NULL};
    split(holes[area], address, &low, &high);
    holes[area] = join(join(low, h), high);
}

static size_t remove_hole(int area, const char *address) /* its span; 0: none begins there */
{
    struct hole *low, *high, *h;
    split(holes[area], address, &low, &high);
    split(high, address + 1, &h, &high);
    holes[area] = join(low, high);
    size_t span = h ? h->span : 0;
    free(h);
    return span;
}

static char *aligned(const char *address, size_t align)
{
    return (char *)round_up((size_t)address, align);
}

static struct hole *first_fit(struct hole *h, size_t span, size_t align)
{
    if (largest(h) < span)
        return NULL;
    struct hole *lower = first_fit(h->low, span, align);
    if (lower)
        return lower;
    if (aligned(h->address, align) + span <= h->address + h->span)
        return h;
    return first_fit(h->high, span, align);
}

/* -------------------------------------------------------------- addresses */

char *take_address(int area, size_t size, size_t *span)
{
    size_t align = size >= BIG ? BIG : size >= MIB ? 2 * MIB : 512;
    *span = round_up(size ? size : 1, size >= MIB ? 2 * MIB : 512);
    struct hole *h = first_fit(holes[area], *span, align);
    if (h) {
        char *begin = h->address, *at = aligned(begin, align);
        char *end = begin + remove_hole(area, begin);
        add_hole(area, begin, (size_t)(at - begin));
        add_hole(area, at + *span, (size_t)(end - at) - *span);
        return at;
    }
    char *at = aligned(top[area], align);
    char *end = at + *span, *open = (char *)round_up((size_t)end, 2 * MIB);
    char *from = (char *)((size_t)top[area] / (4 * KIB) * (4 * KIB));
    if (open > range + (size_t)(area + 1) * SPAN ||
        mprotect(from, (size_t)(open - from), PROT_READ | PROT_WRITE)) {
        fputs("turbofit pretend: no address space left, or vm.overcommit_memory is 2\n", stderr);
        return NULL;
    }
    top[area] = end;
    return at;
}

void give_address(int area, char *address, size_t span)
{
    struct hole *before = NULL;
    if (span >= 64 * KIB) { /* the RAM behind it, and a clean sheet for whoever is next */
        char *from = (char *)round_up((size_t)address, 4 * KIB);
        char *to = (char *)((size_t)(address + span) / (4 * KIB) * (4 * KIB));
        madvise(from, (size_t)(to - from), MADV_DONTNEED);
    }
    for (struct hole *h = holes[area]; h; h = h->address < address ? h->high : h->low)
        if (h->address < address)
            before = h;
    if (before && before->address + before->span == address) {
        address = before->address;
        span += remove_hole(area, address);
    }
    span += remove_hole(area, address + span);
    add_hole(area, address, span);
}
