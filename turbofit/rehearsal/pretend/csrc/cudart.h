/* What the files of the CUDA runtime's stand-in share: codes, and how an entry point ends. Built
 * once for each major version that an engine may link, PRETEND_CUDA 12 and 13. */
#ifndef TURBOFIT_PRETEND_CUDART_H
#define TURBOFIT_PRETEND_CUDART_H

#include "account.h"

#define API __attribute__((visibility("default")))

typedef int error_t_;

enum {
    success = 0, invalid_value = 1, no_memory = 2, no_device = 100, invalid_device = 101,
    no_peer = 217, not_ready = 600, not_supported = 801
};

/* The error that cudaGetLastError gives back, of this thread and of this runtime: in a process with
 * two of them, one does not see the other's. In cudart_device.c. */
extern __thread error_t_ last_error __attribute__((visibility("hidden")));

static inline error_t_ give(error_t_ e)
{
    if (e)
        last_error = e;
    return e;
}

static inline error_t_ of_status(int status)
{
    static const error_t_ map[] = {success, invalid_value, no_memory, no_peer};
    return give(map[status]);
}

static inline int here(void) { return *pretend_current_device(); }

typedef struct { unsigned x, y, z; } dim3_;

/* What needs a context makes it on the current device, as the runtime does. */
static inline error_t_ need_context(void)
{
    int status = pretend_context(here());
    if (!status)
        *pretend_has_current() = 1;
    return of_status(status);
}

/* A stream or an event: 0, 1 and 2 are the default streams of the current device. A stream that is
 * being captured has the capture's number. */
typedef struct {
    int device, priority;
    unsigned long long capture;
    int64_t until; /* when its work is done, in nanoseconds of CLOCK_MONOTONIC (clock.c) */
} object_;

static inline int device_of(const void *object)
{
    return (size_t)object <= 2 ? here() : ((const object_ *)object)->device;
}

#endif
