/* The memory that all processes of a machine share: who holds what. The layout is read by
 * turbofit/rehearsal/pretend/usage.py too: change both, and SHARED_MAGIC.
 *
 * A row is a physical device, or page-locked host memory (the last row). A slot belongs to one
 * process, which alone writes its `held`, `context` and `late`; the sums and peaks of the machine
 * are written under the lock. Sizes are bytes, times nanoseconds of CLOCK_MONOTONIC.
 */
#ifndef TURBOFIT_PRETEND_SHARED_H
#define TURBOFIT_PRETEND_SHARED_H

#include "account.h"

#include <pthread.h>

#define SHARED_MAGIC 0x3230454d46425254ull /* "TRBFME02" */
#define SHARED_SLOTS 512
#define SHARED_ROWS (PRETEND_MAX_DEVICES + 1)
#define PINNED_ROW PRETEND_MAX_DEVICES

enum { SLOT_FREE = 0, SLOT_LIVE = 1, SLOT_GONE = 2 /* as its process left it */ };

struct slot {
    uint32_t state;
    int32_t pid;
    uint64_t started;    /* ticks since boot, of /proc: a pid that is used again is another process */
    uint64_t began;      /* when it joined */
    uint64_t refused_at; /* its newest refused allocation, 0: none */
    uint64_t held[SHARED_ROWS];
    uint64_t context[SHARED_ROWS];
    uint64_t late[SHARED_ROWS];
    uint64_t peak[SHARED_ROWS];    /* of `held` */
    uint64_t at_peak[SHARED_ROWS]; /* all it had of a row at the machine's peak */
};

struct shared {
    uint64_t magic;
    uint32_t used, padding; /* slots ever used */
    uint64_t sum[SHARED_ROWS]; /* of all live slots: held + context + late */
    uint64_t peak[SHARED_ROWS];
    uint64_t peak_at[SHARED_ROWS];
    union {
        pthread_mutex_t mutex;
        char room[64];
    } lock;
    uint64_t counts[2]; /* allocations ever asked for: of devices, of page-locked memory */
    struct slot slots[SHARED_SLOTS];
};

_Static_assert(sizeof(struct slot) == 32 + 5 * 8 * SHARED_ROWS, "usage.py knows this");
_Static_assert(sizeof(struct shared) == 96 + 3 * 8 * SHARED_ROWS + SHARED_SLOTS * sizeof(struct slot),
               "usage.py knows this");

/* Whether the disk has room for the bytes of a mapped file; a write without room is a SIGBUS. Linux
 * before 5.14 does not say, and then it is taken for granted. */
int disk_has_room(void *mapped, size_t size);
void shared_open(void);
void shared_join(void); /* a slot for this process, in place of any that it has */
/* What may still be taken of a row, by whichever process asks first. */
size_t shared_free(int row);
/* Takes or refuses, whole; *left is what was free. */
int shared_take(int row, size_t bytes, size_t *left);
/* The number, from 1, of an allocation that is asked for now. */
uint64_t shared_count(int pinned);
void shared_refuse(void); /* this process was refused one */
void shared_give(int row, size_t bytes);
int shared_context(int row, size_t bytes, size_t *left);
void shared_late(int row, size_t bytes);
/* This process's slot, to be read. */
const struct slot *shared_mine(void);
int slot_alive(const struct slot *slot);
const struct shared *shared_all(void);

#endif
