/* Addresses: a reserved range for each device and one for page-locked host memory, backed by
 * nothing until they are touched. First fit, so that two runs get the same ones; large addresses
 * are aligned to BIG plus the scenario's skew. */
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
    size_t span;
    struct hole *next;
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

char *take_address(int area, size_t size, size_t *span)
{
    size_t align = size >= BIG ? BIG : size >= MIB ? 2 * MIB : 512;
    size_t shift = size >= BIG ? machine.skew % BIG : 0;
    *span = round_up(size ? size : 1, size >= MIB ? 2 * MIB : 512);
    for (struct hole **p = &holes[area]; *p; p = &(*p)->next) {
        struct hole *h = *p;
        char *at = (char *)round_up((size_t)h->address - shift, align) + shift;
        if (at + *span > h->address + h->span)
            continue;
        size_t before = (size_t)(at - h->address), after = h->span - before - *span;
        if (after) {
            struct hole *rest = malloc(sizeof *rest);
            if (!rest)
                return NULL;
            *rest = (struct hole){at + *span, after, h->next};
            h->next = rest;
        }
        h->span = before;
        if (!before) {
            *p = h->next;
            free(h);
        }
        return at;
    }
    char *at = (char *)round_up((size_t)top[area] - shift, align) + shift;
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
    struct hole **p = &holes[area], *last = NULL;
    if (span >= 64 * KIB) { /* the RAM behind it, and a clean sheet for whoever is next */
        char *from = (char *)round_up((size_t)address, 4 * KIB);
        char *to = (char *)((size_t)(address + span) / (4 * KIB) * (4 * KIB));
        madvise(from, (size_t)(to - from), MADV_DONTNEED);
    }
    while (*p && (*p)->address < address) {
        last = *p;
        p = &(*p)->next;
    }
    if (last && last->address + last->span == address) {
        last->span += span;
    } else {
        struct hole *h = malloc(sizeof *h);
        if (!h)
            return;
        *h = (struct hole){address, span, *p};
        *p = h;
        last = h;
    }
    struct hole *next = last->next;
    if (next && last->address + last->span == next->address) {
        last->span += next->span;
        last->next = next->next;
        free(next);
    }
}

