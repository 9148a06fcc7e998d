/* What the account's own files share. Everything here is guarded by the one lock, except what
 * the scenario sets once. */
#ifndef TURBOFIT_PRETEND_STATE_H
#define TURBOFIT_PRETEND_STATE_H

#include "account.h"

#define KIB ((size_t)1024)
#define MIB (KIB * KIB)
#define GIB (MIB * KIB)

struct pretend_pool {
    int device, id, open;
    size_t live, reserved, step;
    uint64_t threshold;
    struct pretend_pool *next;
};

/* The machine and the account's knobs, set once from the scenario file (scenario.c). */
struct scenario {
    struct pretend_device devices[PRETEND_MAX_DEVICES];
    int count;
    char peers[PRETEND_MAX_DEVICES][PRETEND_MAX_DEVICES];
    size_t pool_step, malloc_step, vmm_step, pinned_limit, timeline_limit, context;
    size_t fail_at, fail_pinned_at; /* numbers, from 1, of allocations that fail; 0: none */
    char timeline[4096]; /* a file, or a folder where it ends with "/" */
    char shared[4096];   /* the file of the machine's processes; empty: this process alone */
};

extern struct scenario machine;
void scenario_read(void);

/* visible.c: ordinals of this process, physical indices of the machine */
void visible_read(void);
int physical_of(int device);   /* -1: no such ordinal */
int visible_of(int physical);  /* -1: hidden */

/* process.c */
void machine_start(void); /* the scenario and the shared file: enough for readers */
void account_start(void); /* and this process's own part */
void enter(void);
void leave(void);

/* account.c; devices here and below are physical */
size_t round_up(size_t n, size_t step);
#define UNIT 512 /* the driver rounds each allocation up to this */
size_t accounted(size_t asked, size_t step); /* rounded up */
size_t held_on(int device);
/* Counts an allocation of a device or of page-locked memory; 1 where the scenario fails this one. */
int fails(int device, int kind, int pool, size_t size);
/* Holds `wanted` where `before` was held, or refuses and writes down who asked for `asked`. */
int hold(int device, int kind, int pool, size_t asked, size_t before, size_t wanted);
void unhold(int device, size_t bytes);
int give_block(int device, int kind, struct pretend_pool *pool, size_t size, void **out);
void blocks_leave(void);  /* in a child of fork: what was inherited counts in the parent only */

/* addresses.c: one area for each device, and one for page-locked host memory */
#define PINNED_AREA PRETEND_MAX_DEVICES
void addresses_start(void);
char *take_address(int area, size_t size, size_t *span);
void give_address(int area, char *address, size_t span);
size_t address_offset(const void *address);  /* from the first area's begin */
int address_area(const void *address);       /* -1: none of ours */

/* pools.c */
void pools_start(void);
void pools_leave(void);
void pool_returned(struct pretend_pool *pool, size_t size);

/* threads.c: a thread inside the account is held only when it leaves */
void thread_busy(void);
void thread_idle(void);
void threads_leave(void);

/* vmm.c */
void vmm_leave(void);
int vmm_device(const void *pointer); /* -1: not mapped memory of a device */

#endif
