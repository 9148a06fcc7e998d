/* Stand-in for libcudart, devices and errors. Layouts and numbers are those of CUDA 12's and 13's
 * ABI. Entry points in several files: cudart_memory.c, cudart_launch.c, cudart_graph.c. */
#define _GNU_SOURCE
#include "cudart.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#if PRETEND_CUDA == 12
#define ONLY_12(...) __VA_ARGS__
#define TEXTURES 40
#define PROPERTIES cudaGetDeviceProperties_v2
#else
#define ONLY_12(...)
#define TEXTURES 39
#define PROPERTIES cudaGetDeviceProperties
#endif

/* cudaDeviceProp: CUDA 13 dropped what is ONLY_12. */
typedef struct {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_per_block;
    int regs_per_block, warp_size;
    size_t pitch;
    int max_threads_per_block, max_threads_dim[3], max_grid[3];
    ONLY_12(int clock_rate;)
    size_t const_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    ONLY_12(int overlap;)
    int sm_count;
    ONLY_12(int timeout;)
    int integrated, map_host;
    ONLY_12(int compute_mode;)
    int textures[TEXTURES];
    size_t surface_alignment;
    int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, async_engines,
        unified_addressing;
    ONLY_12(int memory_clock;)
    int bus_width, l2, persisting_l2, threads_per_sm, stream_priorities, global_l1, local_l1;
    size_t shared_per_sm;
    int regs_per_sm, managed, multi_gpu, multi_gpu_group, native_atomics;
    ONLY_12(int double_ratio;)
    int pageable, concurrent_managed, preemption, host_pointer, cooperative;
    ONLY_12(int cooperative_multi;)
    size_t shared_optin;
    int page_tables, direct_managed, blocks_per_sm, window;
    size_t shared_reserved;
    int host_register, sparse, read_only, semaphores, memory_pools, rdma;
    unsigned rdma_flush;
    int rdma_order;
    unsigned pool_handles;
    int deferred, ipc_event, cluster_launch, unified_pointers, reserved[63];
} properties_;
_Static_assert(sizeof(properties_) == (PRETEND_CUDA == 12 ? 1032 : 1008), "cudaDeviceProp");
#if PRETEND_CUDA == 13
_Static_assert(offsetof(properties_, l2) == 596, "cudaDeviceProp of CUDA 13");
_Static_assert(offsetof(properties_, shared_optin) == 672, "cudaDeviceProp of CUDA 13");
_Static_assert(offsetof(properties_, cluster_launch) == 748, "cudaDeviceProp of CUDA 13");
#endif

/* ---------------------------------------------------------------- devices */

API error_t_ cudaGetDeviceCount(int *n)
{
    *n = pretend_device_count();
    return *n ? success : give(no_device);
}

API error_t_ cudaGetDevice(int *d)
{
    *d = here();
    return success;
}

API error_t_ cudaSetDevice(int d)
{
    pretend_called();
    if (!pretend_device(d))
        return give(invalid_device);
    *pretend_current_device() = d;
    return need_context(); /* from CUDA 12.0 on; before, the first use of the device did */
}

API error_t_ PROPERTIES(properties_ *p, int d)
{
    const struct pretend_device *from = pretend_device(d);
    if (!from)
        return give(invalid_device);
    memset(p, 0, sizeof *p);
    memcpy(p->name, from->name, sizeof p->name);
    pretend_uuid(d, (unsigned char *)p->uuid);
    p->total_memory = from->total;
    p->shared_per_block = 48 << 10;
    p->regs_per_block = p->regs_per_sm = 65536;
    p->warp_size = 32;
    p->max_threads_per_block = p->max_threads_dim[0] = p->max_threads_dim[1] = 1024;
    p->max_threads_dim[2] = 64;
    p->max_grid[0] = 0x7fffffff;
    p->max_grid[1] = p->max_grid[2] = 65535;
    ONLY_12(p->clock_rate = 1500000;)
    p->const_memory = 65536;
    p->major = from->major;
    p->minor = from->minor;
    p->sm_count = from->sm_count;
    p->texture_alignment = p->surface_alignment = 512;
    p->map_host = p->concurrent_kernels = p->unified_addressing = 1;
    p->async_engines = 2;
    p->pci_bus = pretend_physical(d) + 1;
    ONLY_12(p->memory_clock = 9000000;)
    p->bus_width = 384;
    p->l2 = (int)from->l2;
    p->threads_per_sm = 1536;
    p->shared_per_sm = from->smem_sm;
    p->shared_optin = from->smem_block;
    p->shared_reserved = 1024;
    p->blocks_per_sm = 16;
    p->cooperative = p->memory_pools = 1;
    p->cluster_launch = from->major >= 9;
    return success;
}

