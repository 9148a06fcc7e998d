/* Stand-in for libcudart, streams, events and kernels. Nothing runs, but for the effects of
 * effects.c; nothing waits, but for the time of clock.c. */
#define _GNU_SOURCE
#include "clock.h"
#include "effects.h"

#include <stdlib.h>
#include <string.h>

/* cudaFuncAttributes of CUDA 12 and 13 */
typedef struct {
    size_t shared, constant, local;
    int threads, registers, ptx, binary, cache, dynamic_shared, carveout, cluster_must,
        cluster[3], cluster_policy, non_portable, reserved[16];
} function_attributes_;

static error_t_ create(void **out, int priority)
{
    pretend_called();
    if (need_context())
        return no_memory;
    object_ *o = malloc(sizeof *o);
    if (!o)
        return give(no_memory);
    *o = (object_){here(), priority, 0, 0};
    *out = o;
    return success;
}

static error_t_ destroy(void *o)
{
    if ((size_t)o > 2)
        free(o);
    return success;
}

/* ----------------------------------------------------- streams and events */

API error_t_ cudaStreamCreateWithFlags(void **s, unsigned flags)
{
    (void)flags;
    return create(s, 0);
}

API error_t_ cudaStreamCreate(void **s) { return create(s, 0); }

API error_t_ cudaStreamCreateWithPriority(void **s, unsigned flags, int priority)
{
    (void)flags;
    return create(s, priority);
}

API error_t_ cudaStreamGetPriority(void *s, int *priority)
{
    *priority = (size_t)s <= 2 ? 0 : ((object_ *)s)->priority;
    return success;
}

API error_t_ cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return success;
}

API error_t_ cudaStreamQuery(void *s)
{
    (void)s;
    pretend_called();
    return success;
}

API error_t_ cudaStreamDestroy(void *s) { return destroy(s); }

static error_t_ synchronise(const void *o)
{
    pretend_called();
    clock_wait(o);
    pretend_synchronised(device_of(o));
    return success;
}

API error_t_ cudaStreamSynchronize(void *s) { return synchronise(s); }

API error_t_ cudaStreamWaitEvent(void *s, void *e, unsigned flags)
{
    (void)flags;
    pretend_called();
    clock_follow(s, e);
    return success;
}

API error_t_ cudaEventCreate(void **e) { return create(e, 0); }

API error_t_ cudaEventCreateWithFlags(void **e, unsigned flags)
{
    (void)flags;
    return create(e, 0);
}

API error_t_ cudaEventQuery(void *e)
{
    (void)e;
    pretend_called();
    return success;
}

API error_t_ cudaEventDestroy(void *e) { return destroy(e); }

API error_t_ cudaEventRecord(void *e, void *s)
{
    pretend_called();
    clock_follow(e, s);
    return success;
}

API error_t_ cudaEventRecordWithFlags(void *e, void *s, unsigned flags)
{
    (void)flags;
    return cudaEventRecord(e, s);
}

API error_t_ cudaEventSynchronize(void *e) { return synchronise(e); }

API error_t_ cudaEventElapsedTime(float *ms, void *a, void *b)
{
    (void)a;
    (void)b;
    *ms = 1000; /* a constant: every kernel is as fast, and one sample is enough */
    return success;
}

/* Everything before it has happened already. */
API error_t_ cudaLaunchHostFunc(void *s, void (*call)(void *), void *data)
{
    (void)s;
    pretend_called();
    call(data);
    return success;
}

API error_t_ cudaStreamAddCallback(void *s, void (*call)(void *, error_t_, void *), void *data,
                                   unsigned flags)
{
    (void)flags;
    pretend_called();
    call(s, success, data);
    return success;
}

/* ---------------------------------------------------------------- kernels */

API error_t_ cudaLaunchKernel(const void *f, dim3_ grid, dim3_ block, void **args, size_t shared,
                             void *stream)
{
    (void)block;
    (void)shared;
    pretend_called();
    clock_launch(f, args, &grid, stream);
    effect_run(f, args, grid.x);
    return success;
}

API error_t_ cudaLaunchKernelExC(const void *config, const void *f, void **args)
{
    const struct { dim3_ grid, block; size_t shared; void *stream; } *c = config;
    pretend_called();
    if (c)
        clock_launch(f, args, &c->grid, c->stream);
    effect_run(f, args, c ? c->grid.x : 0);
    return success;
}

