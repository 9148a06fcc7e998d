/* The account of a pretend machine: devices, memory, pools, VMM, pinned host
 * memory, peers, streams' order, threads and the timeline.
 *
 * Nothing here knows CUDA's entry points: those are in cudart.c, cuda.c,
 * cublas.c and nccl.c, and another set of them can sit on the same account.
 * Sizes are bytes. Calls that can fail return a PRETEND_ code.
 *
 * A `device` in these calls is an ordinal as CUDA numbers the cards that
 * CUDA_VISIBLE_DEVICES shows; machine.h and the timeline speak of the machine's
 * own (physical) indices.
 */
#ifndef TURBOFIT_PRETEND_ACCOUNT_H
#define TURBOFIT_PRETEND_ACCOUNT_H

#include <stddef.h>
#include <stdint.h>

#define PRETEND_API __attribute__((visibility("default")))
#define PRETEND_MAX_DEVICES 16
/* More than any machine has: what is asked for beyond counts as this, so that no sum wraps. */
#define PRETEND_MOST ((size_t)1 << 62)
/* The interface that the Python side expects; raise it with any change. */
#define PRETEND_ABI 5

enum pretend_status {
    PRETEND_OK = 0,
    PRETEND_INVALID = 1,      /* not a pointer, handle or device of ours */
    PRETEND_NO_MEMORY = 2,    /* the card (or the host's pinned budget) is full */
    PRETEND_NO_PEER = 3       /* the machine has no such peer access */
};

enum pretend_kind {
    PRETEND_MALLOC = 0,       /* cudaMalloc */
    PRETEND_POOL = 1,         /* stream ordered, from a pool */
    PRETEND_VMM = 2,          /* cuMemCreate, ncclMemAlloc */
    PRETEND_PINNED = 3,       /* page-locked host memory */
    PRETEND_CONTEXT = 4       /* what a process's first use of a device takes */
};

struct pretend_device {
    char name[256];
    size_t total;             /* what CUDA calls total memory */
    size_t used;              /* held by others and by our context */
    size_t late;              /* what is gone once free memory was asked for: see README.md */
    int major, minor;         /* compute capability */
    int sm_count;
    size_t l2;                /* L2 cache */
    size_t smem_sm;           /* shared memory of one multiprocessor */
    size_t smem_block;        /* shared memory that one block may opt in to */
    size_t reserved;          /* kept by the driver beside `total`: only NVML shows it */
};

struct pretend_pool;

/* visible.c: what this process sees of the machine */
PRETEND_API int pretend_device_count(void);
PRETEND_API const struct pretend_device *pretend_device(int device);
PRETEND_API int pretend_can_access(int from, int to);
PRETEND_API int pretend_physical(int device); /* the machine's index of an ordinal, -1: none */
PRETEND_API int pretend_uuid(int device, unsigned char out[16]); /* 16 bytes; PRETEND_INVALID */

/* process.c */
PRETEND_API int pretend_abi(void);

/* account.c */
/* Takes this process's context on a device where it has none yet; PRETEND_NO_MEMORY if it does
 * not fit. The first allocation or memory query of a device does it, too. */
PRETEND_API int pretend_context(int device);
PRETEND_API int pretend_has_context(int device);
/* PRETEND_NO_MEMORY where the context did not fit; both values are written all the same. */
PRETEND_API int pretend_memory_info(int device, size_t *free_bytes, size_t *total_bytes);
/* What this process holds on a device, without its context. */
PRETEND_API size_t pretend_held(int device);
PRETEND_API int pretend_malloc(int device, size_t size, void **out);
PRETEND_API int pretend_pinned(size_t size, void **out);
/* Memory of the caller's is page-locked: counted among allocations, its bytes are not. */
PRETEND_API int pretend_register(size_t size);
PRETEND_API int pretend_free(void *pointer);
PRETEND_API void pretend_mark(const char *phase);
/* Where the newest refused allocation was made: the caller's text, in the timeline. */
PRETEND_API void pretend_site(const char *text);
/* 1 and the device where the pointer is device memory, 0 elsewhere;
 * *pinned is 1 for page-locked host memory. */
PRETEND_API int pretend_locate(const void *pointer, int *device, int *pinned);
/* The allocation that a pointer lies in. */
PRETEND_API int pretend_range(const void *pointer, void **base, size_t *size);
/* Small copies are made, large ones and those of unknown memory are not. */
PRETEND_API void pretend_copy(void *to, const void *from, size_t size);
PRETEND_API void pretend_fill(void *to, int value, size_t size);

/* pools */
PRETEND_API struct pretend_pool *pretend_pool_default(int device);
PRETEND_API struct pretend_pool *pretend_pool_create(int device);
PRETEND_API int pretend_pool_destroy(struct pretend_pool *pool);
PRETEND_API void pretend_pool_threshold(struct pretend_pool *pool, uint64_t bytes);
/* By which the pool grows, where not by the scenario's pool_step. */
PRETEND_API void pretend_pool_step(struct pretend_pool *pool, size_t step);
PRETEND_API void pretend_pool_trim(struct pretend_pool *pool, size_t keep);
PRETEND_API int pretend_pool_malloc(struct pretend_pool *pool, size_t size, void **out);
/* A stream, event or context of the device was synchronised: its pools give
 * back what is above their release thresholds. */
PRETEND_API void pretend_synchronised(int device);

/* VMM: physical memory by handle, mapped anywhere */
PRETEND_API size_t pretend_vmm_granularity(void);
PRETEND_API int pretend_vmm_create(int device, size_t size, uint64_t *handle);
/* A handle without memory of its own, which any device may map. */
PRETEND_API int pretend_vmm_multicast(uint64_t *handle);
PRETEND_API int pretend_vmm_release(uint64_t handle);
PRETEND_API int pretend_vmm_retain(uint64_t handle);
PRETEND_API int pretend_vmm_reserve(size_t size, void **out);
PRETEND_API int pretend_vmm_unreserve(void *pointer, size_t size);
PRETEND_API int pretend_vmm_map(void *pointer, size_t size, uint64_t handle);
PRETEND_API int pretend_vmm_unmap(void *pointer, size_t size);
PRETEND_API int pretend_vmm_handle_at(const void *pointer, uint64_t *handle);
PRETEND_API int pretend_vmm_access(const void *pointer, int device);

/* threads.c */
PRETEND_API int *pretend_current_device(void);
/* Whether that device's context is current on this thread: cuCtxGetCurrent. */
PRETEND_API int *pretend_has_current(void);
PRETEND_API void pretend_called(void);          /* once in every entry point that works */
PRETEND_API uint64_t pretend_calls(void);
PRETEND_API int pretend_freeze(int timeout_ms); /* holds every other thread that called CUDA */
PRETEND_API int pretend_thaw(void);              /* 0: one of them did not wait so long */

/* attributes.c: PRETEND_INVALID where there is no such device */
PRETEND_API int pretend_attribute(int *value, int attribute, int device);

/* stubs.c */
PRETEND_API void pretend_stub(const char *name); /* an entry point that does nothing was called */

/* timeline.c, used by account.c with its lock held */
void timeline_open(const char *path, size_t limit);
void timeline_leave(void); /* in a child of fork: what is written is the parent's */
void timeline_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
void timeline_trace(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