API error_t_ cudaDeviceGetAttribute(int *value, int attribute, int d)
{
    return pretend_attribute(value, attribute, d) ? give(invalid_device) : success;
}

API error_t_ cudaDeviceCanAccessPeer(int *can, int from, int to)
{
    *can = from != to && pretend_can_access(from, to);
    return success;
}

API error_t_ cudaDeviceEnablePeerAccess(int to, unsigned flags)
{
    (void)flags;
    return pretend_can_access(here(), to) ? success : give(no_peer);
}

API error_t_ cudaDeviceGetPCIBusId(char *out, int size, int d)
{
    if (!pretend_device(d))
        return give(invalid_device);
    snprintf(out, (size_t)size, "0000:%02X:00.0", pretend_physical(d) + 1);
    return success;
}

API error_t_ cudaRuntimeGetVersion(int *version)
{
    *version = PRETEND_CUDA * 1000;
    return success;
}

API error_t_ cudaDriverGetVersion(int *version)
{
    *version = 13000;
    return success;
}

API error_t_ cudaDeviceSynchronize(void)
{
    pretend_called();
    pretend_synchronised(here());
    return need_context();
}

/* ----------------------------------------------------------------- errors */

__thread error_t_ last_error;

API error_t_ cudaGetLastError(void)
{
    error_t_ e = last_error;
    last_error = success;
    return e;
}

API error_t_ cudaPeekAtLastError(void) { return last_error; }

static const struct { error_t_ code; const char *name, *text; } errors[] = {
    {success, "cudaSuccess", "no error"},
    {invalid_value, "cudaErrorInvalidValue", "invalid argument"},
    {no_memory, "cudaErrorMemoryAllocation", "out of memory"},
    {no_device, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {invalid_device, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {no_peer, "cudaErrorPeerAccessUnsupported", "peer access is not supported between these two devices"},
    {not_ready, "cudaErrorNotReady", "device not ready"},
    {not_supported, "cudaErrorNotSupported", "operation not supported"},
};

API const char *cudaGetErrorString(error_t_ e)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i)
        if (errors[i].code == e)
            return errors[i].text;
    return "unrecognized error code";
}

API const char *cudaGetErrorName(error_t_ e)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i)
        if (errors[i].code == e)
            return errors[i].name;
    return "cudaErrorUnknown";
}

/* ---------------------------------------------------- the driver, by name */

static int missing(void) { return not_supported; }

static void *driver_function(const char *name)
{
    static void *driver;
    if (!driver)
        driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    return driver ? dlsym(driver, name) : NULL;
}

/* A function of our libcuda; in place of what it does not have, one that says "not supported". */
API error_t_ cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, int *result)
{
    (void)version;
    (void)flags;
    *function = driver_function(name);
    if (!*function) {
        pretend_stub(name);
        *function = (void *)missing;
    }
    if (result)
        *result = 0;
    return success;
}

/* The older one: whoever asks lives without what is not found. */
API error_t_ cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    int *result)
{
    (void)flags;
    *function = driver_function(name);
    if (result)
        *result = *function ? 0 : 1; /* success, symbol not found */
    return success;
}