API error_t_ cudaLaunchCooperativeKernel(const void *f, dim3_ grid, dim3_ block, void **args,
                                         size_t shared, void *stream)
{
    return cudaLaunchKernel(f, grid, block, args, shared, stream);
}

/* CUDA 13 launches through handles; ours are the host functions themselves. */
API error_t_ __cudaGetKernel(const void **kernel, const void *f)
{
    *kernel = f;
    return success;
}

API error_t_ __cudaLaunchKernel(const void *kernel, dim3_ grid, dim3_ block, void **args,
                                size_t shared, void *stream)
{
    return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

/* The architecture whose kernels serve a card. CUB looks for it among those that its library was
 * built for: wheels have the first of each generation and 7.5, and CUDA 13's have no 7.0. */
static int kernels_of(const struct pretend_device *d)
{
    if (!d)
        return 80;
    return d->major == 7 && d->minor >= 5 ? 75 : d->major * 10;
}

API error_t_ cudaFuncGetAttributes(function_attributes_ *a, const void *f)
{
    (void)f;
    memset(a, 0, sizeof *a);
    a->threads = 1024;
    a->registers = 128;
    a->ptx = a->binary = kernels_of(pretend_device(here()));
    a->dynamic_shared = 48 << 10;
    return success;
}

API error_t_ cudaFuncSetAttribute(const void *f, int attribute, int value)
{
    (void)f;
    const struct pretend_device *d = pretend_device(here());
    /* Dynamic shared memory. Not kept for cudaGetLastError: TurboMind asks it of kernels for other
     * cards too, and torch on the same runtime does not stumble over that on real ones. */
    if (attribute == 8 && d && (size_t)value > d->smem_block)
        return invalid_value;
    return success;
}

API error_t_ cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f,
                                                                   int threads, size_t shared,
                                                                   unsigned flags)
{
    (void)f;
    (void)flags;
    const struct pretend_device *d = pretend_device(here());
    int by_threads = threads > 0 ? 1536 / threads : 1;
    int by_shared = d && shared ? (int)(d->smem_sm / (shared + 1024)) : by_threads;
    int least = by_threads < by_shared ? by_threads : by_shared;
    *n = least < 16 ? least : 16;
    return success;
}

API error_t_ cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads,
                                                          size_t shared)
{
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, shared, 0);
}

API error_t_ cudaOccupancyMaxActiveClusters(int *n, const void *f, const void *config)
{
    (void)f;
    (void)config;
    *n = pretend_device(here()) ? pretend_device(here())->sm_count / 2 : 1;
    return success;
}

API error_t_ cudaOccupancyMaxPotentialClusterSize(int *n, const void *f, const void *config)
{
    (void)f;
    (void)config;
    *n = 8; /* what every card with clusters has */
    return success;
}

/* ----------------------------------------------------------- registration */

static __thread struct { dim3_ grid, block; size_t shared; void *stream; } launch;

API void **__cudaRegisterFatBinary(void *binary)
{
    static void *handle;
    (void)binary;
    return &handle;
}

API char __cudaInitModule(void **handle)
{
    (void)handle;
    return 1;
}

API void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
API void __cudaUnregisterFatBinary(void **handle) { (void)handle; }

API void __cudaRegisterFunction(void **handle, const char *host, char *device_function,
                                const char *name, int limit, void *tid, void *bid, void *block,
                                void *grid, int *warp)
{
    (void)handle, (void)device_function, (void)limit, (void)tid, (void)bid, (void)block, (void)grid,
        (void)warp;
    effect_register(host, name);
    clock_register(host, name);
}

API void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external,
                           size_t size, int constant, int global)
{
    (void)handle, (void)host, (void)address, (void)name, (void)external, (void)size, (void)constant,
        (void)global;
}

API unsigned __cudaPushCallConfiguration(dim3_ grid, dim3_ block, size_t shared, void *stream)
{
    launch.grid = grid;
    launch.block = block;
    launch.shared = shared;
    launch.stream = stream;
    return 0;
}

API error_t_ __cudaPopCallConfiguration(dim3_ *grid, dim3_ *block, size_t *shared, void **stream)
{
    *grid = launch.grid;
    *block = launch.block;
    *shared = launch.shared;
    *stream = launch.stream;
    return success;
}

